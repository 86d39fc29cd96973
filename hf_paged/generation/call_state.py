"""CallState: one call inside the engine, the orders that it gets, and the reports that it comes back with."""

import threading
from collections import deque
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import torch

from hf_paged.errors import OutOfBlocksError
from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.generation.generate_call import Choice, GenerateCall
from hf_paged.memory.swap_costs import Moved
from hf_paged.sampling.next_tokens import NextTokens
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Chunk, SchedulerOutput


class CallState:
    """A call in the engine. Read and written in sections; the call's thread sleeps on `wakeup`.

    Parameters
    ----------
    call : GenerateCall
    is_inside : bool
        Whether a callback of another call on the pool made this one, and waits for it.

    Attributes
    ----------
    thread : int
        Identity of the call's thread.
    wakeup : SimpleQueue
        Wakes the call. Its items mean nothing.
    is_asleep : bool
        Whether the call waits for `wakeup`.
    logits : deque of (list of Request, torch.Tensor)
        ``[rows, vocab]`` that the call has yet to sample from in its own thread.
    is_sampling : bool
        Whether the call samples in its own thread; the next step may wait for it.
    failed : list of (Request, OutOfBlocksError)
        Rows that the pool cannot hold, until the call is told of them.
    error : BaseException or None
        Ends the call, when its thread asks for an order.
    """

    def __init__(self, call: GenerateCall, is_inside: bool):
        self.call, self.is_inside, self.thread = call, is_inside, threading.get_ident()
        self.wakeup: SimpleQueue = SimpleQueue()
        self.is_asleep = False
        self.logits: deque[tuple[list[Request], torch.Tensor]] = deque()
        self.is_sampling = False
        self.failed: list[tuple[Request, OutOfBlocksError]] = []
        self.error: BaseException | None = None
        self._has_left: SimpleQueue = SimpleQueue()

    def wake(self) -> None:
        if self.is_asleep:
            self.is_asleep = False
            self.wakeup.put(None)

    def sleep(self, seconds: float | None) -> None:
        """Wait to be woken, `seconds` at most. In the call's thread, outside sections."""
        try:
            self.wakeup.get(timeout=seconds)
        except Empty:
            pass

    def tell_left(self) -> None:
        """Note that the engine has nothing of the call any more."""
        self._has_left.put(None)

    def wait_until_left(self) -> None:
        """Wait for `tell_left`: a step under way writes to the blocks of its rows."""
        self._has_left.get()


# Orders: what a call's thread does next.


@dataclass(frozen=True)
class Finish:
    """All rows are finished or have failed: return to the caller."""


@dataclass(frozen=True)
class Raise:
    """Raise this error to the caller."""

    error: BaseException


@dataclass(frozen=True)
class Sleep:
    """Wait to be woken, `seconds` at most."""

    seconds: float | None


@dataclass(frozen=True)
class Sample:
    """Choose and accept the next tokens of these rows, from ``[rows, vocab]``."""

    requests: list[Request]
    logits: torch.Tensor


@dataclass(frozen=True)
class Drive:
    """Run this step, for the rows of all calls.

    Attributes
    ----------
    planned : SchedulerOutput
    states : dict of Request to CallState
        Of the rows that run, and of their duplicates.
    began : float
        When it was planned, in seconds.
    must_check : bool
        Whether to look first if the model is still as the calls found it when they came.
    unread : Unread or None
        The step before, if its tokens are still to be read. A step without chunks only reads them.
    others_draw : bool
        Whether calls sample in their own threads meanwhile.
    """

    planned: SchedulerOutput
    states: dict[Request, CallState]
    began: float
    must_check: bool
    unread: "Unread | None"
    others_draw: bool


Order = Finish | Raise | Sleep | Sample | Drive


# Reports: what a call's thread has done.


@dataclass
class Delivery:
    """Logits of a step that are for one call.

    Attributes
    ----------
    logits : torch.Tensor
        ``[len(requests), vocab]``
    choice : Choice or None
        What the driver chose from them. None: the call chooses in its own thread.
    """

    state: CallState
    requests: list[Request]
    logits: torch.Tensor
    choice: Choice | None = None


@dataclass(frozen=True)
class Unread:
    """A step whose tokens are chosen, and not known to the host yet.

    Attributes
    ----------
    pending : PendingTokens
    rows : list of (CallState, list of Request)
        For whom they were chosen, in their order.
    """

    pending: PendingTokens
    rows: list[tuple[CallState, list[Request]]]

    def choices(self, numbers: list[int]) -> list[tuple[CallState, list[Request], Choice]]:
        """Part the tokens that were read among the calls, which work with numbers alone."""
        found, end = [], 0
        for state, requests in self.rows:
            begin, end = end, end + len(requests)
            part = numbers[begin:end]
            found.append((state, requests, Choice(NextTokens(torch.tensor(part)), part)))
        return found


@dataclass
class StepReport:
    """How a step went.

    Attributes
    ----------
    began : float
        When it was planned, in seconds.
    chunks : list of Chunk
        Those that have run. Chunks that ran ahead, and failed, are in none of the lists: their rows run them again
        when their tokens are known. What is wrong past the end of a row is no error.
    lost : list of Chunk
        Such chunks that have not run because their blocks could not be made ready, and any whose blocks were not
        restored from the swap space.
    errors : list of (CallState, Exception)
        Calls that cannot go on.
    is_same_model : bool
        Whether the model is the one that the prefix cache serves.
    tokens_before : list of int
        Tokens of the unread step that the order named.
    unread : Unread or None
        What was chosen, if it is not read yet; then there are no deliveries.
    moved : Moved or None
        What was moved to the swap space and back.
    has_swap_space : bool
        Whether there is one still, if there was: not if it could not be read or written.
    """

    began: float
    chunks: list[Chunk] = field(default_factory=list)
    lost: list[Chunk] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    errors: list[tuple[CallState, Exception]] = field(default_factory=list)
    is_same_model: bool = True
    tokens_before: list[int] = field(default_factory=list)
    unread: Unread | None = None
    moved: Moved | None = None
    has_swap_space: bool = True


@dataclass(frozen=True)
class SampleReport:
    """The next tokens of some rows of the call. None for a row that is finished."""

    tokens: list[tuple[Request, int | None]]


Report = StepReport | SampleReport
