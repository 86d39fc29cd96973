"""A call of one row runs packed, whatever its processors and criteria: they see, and may do, what dense lets them."""

import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import hf_paged
from support import zoo
from support.packing import LENGTHS, SAMPLE, compare, pair, watch_steps
from support.threads import in_threads

ENDLESS = {**LENGTHS, "eos_token_id": None}
DECODING = pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])


class Recorder(LogitsProcessor):
    """Notes what it is called with, and favours another token at each call."""

    def __init__(self):
        self.seen, self.threads = [], set()

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.tolist(), input_ids.dtype, scores.shape, scores.dtype, input_ids.is_contiguous()))
        self.threads.add(threading.get_ident())
        return scores.index_add(1, torch.tensor([3 + 7 * len(self.seen) % 80]), torch.full((1, 1), 2.0))


class Shift(LogitsProcessor):
    """Moves all scores by one token."""

    def __call__(self, input_ids, scores):
        return scores.roll(1, dims=1)


class InPlace(LogitsProcessor):
    """Writes to the scores that it is given, which are the call's logits, and to the tokens."""

    def __call__(self, input_ids, scores):
        input_ids[:, 0] += 1
        scores[:, int(input_ids[0, -1])] = -5.0
        return scores


class OtherType(LogitsProcessor):
    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, input_ids, scores):
        return scores.to(self.dtype)


class StopOnTokens(StoppingCriteria):
    """As in LangChain's and LlamaIndex's examples: a truth of Python's, about the first row."""

    def __init__(self, *tokens: int):
        self.tokens, self.seen = tokens, []

    def __call__(self, input_ids, scores, **kwargs):
        steps = None if scores is None else [step.shape for step in scores]
        self.seen.append((input_ids.tolist(), input_ids.dtype, steps, kwargs))
        return int(input_ids[0][-1]) in self.tokens


class StopAtCall(StoppingCriteria):
    """A tensor of truths, after some calls."""

    def __init__(self, calls: int):
        self.calls_left = calls

    def __call__(self, input_ids, scores, **kwargs):
        self.calls_left -= 1
        return torch.tensor([self.calls_left <= 0])


class Overwrite(StoppingCriteria):
    """Writes another token over each that is even, an end token too: the model goes on with what is there."""

    def __call__(self, input_ids, scores, **kwargs):
        input_ids[input_ids[:, -1] % 2 == 0, -1] = 7
        return False


def both(models, inputs, make_hooks, **options):
    """Outputs and hooks, dense and packed; the two calls must leave torch's random numbers in one state."""
    outputs, hooks, states = [], [], []
    for model in models:
        made = make_hooks()
        own = {name: tensor.clone() for name, tensor in inputs.items()}  # Dense lets hooks write to the prompt.
        torch.manual_seed(0)
        outputs.append(model.generate(**own, **{**LENGTHS, **options, **made}))
        states.append(torch.get_rng_state())
        hooks.append([*made.get("logits_processor", ()), *made.get("stopping_criteria", ())])
    assert torch.equal(*states)
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1 and not stats.fallbacks and stats.page_reads and not stats.gathers
    return outputs, hooks


def hooks_of(*made):
    """Keyword arguments of `generate` with new hooks at each call."""
    processors = LogitsProcessorList(hook for hook in made if not isinstance(hook, StoppingCriteria))
    criteria = StoppingCriteriaList(hook for hook in made if isinstance(hook, StoppingCriteria))
    return {"logits_processor": processors, "stopping_criteria": criteria}


@DECODING
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ids_type", [torch.int64, torch.int32])
def test_they_see_what_dense_shows_them(options, padded, ids_type):
    inputs = {name: values[-1:] for name, values in zoo.prompts([13, 9] if padded else [9]).items()}
    inputs["input_ids"] = inputs["input_ids"].to(ids_type)
    outputs, hooks = both(pair(), inputs, lambda: hooks_of(Recorder(), StopOnTokens(11, 40)), **ENDLESS, **options)
    assert torch.equal(*outputs)
    (dense, dense_stop), (packed, packed_stop) = hooks
    assert packed.seen == dense.seen and packed_stop.seen == dense_stop.seen and len(packed.seen) > 2
    assert packed.threads == {threading.get_ident()}


