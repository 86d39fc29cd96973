"""Every mode of `generate`: the same tokens as the dense cache, out of pages."""

import copy

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer

import hf_paged
from support import zoo
from support.parity import PageReads, assert_generates_equal, assert_rows_equal

every_model = pytest.mark.parametrize("models", zoo.NAMES, indirect=True)
RAGGED = [13, 4, 9]

MODES = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "beam_sample": {"num_beams": 3, "do_sample": True, "temperature": 1.3},
    "beam_return": {"num_beams": 4, "num_return_sequences": 3},
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "sample_return": {"do_sample": True, "num_return_sequences": 4},
    "min_length": {"min_new_tokens": 20},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    "chunked_prefill": {"prefill_chunk_size": 4},
}


@every_model
@pytest.mark.usefixtures("is_ahead")
@pytest.mark.parametrize("mode", MODES)
def test_mode(models, mode):
    assert_generates_equal(models, zoo.prompts(RAGGED), **MODES[mode])


@every_model
def test_logits_of_every_step(models):
    kwargs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    dense, paged = assert_generates_equal(models, zoo.prompts(RAGGED), **kwargs)
    for name in ("scores", "logits"):
        for a, b in zip(dense[name], paged[name], strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@every_model
@pytest.mark.parametrize("lookup", [True, False], ids=["prompt_lookup", "assistant"])
def test_assisted(models, lookup):
    dense, paged = models
    inputs = zoo.prompts([12])
    inputs["input_ids"][0, 6:] = inputs["input_ids"][0, :6]
    if lookup:
        assert_generates_equal(models, inputs, prompt_lookup_num_tokens=3)
        return
    assistant = zoo.build(dense.config.model_type, "paged")
    with torch.no_grad():  # An assistant that is right most of the time, so that tokens are taken and refused.
        next(iter(assistant.parameters())).add_(0.02)
    lengths = {"max_new_tokens": 24, "min_new_tokens": 24}
    expected = dense.generate(**inputs, assistant_model=assistant, **lengths)
    with PageReads(paged):
        got = paged.generate(**inputs, assistant_model=assistant, **lengths)
    assert_rows_equal(dense, inputs, expected, got)
    assert_rows_equal(dense, inputs, dense.generate(**inputs, **lengths), got)


@every_model
def test_streamer(models):
    class Collect:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamers = [Collect(), Collect()]
    models[0].generate(**zoo.prompts([9]), max_new_tokens=16, streamer=streamers[0])
    with PageReads(models[1]):
        models[1].generate(**zoo.prompts([9]), max_new_tokens=16, streamer=streamers[1])
    assert streamers[0].tokens == streamers[1].tokens and streamers[1].ended


def test_text_iterator_streamer():
    class Decode:
        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    texts = []
    for model in zoo.pair("llama"):
        streamer = TextIteratorStreamer(Decode())
        model.generate(**zoo.prompts([9]), max_new_tokens=16, streamer=streamer)
        texts.append("".join(streamer))
    assert texts[0] == texts[1] and len(texts[0]) > 20


@every_model
def test_stopping_criteria_and_processors(models):
    def stop_row_at_20(ids, scores, **_):
        return torch.tensor([len(row) >= 20 and int(row[-1]) % 2 == 0 for row in ids])

    def push_token_5(ids, scores):
        return scores.index_add(1, torch.tensor([5]), torch.full((len(scores), 1), 3.0))

    assert_generates_equal(
        models,
        zoo.prompts(RAGGED),
        stopping_criteria=StoppingCriteriaList([stop_row_at_20]),
        logits_processor=LogitsProcessorList([push_token_5]),
    )


@every_model
def test_one_token(models):
    dense, paged = models
    inputs = zoo.prompts(RAGGED)
    expected = dense.generate(**inputs, max_new_tokens=1)
    assert torch.equal(expected, paged.generate(**inputs, max_new_tokens=1))


@every_model
def test_continue_from_past_key_values(models):
    inputs = zoo.prompts(RAGGED)
    outputs = []
    for model in models:
        hf_paged.release(model)
        first = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, eos_token_id=None)
        grown = torch.cat([first.sequences, torch.full((3, 2), 7)], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
        cache = first.past_key_values
        outputs.append(model.generate(grown, attention_mask=mask, past_key_values=cache, max_new_tokens=12))
    assert_rows_equal(models[0], inputs, *outputs)
    stats = hf_paged.stats(models[1])
    assert stats.page_reads > 0 and not stats.gathers


@every_model
def test_deepcopied_prefix(models):
    """The documented idiom: prefill a prompt once, deepcopy its cache for every continuation."""
    dense, paged = models
    hf_paged.release(paged)
    prefix = zoo.prompts([11])["input_ids"]
    caches = [DynamicCache(config=model.config) for model in models]
    for model, cache in zip(models, caches):
        with torch.no_grad():
            model(prefix, past_key_values=cache)
    used = hf_paged.stats(paged).used_blocks
    copies = [copy.deepcopy(caches[1]) for _ in range(3)]
    assert hf_paged.stats(paged).used_blocks == used, "a copy must share its blocks"
    for seed, copied in enumerate(copies):
        suffix = torch.randint(3, zoo.VOCAB, (1, 5), generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([prefix, suffix], dim=1)
        mask = torch.ones_like(ids)
        expected = dense.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(caches[0]), max_new_tokens=12)
        got = paged.generate(ids, attention_mask=mask, past_key_values=copied, max_new_tokens=12)
        assert_rows_equal(dense, {"input_ids": ids, "attention_mask": mask}, expected, got)
    stats = hf_paged.stats(paged)
    assert stats.page_reads > 0 and not stats.gathers


@every_model
def test_inputs_embeds(models):
    inputs = zoo.prompts(RAGGED)
    mask = inputs["attention_mask"]
    embeds = [model.get_input_embeddings()(inputs["input_ids"]) for model in models]
    expected = models[0].generate(inputs_embeds=embeds[0], attention_mask=mask, max_new_tokens=16, pad_token_id=0)
    with PageReads(models[1]):
        got = models[1].generate(inputs_embeds=embeds[1], attention_mask=mask, max_new_tokens=16, pad_token_id=0)
    assert torch.equal(expected, got)


@every_model
def test_direct_calls(models):
    """A hand-written loop: prompt, then single tokens, then several tokens at once."""
    inputs = zoo.prompts([10, 10])["input_ids"]
    pieces = [inputs[:, :6], inputs[:, 6:7], inputs[:, 7:10]]
    logits = []
    hf_paged.release(models[1])
    for model in models:
        cache, rows = None, []
        with torch.no_grad():
            for piece in pieces:
                output = model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                rows.append(output.logits)
        logits.append(torch.cat(rows, dim=1))
        del cache, output
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
    stats = hf_paged.stats(models[1])
    assert stats.page_reads > 0 and not stats.gathers


@every_model
def test_right_padding(models):
    """Right-padded prompts are stored without their pads and still see what dense sees."""
    inputs = zoo.prompts(RAGGED)
    for row, length in enumerate(RAGGED):
        inputs["input_ids"][row] = inputs["input_ids"][row].roll(length)
        inputs["attention_mask"][row] = inputs["attention_mask"][row].roll(length)
    # Inside a row, pads change distances in a sliding window: these layers gather, and stay right.
    windowed = getattr(models[0].config, "sliding_window", None) is not None
    assert_generates_equal(models, inputs, gathers=windowed)


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_other_cache_implementations(implementation):
    """Caches that are not ours stay upstream's own."""
    outputs = []
    for model in zoo.pair("llama"):
        try:
            outputs.append(
                model.generate(**zoo.prompts(RAGGED), max_new_tokens=12, cache_implementation=implementation)
            )
        except (AssertionError, ImportError, RuntimeError, ValueError) as error:  # Not to be had on this machine.
            outputs.append(str(error))
    dense, paged = outputs
    assert torch.equal(dense, paged) if isinstance(dense, torch.Tensor) else dense == paged


def test_cache_without_config():
    outputs = [
        model.generate(**zoo.prompts(RAGGED), max_new_tokens=12, past_key_values=DynamicCache())
        for model in zoo.pair("llama")
    ]
    assert torch.equal(*outputs)


def test_long_batch_crosses_blocks():
    """Contexts that end just before, at and after a block's end."""
    models = zoo.pair("llama")
    hf_paged.configure(models[1], hf_paged.PagedConfig(block_size=16))
    assert_generates_equal(models, zoo.prompts([15, 16, 17, 31, 32, 33, 1]), max_new_tokens=40)
