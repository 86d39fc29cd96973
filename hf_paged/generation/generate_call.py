"""GenerateCall: one call of ``generate`` as its caller sees it: rows in, logits to tokens, tokens out."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import LogitsProcessorList

from hf_paged.cache.duplicate_rows import first_equal_rows
from hf_paged.compat.transformers import pad_token
from hf_paged.errors import OutOfBlocksError
from hf_paged.generation.call_tokens import CallTokens
from hf_paged.memory.block_pool import BlockPool
from hf_paged.sampling import categorical
from hf_paged.sampling.cancellation import Cancellation
from hf_paged.sampling.lockstep import Lockstep
from hf_paged.sampling.next_tokens import NextTokens, check, read
from hf_paged.sampling.processors import apply_token_free, processor_of_row, shared_properties
from hf_paged.sampling.rng_replay import Draws, ReplayedNoise, draws_of, is_replaying
from hf_paged.sampling.row_picker import RowPicker
from hf_paged.sampling.row_streamer import RowStreamer
from hf_paged.sampling.sampler import Sampler
from hf_paged.sampling.stopping import StoppingRules
from hf_paged.scheduling.request import Request


@dataclass(frozen=True)
class Choice:
    """Next tokens of some rows of a call, not noted yet.

    Attributes
    ----------
    tokens : NextTokens
    numbers : list of int or None
        The tokens on the host, as `next_tokens.read` returns them; None: they were not read yet.
    scores, logits : torch.Tensor or None
        ``[rows, vocab]``; None where the call has no use for them.
    """

    tokens: NextTokens
    numbers: list[int] | None = None
    scores: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def read(self) -> list[int]:
        """Return the tokens as numbers; waits for the device if they were not read yet.

        Raises
        ------
        RuntimeError
            If the scores of a row were no distribution to sample from.
        """
        (numbers,) = read([self.tokens]) if self.numbers is None else (self.numbers,)
        check(numbers)
        return numbers

    def of(self, places: Sequence[int]) -> "Choice":
        """The choice of some of the rows, of which neither scores nor logits are kept. Its numbers were read before."""
        assert self.numbers is not None, "rows that have ended are known when tokens are read"
        return Choice(self.tokens.of(places), [self.numbers[place] for place in places])


def read_choices(choices: Sequence[Choice]) -> list[Choice]:
    """Return choices with their numbers: those of all calls are brought to the host at once."""
    found = read([choice.tokens for choice in choices])
    return [replace(choice, numbers=numbers) for choice, numbers in zip(choices, found)]


class GenerateCall:
    """The rows of one call, its processors and criteria, and its share of the random numbers.

    A row's next token takes two halves. `choose` computes it, in the caller's thread or, if the call is quick, in that
    of the call that drives the engine; it changes nothing that a second try would not change alike. `accept` notes it,
    in the caller's thread or, if the call is quick, in an atomic section. Processors see a row's tokens so far as in
    dense ``generate``: pads on the left, then the prompt, then what was generated.

    Of a lone row the processors may be of any kind: they are called as dense calls them, once a step. The criteria may
    be of any kind: those that the table does not know are asked in `Lockstep`.

    Parameters
    ----------
    input_ids : torch.Tensor
        ``[batch, positions]`` integers, left-padded.
    valid : torch.Tensor or None
        ``[batch, positions]`` bool, False at padding; None: no padding.
    processors, criteria, generation_config, streamer
        As ``GenerationMixin._sample`` gets them.
    pools : list of BlockPool
        One per KV cache group.
    cache : DynamicCache or None
        A cache of the caller's, empty so far: it gets the blocks of the call's only row when that is finished.

    Attributes
    ----------
    requests : list of Request
        The rows, in the order of the batch.
    distinct_requests : list of Request
        Those to queue: the first row of each prompt. Its duplicates start over its blocks.
    failures : list of OutOfBlocksError
        One for each row that the pool could not hold.
    is_quick : bool
        Whether another call's thread may choose for this one: nothing of the caller's runs, nothing is slow.
    sampler : Sampler or None
        How tokens are chosen together with those of other calls, if they can be.
    can_run_ahead : bool
        Whether a row's next token may be chosen while the host does not know its last one: nothing but logits decides,
        and nothing but numbers says that a row ends.
    logits, scores : tuple of torch.Tensor or None
        ``[1, vocab]`` for each token of a lone row, where the call returns them.
    """

    def __init__(
        self, input_ids, valid, processors, criteria, generation_config, streamer, pools: list[BlockPool], cache=None
    ):
        self._ids_type = input_ids.dtype  # Of the prompt: dense goes on with int64.
        self.input_ids, self.streamer, self.cache = input_ids.long(), streamer, cache
        self._processors, self._criteria = processors, criteria
        self._of_processors = shared_properties(processors)
        self._of_criteria = shared_properties(criteria)
        self._stopping_rules = StoppingRules(criteria) if StoppingRules.KINDS.issuperset(map(type, criteria)) else None
        self._do_sample, pad = generation_config.do_sample, pad_token(generation_config)
        self._pad = 0 if pad is None else int(pad)
        returns = generation_config.return_dict_in_generate
        self.logits: tuple[torch.Tensor, ...] | None = () if returns and generation_config.output_logits else None
        self.scores: tuple[torch.Tensor, ...] | None = () if returns and generation_config.output_scores else None
        self._replayed_noise: ReplayedNoise | None = None
        device = input_ids.device
        self._is_replaying = bool(self._do_sample) and is_replaying() and draws_of(device) is not Draws.UNKNOWN
        self._picker = RowPicker(device)
        prompts = (
            input_ids.tolist()
            if valid is None
            else [ids[keep].tolist() for ids, keep in zip(input_ids.cpu(), valid.cpu())]
        )
        self.requests = [Request(tokens, pools) for tokens in prompts]
        self._row_of = {request: row for row, request in enumerate(self.requests)}
        self.distinct_requests = self._join_duplicates(first_equal_rows(input_ids, valid))
        self._width = input_ids.shape[1]
        self._open = set(range(len(input_ids)))
        self._lockstep = self._make_lockstep()
        are_judged = self._lockstep is not None or self._stopping_rules is None
        are_read = are_judged or not self._of_processors.token_free
        room = (generation_config.max_length or 0) - self._width
        self._tokens = CallTokens(self.input_ids, self._pad, room, are_read)
        self._row_processors: dict[int, LogitsProcessorList] = {}  # Of rows whose processors keep state.
        self._has_chosen = False
        self.failures: list[OutOfBlocksError] = []

        self._row_streamer = streamer if isinstance(streamer, RowStreamer) else None
        is_cheap = self._of_processors.cheap and self._of_criteria.cheap and self._lockstep is None
        self.is_quick = streamer is self._row_streamer and is_cheap
        self.sampler = self._make_sampler()
        self._cancellations = [criterion for criterion in criteria if isinstance(criterion, Cancellation)]
        # The cache's owner may write to the blocks of a row as soon as it has ended.
        self.can_run_ahead = self.sampler is not None and self._stopping_rules is not None and cache is None

    def _make_lockstep(self) -> Lockstep | None:
        """How the criteria are asked about all rows together; None if each row ends by itself."""
        has_end_token = any(hasattr(criterion, "eos_token_id") for criterion in self._criteria)
        kinds = {type(criterion) for criterion in self._criteria} - {Cancellation}
        goes_on = len(self._open) > 1 and not has_end_token and len(kinds) > 1  # Without pads, past its own end.
        if self._of_criteria.row_wise and not goes_on:
            return None
        return Lockstep(self._criteria, self._open)

    def _make_sampler(self) -> Sampler | None:
        """How the driver may choose tokens for this call, together with others; None if only it itself can."""
        is_plain = self._of_processors.token_free and self.logits is None and self.scores is None
        if not (self.is_quick and is_plain):
            return None
        return Sampler.of(self._processors, self._do_sample, self.input_ids.device, self._is_replaying)

    def _join_duplicates(self, duplicate_of: list[int] | None) -> list[Request]:
        """Note rows as duplicates of the first row with the same prompt. Returns these first rows."""
        distinct = []
        for row, request in enumerate(self.requests):
            first = row if duplicate_of is None else duplicate_of[row]
            if first == row:
                distinct.append(request)
            else:
                self.requests[first].duplicates.append(request)
        return distinct

    @property
    def _counts(self) -> list[int]:
        """Tokens generated, by row."""
        return self._tokens.counts

    @property
    def is_done(self) -> bool:
        """Tell whether every row is finished or has failed."""
        return not self._open

    @property
    def is_cancelled(self) -> bool:
        """Tell whether the call shall end with the tokens that it has."""
        is_closed = self._row_streamer is not None and self._row_streamer.is_closed
        return is_closed or any(cancellation.is_cancelled for cancellation in self._cancellations)

    def cancel(self) -> None:
        """End all rows."""
        self._open.clear()

    @property
    def has_begun(self) -> bool:
        """Tell whether processors were called or a token sampled: the call cannot start anew in another loop."""
        return self._has_chosen or any(self._counts)

    def fail(self, request: Request, error: OutOfBlocksError) -> None:
        """Note that a row and its duplicates cannot go on."""
        for lost in (request, *request.duplicates):
            self._open.discard(self._row_of[lost])
            self.failures.append(error)
        if self._lockstep is not None and not self._lockstep.has_running_rows:
            self._open.clear()  # Nothing comes that would ask about the others, and the call raises.

    def may_go_on(self, request: Request) -> bool:
        """Tell whether a row whose next token is chosen, but not accepted, may need one more: it is not full then."""
        assert self._stopping_rules is not None, "asked of calls that run ahead"
        length = self._width + self._counts[self._row_of[request]] + 1
        return self._stopping_rules.max_length is None or length < self._stopping_rules.max_length

    def by_place(self, requests: Iterable[Request]) -> list[Request]:
        """Some rows in the order in which the batch has them."""
        return sorted(requests, key=self._row_of.__getitem__)

    def choose(self, requests: list[Request], logits: torch.Tensor) -> Choice:
        """Choose the next token of some rows.

        Parameters
        ----------
        requests : list of Request
            In the order of the batch. Not changed.
        logits : torch.Tensor
            ``[len(requests), vocab]``, not changed.
        """
        self._has_chosen = True
        with torch.inference_mode(False), torch.no_grad():
            rows = [self._row_of[request] for request in requests]
            if self._lockstep is None or self._open.issuperset(rows):
                return self._choose(rows, logits)
            # Rows that were ahead have ended meanwhile: nothing is called for them, and no random number is theirs.
            places = [place for place, row in enumerate(rows) if row in self._open]
            if not places:
                return Choice(NextTokens(self.input_ids.new_full((len(rows),), self._pad)))
            chosen = self._choose([rows[place] for place in places], self._picker.take(logits, places)).tokens
            # Of the other rows nothing is noted: the first token serves as well as any.
            index = {place: number for number, place in enumerate(places)}
            back = [index.get(place, 0) for place in range(len(rows))]
            is_valid = None if chosen.is_valid is None else self._picker.take(chosen.is_valid, back)
            return Choice(NextTokens(self._picker.take(chosen.ids, back), is_valid))

    def _choose(self, rows: list[int], logits: torch.Tensor) -> Choice:
        logits = logits.to(device=self.input_ids.device, dtype=torch.float32, copy=True)
        scores = self._process(rows, logits)
        tokens = self._sample(rows, scores) if self._do_sample else NextTokens(categorical.argmax(scores))
        return Choice(tokens, None, scores, logits)

    def accept(self, requests: list[Request], choice: Choice) -> list[tuple[Request, int | None]]:
        """Note the next tokens of some rows: tell the streamer, judge which rows end.

        Parameters
        ----------
        requests : list of Request
            Those that were chosen for. Not changed: the engine hands them their tokens.

        Returns
        -------
        list of (Request, token)
            None for a row that is finished.
        """
        rows, numbers = [self._row_of[request] for request in requests], choice.read()
        if self.logits is not None:
            assert choice.logits is not None, "a call that returns logits makes every choice with them"
            self.logits += (choice.logits,)
        if self.scores is not None:
            assert choice.scores is not None, "a call that returns scores makes every choice with them"
            self.scores += (choice.scores,)
        with torch.inference_mode(False), torch.no_grad():
            if self._lockstep is not None:
                chosen, finished = self._accept_in_lockstep(rows, choice.tokens.ids, numbers)
            else:
                chosen = numbers
                self._tokens.append(rows, choice.tokens.ids, numbers)
                finished = self._finished(rows, numbers)
                self._open -= {row for row, is_over in zip(rows, finished) if is_over}
            if self.streamer is not self._row_streamer:
                # After the criteria, as dense does: one that raises comes first.
                self.streamer.put(torch.tensor(numbers))
        if self._row_streamer is not None and self._lockstep is None:
            self._row_streamer.tell(rows, chosen, [row for row, over in zip(rows, finished) if over])
        if self._replayed_noise is not None and self._open:
            self._replayed_noise.forget_before(min(self._counts[row] for row in self._open))
        return [(request, None if over else token) for request, token, over in zip(requests, chosen, finished)]

    def _accept_in_lockstep(
        self, rows: list[int], tokens: torch.Tensor, numbers: list[int]
    ) -> tuple[list[int], list[bool]]:
        """Note tokens, and ask the criteria about all that every row has: the tokens, and which rows need no more.

        A criterion may have written to the tokens: then the model goes on with what it wrote.
        """
        lockstep = self._lockstep
        assert lockstep is not None
        places = [place for place, row in enumerate(rows) if row in self._open]  # Others were ahead, and have ended.
        taken = [rows[place] for place in places]
        if taken:
            taken_numbers = [numbers[place] for place in places]
            self._tokens.append(taken, self._picker.take(tokens, places), taken_numbers)
            lengths = [self._width + self._counts[row] for row in taken]
            lockstep.stop(taken, taken_numbers, lengths)
        for count, told, ended in lockstep.judge(self._counts, self._are_over):
            if self._row_streamer is not None:
                newest = self._tokens.ids[told, self._width + count - 1].tolist()
                self._row_streamer.tell(told, newest, ended)
            if lockstep.writes_pads and ended:
                self._tokens.ids[ended, self._width + count :] = self._pad
        newest = self._tokens.ids[rows, [self._width + self._counts[row] - 1 for row in rows]].tolist()
        return newest, [not lockstep.runs(row) for row in rows]

    def _are_over(self, count: int) -> list[bool]:
        """Which rows of the batch are over with so many tokens, as the criteria or the streamer say."""
        over = self._ask(self._criteria, count, self.scores).tolist()
        if self._row_streamer is not None:
            over = [is_over or self._row_streamer.is_gone(row) for row, is_over in enumerate(over)]
        return over

    def _ask(self, hooks, count: int, scores) -> torch.Tensor:
        """Call processors or criteria about the whole batch as dense does, with tokens that they may write to."""
        columns = slice(0, self._width + count)
        ids = self._tokens.ids[:, columns].to(torch.long if count else self._ids_type, copy=True)
        result = hooks(ids, scores)
        self._tokens.ids[:, columns] = ids
        return result

    def _for_each(self, counts: list[int], compute: Callable[[int, list[int]], torch.Tensor]) -> torch.Tensor:
        """Compute a value of each of some rows, those that have generated as many tokens at once.

        Parameters
        ----------
        counts : list of int
            Tokens that each row has generated.
        compute : callable
            Of a number of tokens, and of the places in `counts` of the rows with so many: ``[len(places), ...]``.

        Returns
        -------
        torch.Tensor
            ``[len(counts), ...]``
        """
        groups = _places_of(counts)
        parts = [compute(count, groups[count]) for count in sorted(groups)]
        if len(parts) == 1:
            return parts[0]
        order = [place for count in sorted(groups) for place in groups[count]]
        return self._picker.take(torch.cat(parts), sorted(range(len(order)), key=order.__getitem__))

    def _process(self, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        if not self._processors:
            return logits
        if self._of_processors.token_free:
            return apply_token_free(self._processors, logits)
        if len(self.input_ids) == 1 and not self._of_processors.row_wise:
            return self._ask(self._processors, self._counts[0], logits)
        if not self._of_processors.row_wise:
            parts = [
                self._processors_of_row(row)(self._tokens.of_rows([row], self._counts[row]), logits[place : place + 1])
                for place, row in enumerate(rows)
            ]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        def process(count: int, places: list[int]) -> torch.Tensor:
            some = [rows[place] for place in places]
            return self._processors_of(some)(self._tokens.of_rows(some, count), self._picker.take(logits, places))

        return self._for_each([self._counts[row] for row in rows], process)

    def _processors_of(self, rows: list[int]):
        """The processors as they treat a few rows: one of them holds a number for each row of the batch."""
        parts = LogitsProcessorList()
        for processor in self._processors:
            ignored = getattr(processor, "prompt_ignore_length", None)
            if isinstance(ignored, torch.Tensor) and len(rows) < len(ignored):
                processor = copy.copy(processor)
                processor.prompt_ignore_length = ignored[rows]
            parts.append(processor)
        return parts

    def _processors_of_row(self, row: int):
        """The processors of one row alone, some of which keep state for it."""
        if row not in self._row_processors:
            parts = self._processors_of([row])
            self._row_processors[row] = LogitsProcessorList(processor_of_row(one, row) for one in parts)
        return self._row_processors[row]

    def _sample(self, rows: list[int], scores: torch.Tensor) -> NextTokens:
        probabilities = scores.softmax(dim=-1)
        if not self._is_replaying:
            return categorical.sample(probabilities)
        return categorical.sample_with(probabilities, self.noise([self.requests[row] for row in rows], probabilities))

    def noise(self, requests: list[Request], probabilities: torch.Tensor) -> torch.Tensor:
        """Draw the noise that dense would draw for the next token of some rows.

        Parameters
        ----------
        requests : list of Request
            In the order of the batch.
        probabilities : torch.Tensor
            ``[len(requests), vocab]``, not looked at.

        Returns
        -------
        torch.Tensor
            ``[len(requests), vocab]``, of the same dtype and device.
        """
        self._has_chosen = True
        if self._replayed_noise is None:
            batch, vocab = len(self.input_ids), probabilities.shape[1]
            self._replayed_noise = ReplayedNoise(batch, vocab, probabilities.dtype, probabilities.device)
        noise = self._replayed_noise

        def draw(count: int, places: list[int]) -> torch.Tensor:
            return noise.rows(count, [self._row_of[requests[place]] for place in places])

        return self._for_each([request.num_tokens - request.num_prompt_tokens for request in requests], draw)

    def _finished(self, rows: list[int], tokens: list[int]) -> list[bool]:
        if self._stopping_rules is not None:
            finished = self._stopping_rules.are_over(tokens, [self._width + self._counts[row] for row in rows])
        else:
            finished = self._judged(rows)
        if self._row_streamer is not None:
            finished = [over or self._row_streamer.is_gone(row) for over, row in zip(finished, rows)]
        return finished

    def _judged(self, rows: list[int]) -> list[bool]:
        """Which rows end, as the criteria say of rows with as many tokens each."""
        finished = [False] * len(rows)
        for count, indices in _places_of([self._counts[row] for row in rows]).items():
            chosen = [rows[index] for index in indices]
            over = self._criteria(self._tokens.of_rows(chosen, count), self.scores)
            for index, is_over in zip(indices, over.tolist()):
                finished[index] = is_over
        return finished

    def close(self) -> torch.Tensor:
        """End the call and return its tokens as dense ``generate`` does, ``[batch, positions + longest]``.

        Raises
        ------
        OutOfBlocksError
            If the pool could not hold some rows; the tokens of all rows are in its `sequences`.
        """
        end = None if self._lockstep is None else self._lockstep.end
        longest = max(self._counts) if end is None else end
        if self._replayed_noise is not None:
            self._replayed_noise.close(longest)
        if self.streamer is not None and not (self.failures and self._row_streamer):
            self.streamer.end()  # One that knows rows is told of the error instead.
        sequences = self._tokens.rectangle(longest)
        if self.failures:
            error = max(self.failures, key=lambda error: error.needed)
            error.sequences = sequences
            raise error
        return sequences


def _places_of(counts: Sequence[int]) -> dict[int, list[int]]:
    """Return the places of each number."""
    places: dict[int, list[int]] = {}
    for place, count in enumerate(counts):
        places.setdefault(count, []).append(place)
    return places
