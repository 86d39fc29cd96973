"""Recorders: they record the work of a function on a device, so that it can be done again without its Python code.

A recording reads and writes the tensors that the function did, where they lie. It is for the owner to know when they
have moved, or when the function would do other work.
"""

import abc
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from hf_paged.atomic import after_fork_in_child
from hf_paged.reasons import Why

Work = Callable[[], torch.Tensor]


class UncapturableError(Exception):
    """A function does what no recording can do again.

    Attributes
    ----------
    why : Why
    """

    def __init__(self, why: Why):
        self.why = why
        super().__init__(why.text)


class Recording(abc.ABC):
    """The recorded work of one function."""

    @abc.abstractmethod
    def replay(self) -> torch.Tensor:
        """Do the work again. Its result is good until any recording of the same recorder is replayed."""


class Recorder(abc.ABC):
    """Records functions that take nothing, return a tensor, and may run several times.

    Attributes
    ----------
    must_be_alone : bool
        Whether no other thread may draw random numbers on the device meanwhile.
    """

    must_be_alone = False

    @abc.abstractmethod
    def record(self, function: Work) -> Recording:
        """Record a function, which runs for that. An exception leaves nothing of the recording behind.

        Raises
        ------
        UncapturableError
            If the function does what no recording can do again.
        Exception
            What the function raises, or the device.
        """


class GraphRecorder(Recorder):
    """Records CUDA graphs. They share one pool of memory, so no two of them may run at the same time.

    A function runs once on the capturing stream before it is captured: kernels are compiled then, and libraries take
    their work space. The graphs copy their results into one tensor: a result of its own would take memory for each.

    Parameters
    ----------
    device : torch.device
    """

    # The device's generator belongs to the capture while it lasts, and a draw in another thread raises.
    must_be_alone = True

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None  # Handle of the memory that the graphs share.
        self._result = torch.empty(0)

    def record(self, function: Work) -> Recording:
        with torch.cuda.device(self.device):
            stream = _capture_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                warm_up = function()
            torch.cuda.current_stream().wait_stream(stream)
            result = self._room_for(warm_up)  # Memory of the current stream, in which results are read.
            del warm_up
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and wait for the device meanwhile; this one may not.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                result.copy_(function())
        return GraphRecording(graph, result, self.device)

    def _room_for(self, result: torch.Tensor) -> torch.Tensor:
        """A tensor like this one, ``[rows, size]``; in the same memory as before where that is large enough."""
        room = self._result
        if room.shape[1:] != result.shape[1:] or room.dtype != result.dtype or len(room) < len(result):
            room = self._result = torch.empty_like(result)
        return room[: len(result)]


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """The stream on which functions are captured: one for all, as libraries keep work space for each stream."""
    return torch.cuda.Stream()


class GraphRecording(Recording):
    """A captured CUDA graph."""

    def __init__(self, graph: Any, result: torch.Tensor, device: torch.device):
        self._graph, self._result, self._device = graph, result, device
        _graphs.add(self)

    def replay(self) -> torch.Tensor:
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._result

    def keep(self) -> None:
        """Keep the graph until the process ends."""
        _kept.append((self._graph, self._result))


_graphs: "weakref.WeakSet[GraphRecording]" = weakref.WeakSet()
_kept: list[Any] = []


def _keep_graphs() -> None:
    """In a forked child every call of CUDA fails, that which frees a graph as well."""
    for graph in list(_graphs):
        graph.keep()


after_fork_in_child(_keep_graphs)
