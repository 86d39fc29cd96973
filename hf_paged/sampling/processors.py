"""The table of logits processors and stopping criteria, and what packed steps may assume of each.

Dense ``generate`` shows a processor every row of a batch at the same step, and pads and finished rows with them. In
packed steps rows of one call are at different steps, and rows of several calls meet in one tensor. Where a processor
may run depends on its `Properties`. The exact class counts, for a derived class may compute anything.

A class that is not in the table has no properties. A call of one row runs packed all the same: its caller's thread
calls processors and criteria as dense does. So does a call of several rows whose criteria are not in the table, which
are asked about all rows together (`Lockstep`). A call of several rows with such a processor runs in transformers' own
loop.

A class may say of itself, without an import of hf_paged, that it treats each row by itself:

* ``row_wise = True`` in its body: `Properties.row_wise` holds.
* a method ``for_row(self, row)``: it keeps state for each row, see `Properties.for_row`.

All else is a line in the table, here or anywhere before the call:

>>> from transformers import LogitsProcessor
>>> class Halve(LogitsProcessor):
...     def __call__(self, input_ids, scores):
...         return scores / 2
>>> register(Halve, Properties(row_wise=True, token_free=True, place_free=True, cheap=True))

``tests/sampling/test_processors.py`` checks every entry by experiment and wants an example of each.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import logits_process, stopping_criteria

from hf_paged.sampling.cancellation import Cancellation

# (tokens ``[rows, positions]``, scores ``[rows, vocab]``) -> scores ``[rows, vocab]``.
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Properties:
    """Facts about every instance of a class of processors or criteria. A wrong claim costs wrong tokens.

    Of a criterion only `row_wise` and `cheap` count.

    Attributes
    ----------
    row_wise : bool
        The result for a row depends on the tokens and the scores of this row alone: it is the same alone, beside any
        other rows, and at a second try. The instance counts no calls and keeps nothing of them. (A criterion may ask
        the clock, or a flag that ends the call.) Calls run packed; the processor sees some rows of its call at a time,
        those that have the same number of tokens.
    token_free : bool
        The result does not depend on the tokens so far. The tokens that the processor is given may be those of an
        earlier step, or ``[rows, 0]``. Rows at different steps are processed at once, and so are those of several
        calls whose processors have equal attributes: these hold all settings. Needs `row_wise`.
    place_free : bool
        A row's scores count as a set. In a permuted vocabulary the result is permuted likewise, up to the choice among
        equal scores; and tokens whose score is -inf may be left out, which changes no other result. After top-k the
        processor sees the tokens that top-k leaves, by falling score, instead of the vocabulary. Needs `token_free`.
    cheap : bool
        The result takes a few tensor operations, as many for a thousand rows as for two, and no loop over rows. The
        class runs no callback, model or tokenizer, and waits for nothing. The thread that drives the steps runs it for
        the calls of other threads. A criterion is asked in an atomic section, and looks at no scores. Needs `row_wise`.
    for_row : callable or None
        For a class of processors that is not `row_wise` only because it keeps state for each row: returns, of an
        instance and the number of a row in the batch, the processor of that row alone. It is asked once for each row
        of a call. What it returns gets ``[1, positions]`` and ``[1, vocab]``, in the caller's thread, once for each
        token of its row and in their order, and not after the row's end.
    """

    row_wise: bool = False
    token_free: bool = False
    place_free: bool = False
    cheap: bool = False
    for_row: Callable[[Any, int], Processor] | None = None

    def __post_init__(self):
        for name, needed in (("token_free", "row_wise"), ("place_free", "token_free"), ("cheap", "row_wise")):
            if getattr(self, name) and not getattr(self, needed):
                raise ValueError(f"Properties({name}=True) needs {needed}=True: it is of no use without")
        if self.row_wise and self.for_row is not None:
            raise ValueError(
                "Properties(row_wise=True, for_row=...): a row-wise processor has no state to part by rows"
            )


_EVERY = Properties(row_wise=True, token_free=True, place_free=True, cheap=True)
_NAMED_TOKENS = Properties(row_wise=True, token_free=True, cheap=True)
_TOKENS_SO_FAR = Properties(row_wise=True, cheap=True)
_SLOW = Properties(row_wise=True)

PROPERTIES: dict[type, Properties] = {
    # They scale a row's scores, or cut off some of them.
    logits_process.EpsilonLogitsWarper: _EVERY,
    logits_process.EtaLogitsWarper: _EVERY,
    logits_process.InfNanRemoveLogitsProcessor: _EVERY,
    logits_process.LogitNormalization: _EVERY,
    logits_process.MinPLogitsWarper: _EVERY,
    logits_process.TemperatureLogitsWarper: _EVERY,
    logits_process.TopHLogitsWarper: _EVERY,
    logits_process.TopKLogitsWarper: _EVERY,
    logits_process.TopPLogitsWarper: _EVERY,
    logits_process.TypicalLogitsWarper: _EVERY,
    # They name tokens of the vocabulary.
    logits_process.SuppressTokensLogitsProcessor: _NAMED_TOKENS,
    # They look at the tokens so far, or count them.
    logits_process.ExponentialDecayLengthPenalty: _TOKENS_SO_FAR,
    logits_process.ForcedBOSTokenLogitsProcessor: _TOKENS_SO_FAR,
    logits_process.ForcedEOSTokenLogitsProcessor: _TOKENS_SO_FAR,
    logits_process.MinLengthLogitsProcessor: _TOKENS_SO_FAR,
    logits_process.MinNewTokensLengthLogitsProcessor: _TOKENS_SO_FAR,
    # Its `prompt_ignore_length` may hold a number per row of the batch: `GenerateCall` selects those of the rows.
    logits_process.RepetitionPenaltyLogitsProcessor: _TOKENS_SO_FAR,
    logits_process.SuppressTokensAtBeginLogitsProcessor: _TOKENS_SO_FAR,
    # Their work in Python grows with the rows, or with the sequences that they were given.
    logits_process.NoBadWordsLogitsProcessor: _SLOW,
    logits_process.NoRepeatNGramLogitsProcessor: _SLOW,
    logits_process.SequenceBiasLogitsProcessor: _SLOW,
    # Criteria; `StoppingRules` decides these from numbers.
    Cancellation: _TOKENS_SO_FAR,
    stopping_criteria.EosTokenCriteria: _TOKENS_SO_FAR,
    stopping_criteria.MaxLengthCriteria: _TOKENS_SO_FAR,
    stopping_criteria.MaxTimeCriteria: _TOKENS_SO_FAR,
    stopping_criteria.StopStringCriteria: _SLOW,
}
_NONE = Properties()


def register(kind: type[LogitsProcessor] | type[StoppingCriteria], properties: Properties) -> None:
    """Enter a class into the table, for calls that begin from now on. A second entry replaces the first.

    Parameters
    ----------
    kind : type
        A class of processors or criteria. Derived classes need entries of their own.
    properties : Properties
        What holds of each of its instances.

    Raises
    ------
    TypeError
        If `kind` is no class.
    """
    if not isinstance(kind, type):
        raise TypeError(f"register takes a class of processors or criteria, got {kind!r}: pass its class")
    PROPERTIES[kind] = properties


def properties_of(processor: object) -> Properties:
    """Return what the table says of the class of a processor or criterion or, if nothing, the class itself."""
    known = PROPERTIES.get(type(processor))
    return _claims_of(type(processor)) if known is None else known


def _claims_of(kind: type) -> Properties:
    """Return what a class says in its own body. What it inherits was said of another class."""
    own = vars(kind)
    if own.get("row_wise") is True:
        return _SLOW
    for_row = own.get("for_row")
    return Properties(for_row=for_row) if callable(for_row) else _NONE


def is_by_row(processor: object) -> bool:
    """Tell whether a processor treats each row of a batch by itself, with state of its own or without."""
    properties = properties_of(processor)
    return properties.row_wise or properties.for_row is not None


def processor_of_row(processor: Any, row: int) -> Processor:
    """Return the processor that treats one row as `processor` treats it in its batch."""
    for_row = properties_of(processor).for_row
    return processor if for_row is None else for_row(processor, row)


def shared_properties(processors: Iterable[object]) -> Properties:
    """Return the properties that all of some processors or criteria have; of none of them, every property."""
    return _intersection(frozenset(map(properties_of, processors)))


@functools.cache
def _intersection(some: frozenset[Properties]) -> Properties:
    return Properties(
        row_wise=all(one.row_wise for one in some),
        token_free=all(one.token_free for one in some),
        place_free=all(one.place_free for one in some),
        cheap=all(one.cheap for one in some),
    )


def apply_token_free(processors: Iterable[Processor], scores: torch.Tensor) -> torch.Tensor:
    """Apply token-free processors, in turn.

    Parameters
    ----------
    processors : iterable of Processor
    scores : torch.Tensor
        ``[rows, vocab]``. A processor may write to it.

    Returns
    -------
    torch.Tensor
        ``[rows, vocab]``
    """
    no_tokens = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)  # [rows, 0]
    for processor in processors:
        scores = processor(no_tokens, scores)
    return scores
