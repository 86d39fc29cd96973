"""AsyncEngine: an asyncio front of a model's engine, ``async for`` over the tokens of a request.

Thin on purpose: a request is a ``generate`` call in a thread of its own, so every option means what it means there, and
requests share steps and blocks with each other and with plain calls.
"""

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_paged.errors import PagedError
from hf_paged.execution.home_stream import on_home_stream
from hf_paged.models.placement import devices_of
from hf_paged.sampling.rng_replay import no_replay
from hf_paged.sampling.row_streamer import RowStreamer


class QueueFullError(PagedError):
    """A request was refused because too many wait already.

    Attributes
    ----------
    waiting, running : int
        Requests that wait, and that run.
    """

    def __init__(self, waiting: int, running: int):
        self.waiting, self.running = waiting, running
        super().__init__(
            f"the queue is full: {waiting} requests wait and {running} run; send this one again when some have "
            "ended, or make the AsyncEngine with a larger max_queue"
        )


class EngineClosedError(PagedError):
    """A request came after the shutdown had begun."""


class LoopStreamer(RowStreamer):
    """Base of streamers that carry what a call generates from its threads to an event loop.

    A subclass calls `send`, in any thread.

    Parameters
    ----------
    queue : asyncio.Queue
        Gets what is sent. It is read in the event loop that runs now.
    """

    def __init__(self, queue: asyncio.Queue):
        super().__init__()
        self.queue, self._loop = queue, asyncio.get_running_loop()

    def send(self, *items) -> None:
        """Put items into the queue, in their order."""
        try:
            for item in items:
                self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # The loop is closed: the consumer is gone.
            self.close()


