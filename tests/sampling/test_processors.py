"""The table of processors: what it claims holds by experiment, and an entry of one's own is all that a call needs."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

import hf_paged
from hf_paged.sampling import processors
from hf_paged.sampling.processors import PROPERTIES, Properties, properties_of, register, shared_properties
from hf_paged.sampling.stopping import StoppingRules
from hf_paged_integrations.serving.openai.processors import LogitBias, Penalties
from support import texts, zoo
from support.packing import LENGTHS, SAMPLE, compare, pair
from support.threads import in_threads

ROWS, VOCAB, EVERY = 7, 40, Properties(row_wise=True, token_free=True, place_free=True, cheap=True)
WIDTHS = (1, 8, 20)  # Tokens so far.

# An instance of each class in the table, whose settings make its effect show at these sizes.
EXAMPLES = {
    lp.EpsilonLogitsWarper: lambda: lp.EpsilonLogitsWarper(0.02),
    lp.EtaLogitsWarper: lambda: lp.EtaLogitsWarper(0.3),
    lp.ExponentialDecayLengthPenalty: lambda: lp.ExponentialDecayLengthPenalty((3, 1.5), 2, 1),
    lp.ForcedBOSTokenLogitsProcessor: lambda: lp.ForcedBOSTokenLogitsProcessor(5),
    lp.ForcedEOSTokenLogitsProcessor: lambda: lp.ForcedEOSTokenLogitsProcessor(9, 2),
    lp.InfNanRemoveLogitsProcessor: lambda: lp.InfNanRemoveLogitsProcessor(),
    lp.LogitNormalization: lambda: lp.LogitNormalization(),
    lp.MinLengthLogitsProcessor: lambda: lp.MinLengthLogitsProcessor(12, 2),
    lp.MinNewTokensLengthLogitsProcessor: lambda: lp.MinNewTokensLengthLogitsProcessor(1, 12, 2),
    lp.MinPLogitsWarper: lambda: lp.MinPLogitsWarper(0.1),
    lp.NoBadWordsLogitsProcessor: lambda: lp.NoBadWordsLogitsProcessor([[1], [2, 3]]),
    lp.NoRepeatNGramLogitsProcessor: lambda: lp.NoRepeatNGramLogitsProcessor(2),
    lp.RepetitionPenaltyLogitsProcessor: lambda: lp.RepetitionPenaltyLogitsProcessor(1.5),
    lp.SequenceBiasLogitsProcessor: lambda: lp.SequenceBiasLogitsProcessor([[[1, 2], -3.0], [[3], 2.0]]),
    lp.SuppressTokensAtBeginLogitsProcessor: lambda: lp.SuppressTokensAtBeginLogitsProcessor([3, 4], 8),
    lp.SuppressTokensLogitsProcessor: lambda: lp.SuppressTokensLogitsProcessor([3, 4]),
    lp.TemperatureLogitsWarper: lambda: lp.TemperatureLogitsWarper(0.7),
    lp.TopHLogitsWarper: lambda: lp.TopHLogitsWarper(0.5),
    lp.TopKLogitsWarper: lambda: lp.TopKLogitsWarper(4),
    lp.TopPLogitsWarper: lambda: lp.TopPLogitsWarper(0.8),
    lp.TypicalLogitsWarper: lambda: lp.TypicalLogitsWarper(0.6),
    Penalties: lambda: Penalties(0.7, 0.4, 2),
    LogitBias: lambda: LogitBias({3: 5.0, 7: -100.0}, torch.device("cpu")),
    hf_paged.Cancellation: lambda: hf_paged.Cancellation(),
    sc.EosTokenCriteria: lambda: sc.EosTokenCriteria([1, 2]),
    sc.MaxLengthCriteria: lambda: sc.MaxLengthCriteria(8),
    sc.MaxTimeCriteria: lambda: sc.MaxTimeCriteria(1000.0),
    sc.StopStringCriteria: lambda: sc.StopStringCriteria(texts.tokenizer(), ["a", "bc"]),
}
PROCESSORS = [kind for kind in PROPERTIES if issubclass(kind, LogitsProcessor)]
CRITERIA = [kind for kind in PROPERTIES if issubclass(kind, StoppingCriteria)]


def tokens(width: int, seed: int = 0) -> torch.Tensor:
    """``[ROWS, width]`` of few different tokens, so that sequences come again."""
    return torch.randint(1, 6, (ROWS, width), generator=torch.Generator().manual_seed(100 * seed + width))


def scores(finite: int = VOCAB) -> torch.Tensor:
    """``[ROWS, VOCAB]``, all but `finite` of each row -inf."""
    generator = torch.Generator().manual_seed(finite)
    drawn = 2 * torch.randn(ROWS, VOCAB, generator=generator)
    return drawn.masked_fill(drawn < drawn.topk(finite).values[:, -1:], -float("inf"))


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-5, atol=1e-6)


def is_row_wise(hook) -> bool:
    """Rows alone, and in another order, get what they get together; and once more the same."""
    for width in WIDTHS:
        ids, some = tokens(width), scores()
        together, order = hook(ids, some.clone()), torch.arange(ROWS).flip(0)
        alone = torch.cat([hook(ids[row, None], some[row, None].clone()) for row in range(ROWS)])
        turned, again = hook(ids[order], some[order])[order], hook(ids, some.clone())
        if not all(same(together.float(), other.float()) for other in (alone, turned, again)):
            return False
    return True


def is_token_free(processor) -> bool:
    """Other tokens, more of them, or none at all: the same scores."""
    expected = processor(tokens(1), scores())
    others = [torch.empty(ROWS, 0, dtype=torch.long)]
    others += [tokens(width, seed) for width in WIDTHS for seed in (0, 1)]
    try:
        return all(same(processor(ids, scores()), expected) for ids in others)
    except (IndexError, RuntimeError):  # It cannot do without tokens.
        return False


def is_place_free(processor) -> bool:
    """In a permuted vocabulary, and without tokens whose score is -inf, each token gets what it had."""
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    for width in WIDTHS:
        ids = tokens(width)
        for finite in (VOCAB, 12):
            some = scores(finite)
            if not same(processor(ids, some[:, order]), processor(ids, some.clone())[:, order]):
                return False
        some = scores(12)
        kept, places = some.topk(16)
        if not same(processor(ids, kept), processor(ids, some.clone()).gather(1, places)):
            return False
    return True


class Operations(TorchDispatchMode):
    """Counts the tensor operations that run inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(hook, width: int, rows: int) -> int:
    """Count the tensor operations that some rows take."""
    ids, some = tokens(width)[:rows], scores()[:rows]
    with Operations() as counted:
        hook(ids, some)
    return counted.count


