"""Answer: the choices of one request, while the engine generates them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig

from hf_paged.execution.home_stream import on_home_stream
from hf_paged.models.placement import devices_of
from hf_paged_integrations.serving.async_engine import AsyncEngine, LoopStreamer, Submission
from hf_paged_integrations.serving.openai.errors import ApiError, as_api_error, draining
from hf_paged_integrations.serving.openai.metrics import Metrics
from hf_paged_integrations.serving.openai.processors import LogprobRecorder, TokenLogprobs
from hf_paged_integrations.serving.openai.sampling import Sampling, end_tokens
from hf_paged_integrations.serving.openai.text import AnswerText

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Piece:
    """The next piece of one choice.

    Attributes
    ----------
    choice : int
    text : str
    logprobs : list of (int, TokenLogprobs)
        Of the tokens that the text is made of, each with the place in the choice's text at which it begins.
    finish_reason : str or None
        Why the choice ends with this piece.
    """

    choice: int
    text: str
    logprobs: list[tuple[int, TokenLogprobs]]
    finish_reason: str | None = None


@dataclass(frozen=True)
class _Event:
    """The next token of a choice, or its end."""

    choice: int
    token: int | None
    logprobs: TokenLogprobs | None = None


class _Streamer(LoopStreamer):
    """Sends the tokens of the rows of one call, a list of events for each step; at last an error of the call."""

    def __init__(self, queue: asyncio.Queue, first_choice: int, recorder: LogprobRecorder | None):
        super().__init__(queue)
        self._first, self._recorder = first_choice, recorder

    def put_rows(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        notes = [None if self._recorder is None else self._recorder.of(row, token) for row, token in zip(rows, tokens)]
        self.send([_Event(self._first + row, token, note) for row, token, note in zip(rows, tokens, notes)])

    def end_rows(self, rows: Sequence[int]) -> None:
        self.send([_Event(self._first + row, None) for row in rows])

    def fail(self, error: BaseException) -> None:
        self.send(error)


class _Choice:
    """One choice: its text, and the tokens whose text is not sent yet."""

    def __init__(self, number: int, tokenizer: Tokenizer, stops: Sequence[str], ends: frozenset[int], limit: int):
        self._number, self._ends, self._limit = number, ends, limit
        self._text = AnswerText(tokenizer, stops)
        self._unsent: list[tuple[int, TokenLogprobs]] = []
        self._reason: str | None = None
        self.num_tokens = 0
        self.is_over = False

    def take(self, event: _Event) -> Piece | None:
        """Take an event; return what can be sent of it.

        Raises
        ------
        ApiError
            If the choice was ended before its end.
        """
        if event.token is None:
            if self._reason is None:
                raise draining()  # What else ends a choice does not wait for it.
            return self._close()
        self.num_tokens += 1
        if event.token in self._ends:
            self._reason = STOP
            return None
        if event.logprobs is not None:
            self._unsent.append((self._text.length, event.logprobs))
        text = self._text.add(event.token)
        if self._text.is_stopped:
            return self._close(text)
        if self.num_tokens == self._limit:
            self._reason = LENGTH
        return self._piece(text, None) if text else None

    def _close(self, text: str = "") -> Piece:
        self.is_over = True
        text += self._text.end()
        if self._text.is_stopped:
            self._unsent = [(place, note) for place, note in self._unsent if place < self._text.length]
        return self._piece(text, STOP if self._text.is_stopped else self._reason)

    def _piece(self, text: str, reason: str | None) -> Piece:
        unsent, self._unsent = self._unsent, []
        return Piece(self._number, text, unsent, reason)


class Answer:
    """The choices of one request: `n` for each of its prompts. The request begins at once.

    Parameters
    ----------
    engine : AsyncEngine
    tokenizer : Tokenizer
    defaults : GenerationConfig
        The model's own.
    prompts : list of (list of int, Sampling)
        The choices of one prompt share its blocks.
    n : int
    stops : list of str
    seconds : float
        After which the request is ended.
    metrics : Metrics

    Raises
    ------
    ApiError
        If the queue is full, or the server shuts down.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        defaults: GenerationConfig,
        prompts: Sequence[tuple[list[int], Sampling]],
        n: int,
        stops: Sequence[str],
        seconds: float,
        metrics: Metrics,
    ):
        self._engine, self._metrics = engine, metrics
        self._queue: asyncio.Queue[list[_Event] | BaseException] = asyncio.Queue()
        self._n, self._submissions = n, list[Submission]()
        ends = frozenset(end_tokens(defaults))
        self._choices = [
            _Choice(number, tokenizer, stops, ends, prompts[number // n][1].max_new_tokens)
            for number in range(n * len(prompts))
        ]
        self.prompt_tokens = sum(len(prompt) for prompt, _ in prompts)
        self._began = time.monotonic()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._queue.put_nowait, _too_slow(seconds))
        try:
            for prompt, sampling in prompts:
                self._submit(prompt, sampling, defaults)
        except Exception as error:
            self.abort()
            raise as_api_error(error) from error
        metrics.prompt_tokens.inc(self.prompt_tokens)

    def _submit(self, prompt: list[int], sampling: Sampling, defaults: GenerationConfig) -> None:
        model = self._engine.model
        recorder = None if sampling.top_logprobs is None else LogprobRecorder(sampling.top_logprobs)
        with on_home_stream(*devices_of(model, model.device)):
            ids = torch.tensor([prompt], device=model.device).expand(self._n, -1).contiguous()  # [n, tokens]
            processors = sampling.processors(len(prompt), ids.device, recorder)
        submission = self._engine.submit(
            ids,
            _Streamer(self._queue, self._n * len(self._submissions), recorder),
            sampling.config(defaults),
            draws_freely=True,
            logits_processor=processors,
        )
        self._submissions.append(submission)

    @property
    def num_choices(self) -> int:
        """Choices of all prompts."""
        return len(self._choices)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, those that end a choice included."""
        return sum(choice.num_tokens for choice in self._choices)

    def abort(self) -> None:
        """End the request; its blocks are free within a step."""
        self._timer.cancel()
        for submission in self._submissions:
            submission.abort()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Iterate over the pieces of all choices as they come. Closing the iterator ends the request.

        Raises
        ------
        ApiError
            If the request cannot be answered to its end.
        """
        watch = self._metrics.watch(self._began, len(self._choices))
        try:
            while not all(choice.is_over for choice in self._choices):
                events = await self._queue.get()
                if isinstance(events, BaseException):
                    raise as_api_error(events)
                for event in events:
                    choice = self._choices[event.choice]
                    if choice.is_over:
                        continue
                    if event.token is not None:
                        watch.token(event.choice)
                    piece = choice.take(event)
                    if choice.is_over:
                        self._let_go(event.choice)
                    if piece is not None:
                        yield piece
        except ApiError:
            self._metrics.failures.inc()
            raise
        finally:
            self.abort()
            self._metrics.generation_tokens.inc(self.completion_tokens)

    def _let_go(self, choice: int) -> None:
        """End the row of a choice that is over. That of a stop text would run on."""
        submission = self._submissions[choice // self._n]
        submission.streamer.gone.add(choice % self._n)
        first = choice - choice % self._n
        if all(one.is_over for one in self._choices[first : first + self._n]):
            submission.abort()

    async def whole(self) -> list[Piece]:
        """Return each choice as one piece, when all are there."""
        found: list[list[Piece]] = [[] for _ in self._choices]
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                found[piece.choice].append(piece)
        return [
            Piece(
                number,
                "".join(piece.text for piece in parts),
                [note for piece in parts for note in piece.logprobs],
                parts[-1].finish_reason,
            )
            for number, parts in enumerate(found)
        ]


def _too_slow(seconds: float) -> ApiError:
    text = f"the request was ended after {seconds:g} seconds: ask for fewer tokens, or send it when less is running"
    return ApiError(504, text, code="timeout", headers={"x-should-retry": "false"})
