"""AsyncEngine: an asyncio front of a model's engine, ``async for`` over the tokens of a request.

Thin on purpose: a request is a ``generate`` call in a thread of its own, so every option means what it means there, and
requests share steps and blocks with each other and with plain calls.
"""

import asyncio
import contextvars
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_paged.errors import PagedError
from hf_paged.execution.home_stream import on_home_stream
from hf_paged.models.placement import devices_of
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


class _RequestStreamer(RowStreamer):
    """Carries the tokens of one request from the thread that generates them to the event loop.

    Attributes
    ----------
    queue : asyncio.Queue
        Tokens, and at last an error of the call, or None.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        super().__init__()
        self._loop = loop
        self.queue: asyncio.Queue[int | BaseException | None] = asyncio.Queue()

    def begin(self, prompts: torch.Tensor) -> None:
        if len(prompts) != 1:
            raise ValueError(f"a stream carries one answer, got {len(prompts)}: leave num_return_sequences out")

    def put_rows(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        self._send(*tokens)

    def end_rows(self, rows: Sequence[int]) -> None:
        self._send(None)

    def fail(self, error: BaseException) -> None:
        self._send(error)

    def _send(self, *items: int | BaseException | None) -> None:
        try:
            for item in items:
                self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # The loop is closed: the consumer is gone.
            self.close()


class TokenStream:
    """The tokens of one request, an async iterator of int. Made by `AsyncEngine.stream`.

    The request is aborted when the stream is dropped, and when the task that waits for a token is cancelled.
    """

    def __init__(self, streamer: _RequestStreamer, future: Future):
        self._streamer, self._future, self._is_over = streamer, future, False

    def abort(self) -> None:
        """End the request; its blocks are free within a step. The tokens that came before can still be read."""
        _abort(self._streamer, self._future)

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
        self._requests: dict[Future, _RequestStreamer] = {}
        self._is_closed = False

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
        if self._is_closed:
            raise EngineClosedError("the engine is shut down and takes no more requests: make a new AsyncEngine")
        with on_home_stream(*devices_of(self.model, self.model.device)):  # The request runs in another thread.
            ids = self._as_prompt(input_ids)
        running = min(len(self._requests), self.max_running)
        if len(self._requests) >= self.max_running + self.max_queue:
            raise QueueFullError(len(self._requests) - running, running)
        streamer = _RequestStreamer(asyncio.get_running_loop())
        context = contextvars.copy_context()  # With the cache salt of the task that asks.
        future = self._threads.submit(context.run, _generate, self.model, ids, streamer, generation_config, options)
        self._requests[future] = streamer
        future.add_done_callback(self._requests.pop)
        return TokenStream(streamer, future)

    async def shutdown(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those under way have ended.

        Parameters
        ----------
        timeout : float or None
            Seconds after which those that are left are aborted. None: they are waited for.
        """
        self._is_closed = True
        await _wait(list(self._requests), timeout)
        for future, streamer in list(self._requests.items()):
            _abort(streamer, future)
        await _wait(list(self._requests), None)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, kind, *_) -> None:
        await self.shutdown(timeout=None if kind is None else 0)

    def _as_prompt(self, input_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return a request's prompt as ``[1, tokens]`` int64."""
        ids = torch.as_tensor(input_ids, dtype=torch.long, device=self.model.device)
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or len(ids) != 1 or ids.shape[1] == 0:
            raise ValueError(f"a request is one prompt, [tokens] or [1, tokens], not empty; got {list(ids.shape)}")
        return ids


def _generate(
    model, ids: torch.Tensor, streamer: _RequestStreamer, config: GenerationConfig | None, options: dict
) -> None:
    if streamer.is_closed:
        return
    mask = torch.ones_like(ids)
    try:
        model.generate(ids, generation_config=config, streamer=streamer, attention_mask=mask, **options)
    except BaseException as error:  # The stream raises it, where the request was made.
        streamer.fail(error)


def _abort(streamer: _RequestStreamer, future: Future) -> None:
    streamer.close()
    if future.cancel():  # It never ran: it will not end its row.
        streamer.end_rows([0])


async def _wait(futures: list[Future], timeout: float | None) -> None:
    if futures:
        await asyncio.wait([asyncio.wrap_future(future) for future in futures], timeout=timeout)