class _RequestStreamer(LoopStreamer):
    """Sends the tokens of one row, and at last an error of the call, or None."""

    def begin(self, prompts: torch.Tensor) -> None:
        if len(prompts) != 1:
            raise ValueError(f"a stream carries one answer, got {len(prompts)}: leave num_return_sequences out")

    def put_rows(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        self.send(*tokens)

    def end_rows(self, rows: Sequence[int]) -> None:
        self.send(None)

    def fail(self, error: BaseException) -> None:
        self.send(error)


class Submission:
    """A request on its way. Made by `AsyncEngine.submit`.

    Attributes
    ----------
    streamer : RowStreamer
        Gets the tokens, and the error of the call.
    """

    def __init__(self, streamer: RowStreamer, future: Future, rows: int):
        self.streamer, self._future, self._rows = streamer, future, rows

    def abort(self) -> None:
        """End the request; its blocks are free within a step. Its rows end with the tokens that they have."""
        self.streamer.close()
        if self._future.cancel():  # It never ran: it will not end its rows.
            self.streamer.end_rows(range(self._rows))


class TokenStream:
    """The tokens of one request, an async iterator of int. Made by `AsyncEngine.stream`.

    The request is aborted when the stream is dropped, and when the task that waits for a token is cancelled.
    """

    def __init__(self, streamer: _RequestStreamer, submission: Submission):
        self._streamer, self._submission, self._is_over = streamer, submission, False

    def abort(self) -> None:
        """End the request; its blocks are free within a step. The tokens that came before can still be read."""
        self._submission.abort()

    def __del__(self):
        self.abort()

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> int:
        if self._is_over:
            raise StopAsyncIteration
        try:
            item = await self._streamer.queue.get()
        except asyncio.CancelledError:
            self.abort()
            raise
        if isinstance(item, int):
            return item
        self._is_over = True
        if item is None:
            raise StopAsyncIteration
        try:
            raise item
        finally:
            del item  # The traceback holds this frame: no cycle.


class AsyncEngine:
    """Runs requests on a "paged" model, many at once.

    Parameters
    ----------
    model : PreTrainedModel
    max_running : int
        Requests that run at the same time, each in a thread. More wait, first come, first served.
    max_queue : int
        Requests that may wait. One more is refused.

    Raises
    ------
    ValueError
        If one of the numbers is out of range.

    Examples
    --------
    >>> async with AsyncEngine(model, max_queue=100) as engine:  # doctest: +SKIP
    ...     async for token in engine.stream(input_ids, max_new_tokens=64):
    ...         print(tokenizer.decode(token), end="", flush=True)
    """

    def __init__(self, model: PreTrainedModel, max_running: int = 32, max_queue: int = 100):
        if max_running < 1 or max_queue < 0:
            raise ValueError(
                f"max_running must be at least 1 and max_queue at least 0; got {max_running} and {max_queue}"
            )
        self.model, self.max_running, self.max_queue = model, max_running, max_queue
        self._threads = ThreadPoolExecutor(max_running, thread_name_prefix="hf_paged-serve")
        self._requests: dict[Future, Submission] = {}
        self._is_closed = False

    @property
    def num_running(self) -> int:
        """Requests that have a thread."""
        return min(len(self._requests), self.max_running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a thread."""
        return len(self._requests) - self.num_running

    @property
    def is_full(self) -> bool:
        """Tell whether the next request would be refused."""
        return len(self._requests) >= self.max_running + self.max_queue

    def stream(
        self,
        input_ids: Sequence[int] | torch.Tensor,
        generation_config: GenerationConfig | None = None,
        **options,
    ) -> TokenStream:
        """Begin a request, now; its tokens come without the prompt. Call it where an event loop runs.

        Parameters
        ----------
        input_ids : sequence of int or torch.Tensor
            One prompt, ``[tokens]`` or ``[1, tokens]``.
        generation_config, **options
            As for ``model.generate``.

        Returns
        -------
        TokenStream
            Raises what ``generate`` raises.

        Raises
        ------
        QueueFullError
            If `max_queue` requests wait already.
        EngineClosedError
            If the engine is shut down.
        ValueError
            If there is not exactly one prompt.
        """
        streamer = _RequestStreamer(asyncio.Queue())
        ids = self._as_prompt(input_ids)
        return TokenStream(streamer, self.submit(ids, streamer, generation_config, **options))

    def submit(
        self,
        input_ids: torch.Tensor,
        streamer: RowStreamer,
        generation_config: GenerationConfig | None = None,
        *,
        draws_freely: bool = False,
        **options,
    ) -> Submission:
        """Begin a request of one or more rows, now, whose tokens a streamer of the caller's gets.

        Parameters
        ----------
        input_ids : torch.Tensor
            ``[rows, tokens]`` int64 on the model's device, without pads.
        streamer : RowStreamer
            Its `fail` gets what ``generate`` raises. Its rows end, whatever happens, unless it fails.
        draws_freely : bool
            Sample with any random numbers instead of those that dense would draw: requests with equal settings then
            choose their tokens together.
        generation_config, **options
            As for ``model.generate``.

        Raises
        ------
        QueueFullError
            If `max_queue` requests wait already.
        EngineClosedError
            If the engine is shut down.
        """
        if self._is_closed:
            raise EngineClosedError("the engine is shut down and takes no more requests: make a new AsyncEngine")
        if self.is_full:
            raise QueueFullError(self.num_waiting, self.num_running)
        context = contextvars.copy_context()  # With the cache salt of the task that asks.
        draws = no_replay if draws_freely else contextlib.nullcontext
        run = functools.partial(_generate, self.model, input_ids, streamer, generation_config, draws, options)
        future = self._threads.submit(context.run, run)
        submission = self._requests[future] = Submission(streamer, future, len(input_ids))
        future.add_done_callback(self._requests.pop)
        return submission

    async def shutdown(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those under way have ended.

        Parameters
        ----------
        timeout : float or None
            Seconds after which those that are left are aborted. None: they are waited for.
        """
        self._is_closed = True
        await _wait(list(self._requests), timeout)
        for submission in list(self._requests.values()):
            submission.abort()
        await _wait(list(self._requests), None)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, kind, *_) -> None:
        await self.shutdown(timeout=None if kind is None else 0)

    def _as_prompt(self, input_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return a request's prompt as ``[1, tokens]`` int64."""
        with on_home_stream(*devices_of(self.model, self.model.device)):  # The request runs in another thread.
            ids = torch.as_tensor(input_ids, dtype=torch.long, device=self.model.device)
            ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or len(ids) != 1 or ids.shape[1] == 0:
            raise ValueError(f"a request is one prompt, [tokens] or [1, tokens], not empty; got {list(ids.shape)}")
        return ids


def _generate(
    model,
    ids: torch.Tensor,
    streamer: RowStreamer,
    config: GenerationConfig | None,
    draws: Callable[[], AbstractContextManager],
    options: dict,
) -> None:
    if streamer.is_closed:
        streamer.end_rows(range(len(ids)))
        return
    mask = torch.ones_like(ids)
    try:
        with draws():
            model.generate(ids, generation_config=config, streamer=streamer, attention_mask=mask, **options)
    except BaseException as error:  # The consumer raises it, where the request was made.
        streamer.fail(error)


async def _wait(futures: list[Future], timeout: float | None) -> None:
    if futures:
        await asyncio.wait([asyncio.wrap_future(future) for future in futures], timeout=timeout)