@DECODING
def test_scores_and_logits_are_those_of_dense(options):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    outputs, hooks = both(pair(), zoo.prompts([9]), lambda: hooks_of(Recorder(), StopOnTokens(11)), **wanted, **options)
    dense, packed = outputs
    assert torch.equal(dense.sequences, packed.sequences) and hooks[0][1].seen == hooks[1][1].seen
    assert len(packed.scores) == len(dense.scores) == len(hooks[1][1].seen[-1][2])
    for ours, theirs in ((packed.scores, dense.scores), (packed.logits, dense.logits)):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-3, atol=1e-3)
    assert packed.past_key_values.get_seq_length() == dense.past_key_values.get_seq_length()


@DECODING
def test_they_may_write_to_what_they_are_given(options):
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    outputs, _ = both(pair(), zoo.prompts([9]), lambda: hooks_of(InPlace(), Overwrite()), **wanted, **options)
    dense, packed = outputs
    assert torch.equal(dense.sequences, packed.sequences)
    assert not (packed.sequences[0, 9:] % 2 == 0).any() and packed.sequences.shape[1] == 29
    logits = torch.stack(packed.logits)
    assert (logits == -5.0).any(-1).all(), "dense returns the very tensor that a processor has written to"
    torch.testing.assert_close(logits, torch.stack(dense.logits), rtol=1e-3, atol=1e-3)


@DECODING
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_of_another_dtype(options, dtype):
    outputs, _ = both(pair(), zoo.prompts([9]), lambda: hooks_of(OtherType(dtype)), **ENDLESS, **options)
    assert torch.equal(*outputs)


@DECODING
def test_guidance_runs_the_model_from_inside(options):
    negative = {"negative_prompt_ids": zoo.prompts([5], seed=3)["input_ids"], "guidance_scale": 1.7}
    models = pair()
    compare(models, zoo.prompts([9]), **negative, **options)