def is_cheap(hook) -> bool:
    """Few operations, and no more of them for more rows."""
    return all(operations(hook, width, ROWS) <= min(30, operations(hook, width, 2)) for width in WIDTHS)


EXPERIMENTS = {
    "row_wise": is_row_wise,
    "token_free": is_token_free,
    "place_free": is_place_free,
    "cheap": is_cheap,
}


def test_every_entry_has_an_example():
    assert PROPERTIES.keys() == EXAMPLES.keys(), "add an example of a new entry to EXAMPLES"


@pytest.mark.parametrize("kind", PROCESSORS, ids=lambda kind: kind.__name__)
def test_processors_are_what_the_table_says(kind):
    processor, claimed = EXAMPLES[kind](), PROPERTIES[kind]
    assert type(processor) is kind
    changed = [
        not same(processor(tokens(width), scores(some)), scores(some)) for width in WIDTHS for some in (12, VOCAB)
    ]
    assert any(changed), "the example has no effect, and shows nothing"
    for name in ("row_wise", "token_free", "place_free"):
        assert EXPERIMENTS[name](processor) == getattr(claimed, name), name
    assert is_cheap(processor) or not claimed.cheap


@pytest.mark.parametrize("kind", CRITERIA, ids=lambda kind: kind.__name__)
def test_criteria_are_what_the_table_says(kind):
    criterion, claimed = EXAMPLES[kind](), PROPERTIES[kind]
    assert is_row_wise(criterion) and claimed.row_wise
    assert is_cheap(criterion) or not claimed.cheap
    if claimed.cheap:
        assert criterion(tokens(8), None).shape == (ROWS,), "it needs no scores"


def test_what_numbers_decide_is_cheap():
    assert all(PROPERTIES[kind].cheap for kind in StoppingRules.KINDS)


LIES = {
    "row_wise": lambda ids, some: some - some.mean(0, keepdim=True),
    "token_free": lambda ids, some: some.index_add(1, ids[0, -1:], torch.ones(len(some), 1)),
    "place_free": lambda ids, some: some + torch.arange(some.shape[1]),
    "cheap": lambda ids, some: torch.stack([row / 2 for row in some]),
}