def test_a_watermark():
    config = {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash", "greenlist_ratio": 0.4}}
    compare(pair(), zoo.prompts([9]), **config)


def test_a_processor_that_generates():
    models, inner = pair(), ([], [])

    def hooks(index):
        def nested(input_ids, scores):
            if input_ids.shape[1] == 12:
                inner[index].append(models[index].generate(**zoo.prompts([5, 3]), **LENGTHS))
            return scores

        return LogitsProcessorList([nested])

    outputs = [
        model.generate(**zoo.prompts([9]), **LENGTHS, logits_processor=hooks(index))
        for index, model in enumerate(models)
    ]
    assert torch.equal(*outputs) and torch.equal(inner[0][0], inner[1][0])
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 2 and not stats.fallbacks


class Fails(LogitsProcessor):
    """Raises at one of its calls."""

    def __init__(self, at: int, error: type[Exception]):
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == self.at:
            raise self.error("of a processor")
        return scores


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
@pytest.mark.parametrize("at", [1, 4])
def test_an_error_reaches_its_caller_alone_and_nothing_is_tried_again(at, error):
    dense, paged = pair(token_budget=64)
    paged.generate(**zoo.prompts([4]), **LENGTHS)
    failing, inputs = Fails(at, error), zoo.prompts([9, 3])
    good = lambda: paged.generate(**inputs, **ENDLESS)  # noqa: E731
    bad = lambda: paged.generate(**zoo.prompts([7]), **ENDLESS, logits_processor=LogitsProcessorList([failing]))  # noqa: E731
    first, raised, last = in_threads(good, bad, good)
    assert isinstance(raised, error) and failing.calls == at
    assert torch.equal(first, dense.generate(**inputs, **ENDLESS)) and torch.equal(first, last)


def test_an_error_of_a_model_that_was_changed_calls_no_processor_twice():
    """The first call of a processor is the last moment at which the call may begin anew."""
    _, paged = pair()
    paged.generate(**zoo.prompts([4]), **LENGTHS)
    paged.unused = torch.nn.Linear(2, 2)  # Its engine was made for another structure.
    failing = Fails(1, ValueError)
    try:
        with pytest.raises(ValueError, match="of a processor"):
            paged.generate(**zoo.prompts([7]), **LENGTHS, logits_processor=LogitsProcessorList([failing]))
        assert failing.calls == 1
    finally:
        del paged.unused


class Streamer:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(value.tolist())

    def end(self):
        self.events.append("end")


def test_a_streamer_hears_what_dense_tells_it():
    models, told = pair(), []
    for model in models:
        streamer, criterion = Streamer(), StopOnTokens(11)
        model.generate(**zoo.prompts([9]), **ENDLESS, **hooks_of(Recorder(), criterion), streamer=streamer)
        told.append((streamer.events, len(criterion.seen)))
    assert told[0] == told[1] and told[1][0][-1] == "end"


def test_a_criterion_that_raises_comes_before_the_streamer():
    told = []
    for model in pair():
        streamer = Streamer()

        def fail(input_ids, scores, **kwargs):
            if input_ids.shape[1] == 12:
                raise KeyError("of a criterion")
            return False

        with pytest.raises(KeyError):
            model.generate(**zoo.prompts([9]), **ENDLESS, stopping_criteria=[fail], streamer=streamer)
        told.append(streamer.events)
    assert told[0] == told[1] and len(told[1]) == 3


def test_rows_that_wait_and_are_preempted_call_each_hook_once_a_step():
    """A pool for one row and a half: calls queue, are preempted, and run their tokens again."""
    models = pair(blocks=14, token_budget=16)
    inputs = [zoo.prompts([length]) for length in (9, 14, 5, 11, 8, 12)]

    def generate(model, index, hooks):
        output = model.generate(**inputs[index], **ENDLESS, **hooks_of(*hooks))
        return output.tolist(), hooks[0].seen, hooks[1].seen

    expected = [generate(models[0], index, [Recorder(), StopOnTokens(40)]) for index in range(len(inputs))]
    found = in_threads(
        *(lambda index=index: generate(models[1], index, [Recorder(), StopOnTokens(40)]) for index in range(6))
    )
    assert found == expected
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 6 and not stats.fallbacks and stats.page_reads


@DECODING
def test_calls_of_six_threads_share_steps(options, monkeypatch):
    dense, paged = pair(token_budget=64)
    paged.generate(**zoo.prompts([4]), **LENGTHS)
    inputs = [zoo.prompts([5 + index], seed=index) for index in range(6)]
    lengths = {**ENDLESS, "max_new_tokens": 60}
    expected = [dense.generate(**one, **lengths, stopping_criteria=[StopOnTokens(11)]) for one in inputs]
    rows, together = watch_steps(monkeypatch, lambda step: len(step.sample_index)), threading.Barrier(6)

    def generate(one):
        together.wait(30)
        return paged.generate(**one, **lengths, **options, stopping_criteria=[StopOnTokens(11)])

    found = in_threads(*(lambda one=one: generate(one) for one in inputs))
    assert not [result for result in found if isinstance(result, Exception)]
    if not options:  # Calls that sample at the same time draw the random numbers in any order.
        assert all(map(torch.equal, found, expected))
    stats = hf_paged.stats(paged)
    assert stats.packed_calls == 7 and not stats.fallbacks and stats.page_reads
    assert max(rows) > 2, "no two calls ever shared a step"


def test_the_callers_cache_gets_what_dense_leaves_in_it():
    lengths = []
    for model in pair():
        cache = DynamicCache(config=model.config)
        ids = model.generate(**zoo.prompts([9]), **ENDLESS, past_key_values=cache, stopping_criteria=[StopAtCall(6)])
        lengths.append((ids.tolist(), cache.get_seq_length()))
    assert lengths[0] == lengths[1] and lengths[1][1] == 14


def test_two_rows_with_a_processor_that_says_nothing_fall_back():
    models, outputs = pair(), []
    for model in models:
        torch.manual_seed(0)
        outputs.append(
            model.generate(**zoo.prompts([9]), **LENGTHS, **SAMPLE, num_return_sequences=2, **hooks_of(Shift()))
        )
    assert torch.equal(*outputs)
    assert hf_paged.stats(models[1]).fallbacks == {"a processor may look at other rows: Shift": 1}