class Counting(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores * self.calls


@pytest.mark.parametrize("name", LIES)
def test_a_false_claim_shows(name):
    assert not EXPERIMENTS[name](LIES[name])
    assert not is_row_wise(Counting()) and not is_place_free(lambda ids, some: some - some.shape[1])


@pytest.mark.parametrize("claimed", [{"token_free": True}, {"row_wise": True, "place_free": True}, {"cheap": True}])
def test_properties_that_are_of_no_use_alone_are_refused(claimed):
    with pytest.raises(ValueError, match=r"needs \w+=True"):
        Properties(**claimed)


def test_a_processor_without_state_is_not_parted_by_rows():
    with pytest.raises(ValueError, match="has no state to part by rows"):
        Properties(row_wise=True, for_row=lambda processor, row: processor)


def test_properties_are_those_of_the_exact_class():
    class Mine(lp.TemperatureLogitsWarper):
        pass

    assert properties_of(lp.TemperatureLogitsWarper(0.5)) == EVERY and properties_of(Mine(0.5)) == Properties()
    assert shared_properties([]) == EVERY
    some = [lp.TemperatureLogitsWarper(0.5), lp.SuppressTokensLogitsProcessor([1]), lp.MinPLogitsWarper(0.1)]
    assert shared_properties(some) == Properties(row_wise=True, token_free=True, cheap=True)
    assert shared_properties([*some, Mine(0.5)]) == Properties()
    with pytest.raises(TypeError, match="register takes a class"):
        register(lp.TemperatureLogitsWarper(0.5), EVERY)


@pytest.fixture
def table(monkeypatch):
    """The table, as it was again after the test."""
    monkeypatch.setattr(processors, "PROPERTIES", dict(PROPERTIES))


SEEN: list[tuple[int, int, int]] = []  # Of each time that a toy ran: its id, the thread, and the rows.


class Flatten(LogitsProcessor):
    """Pulls all scores towards zero, the large ones more."""

    def __call__(self, input_ids, scores):
        SEEN.append((id(self), threading.get_ident(), len(scores)))
        return scores.sign() * scores.abs().sqrt()


class NotAgain(LogitsProcessor):
    """Keeps rows from repeating their newest token."""

    def __call__(self, input_ids, scores):
        SEEN.append((id(self), threading.get_ident(), len(scores)))
        return scores.scatter(1, input_ids[:, -1:], -5.0)


class EvenEnd(StoppingCriteria):
    """Ends a row with an even token."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 2 == 0


TOYS = {
    "every": (Flatten, EVERY),
    "token_free": (Flatten, Properties(row_wise=True, token_free=True)),
    "cheap": (NotAgain, Properties(row_wise=True, cheap=True)),
    "row_wise": (NotAgain, Properties(row_wise=True)),
}


@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("toy", TOYS)
def test_a_processor_in_the_table_runs_packed(toy, options, table):
    kind, properties = TOYS[toy]
    register(kind, properties)
    compare(pair(), zoo.prompts([13, 4, 30, 9, 21, 1]), logits_processor=LogitsProcessorList([kind()]), **options)


def test_a_processor_outside_the_table_runs_in_transformers_own_loop(table):
    _, paged = pair()
    paged.generate(**zoo.prompts([5, 3]), **LENGTHS, logits_processor=LogitsProcessorList([Flatten()]))
    assert "a processor may look at other rows: Flatten" in hf_paged.stats(paged).fallbacks


@pytest.mark.parametrize("properties", [Properties(row_wise=True), Properties(row_wise=True, cheap=True)], ids=str)
def test_a_criterion_in_the_table_runs_packed(properties, table):
    register(EvenEnd, properties)
    inputs = zoo.prompts([13, 4, 30, 9, 21, 1])
    compare(pair(), inputs, stopping_criteria=StoppingCriteriaList([EvenEnd()]))


class Says(NotAgain):
    """Claims in its own body what holds of it."""

    row_wise = True


class SaysNothing(Says):
    """Inherits the claim, and might compute anything."""


class Grammar(LogitsProcessor):
    """Rules out a third of the vocabulary, another one at each token of a row: it keeps the state of each row."""

    def __init__(self, rows: int):
        self.steps = [0] * rows

    def __call__(self, input_ids, scores):
        parts = [self._rule_out(row, scores[row, None]) for row in range(len(scores))]
        return torch.cat(parts)

    def for_row(self, row):
        return lambda input_ids, scores: self._rule_out(row, scores)

    def _rule_out(self, row, scores):
        assert len(scores) == 1
        self.steps[row] += 1
        third = torch.arange(scores.shape[1]) % 3 == (self.steps[row] + row) % 3
        return scores.masked_fill(third, -float("inf"))


class GrammarOfAnother(Grammar):
    """Inherits the method, which knows nothing of this class."""


class GrammarInTheTable(Grammar):
    """Says nothing, and is entered into the table."""


RAGGED = [13, 4, 30, 9, 21, 1]
SPEAKING = {
    "row_wise": Says,
    "for_row": lambda: Grammar(len(RAGGED)),
    "table": lambda: GrammarInTheTable(len(RAGGED)),
}


@pytest.mark.parametrize("options", [{}, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("how", SPEAKING)
def test_a_class_that_speaks_for_itself_runs_packed(how, options, table):
    make = SPEAKING[how]
    register(GrammarInTheTable, Properties(for_row=Grammar.for_row))
    models, outputs, states = pair(), [], []
    for model in models:
        torch.manual_seed(0)
        processors = LogitsProcessorList([make(), lp.RepetitionPenaltyLogitsProcessor(1.3)])
        outputs.append(model.generate(**zoo.prompts(RAGGED), **LENGTHS, **options, logits_processor=processors))
        states.append(torch.get_rng_state())
    assert torch.equal(*outputs) and torch.equal(*states)
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1 and not stats.fallbacks and stats.page_reads


def test_state_of_a_row_is_made_once_and_only_for_several_rows():
    _, paged = pair()
    made, kept = [], Grammar.for_row
    try:
        Grammar.for_row = lambda self, row: (made.append(row), kept(self, row))[1]
        for rows in (1, 3):
            grammar = Grammar(rows)
            paged.generate(**zoo.prompts([9] * rows), **LENGTHS, logits_processor=LogitsProcessorList([grammar]))
    finally:
        Grammar.for_row = kept
    assert sorted(made) == [0, 1, 2]


@pytest.mark.parametrize("make", [lambda: SaysNothing(), lambda: GrammarOfAnother(2)], ids=["row_wise", "for_row"])
def test_what_a_class_inherits_is_no_claim_of_its_own(make):
    models, processors = pair(), [make(), make()]
    outputs = [
        model.generate(**zoo.prompts([5, 3]), **LENGTHS, logits_processor=LogitsProcessorList([processor]))
        for model, processor in zip(models, processors)
    ]
    assert torch.equal(*outputs)
    name = type(processors[0]).__name__
    assert hf_paged.stats(models[1]).fallbacks == {f"a processor may look at other rows: {name}": 1}


def test_a_criterion_that_speaks_for_itself_ends_its_row_at_once(rows):
    class Even(EvenEnd):
        row_wise = True

    compare(pair(), zoo.prompts(RAGGED), stopping_criteria=StoppingCriteriaList([Even()]))
    alone = sum(rows)
    rows.clear()
    compare(pair(), zoo.prompts(RAGGED), stopping_criteria=StoppingCriteriaList([EvenEnd()]))
    assert alone < sum(rows), "one that is asked about all rows waits for them"


@pytest.mark.parametrize("toy", TOYS)
def test_the_driver_runs_a_cheap_processor_for_other_calls(toy, table):
    kind, properties = TOYS[toy]
    register(kind, properties)
    dense, paged = pair(token_budget=64)
    paged.generate(**zoo.prompts([4]), **LENGTHS)  # The engine is made.
    inputs = [zoo.prompts([length]) for length in (9, 14, 5, 11)]
    toys, callers, together = [kind() for _ in inputs], {}, threading.Barrier(len(inputs))

    def generate(model, index):
        callers[id(toys[index])] = threading.get_ident()
        options = {**LENGTHS, "max_new_tokens": 60, "eos_token_id": None}  # Long enough to meet.
        return model.generate(**inputs[index], **options, logits_processor=LogitsProcessorList([toys[index]]))

    expected = [generate(dense, index) for index in range(len(inputs))]
    SEEN.clear()
    found = in_threads(
        *(lambda index=index: (together.wait(30), generate(paged, index))[1] for index in range(len(inputs)))
    )
    assert all(map(torch.equal, found, expected))
    is_for_others = any(callers[toy] != thread for toy, thread, _ in SEEN)
    is_joint = any(rows > 1 for _, _, rows in SEEN)  # Each call has one row.
    assert is_joint == (properties.cheap and properties.token_free)
    assert (is_for_others or is_joint) == properties.cheap
