"""The home stream of a device: what touches pages, and the tensors of steps, is queued on this one stream.

Calls come from several threads, each of which may have chosen a stream of its own, and the thread that drives the steps
changes. A device runs the work of one stream in order, and knows no order between two. So a call moves to the default
stream of its device, where sections of the worker thread are, too: what its thread had queued before, its inputs or an
optimizer's step, is waited for there, and what it queues afterwards waits for what was done for it. Blocks change hands
in the order in which work is queued. The streams wait on the device, by events; no thread does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from hf_paged.compat import devices

Result = TypeVar("Result")
Lend = Callable[[Result], Result]


def on_home_stream(*places: torch.device) -> contextlib.AbstractContextManager[Lend]:
    """Queue this thread's work for some devices on their home streams.

    Costs nothing on the CPU, and next to nothing where the thread's streams are the home streams already, as they are
    unless a program chooses others.

    Returns
    -------
    context manager of callable
        ``lend(result)`` returns its argument, a tensor or what holds tensors, such as the output of ``generate``, for
        the thread's own streams: call it on all that is read after the context manager is left. The memory of these
        tensors belongs to the home streams, and is not given to another tensor while the other streams read them.
    """
    if all(place.type == "cpu" for place in places):
        return _AT_HOME
    away = []
    for place in dict.fromkeys(places):
        streams = devices.streams(place)
        if streams is not None and streams[0] != streams[1]:
            away.append((place, *streams))
    return _visit(away) if away else _AT_HOME


def catch_up(*places: torch.device) -> None:
    """Let all that is queued on the home streams from now on see what this thread has queued so far."""
    with on_home_stream(*places):
        pass


def _as_it_is(result: Result) -> Result:
    return result


_AT_HOME: contextlib.AbstractContextManager[Lend] = contextlib.nullcontext(_as_it_is)


@contextlib.contextmanager
def _visit(away: list[tuple[torch.device, Any, Any]]) -> Iterator[Lend]:
    """Move to the home streams of devices on which this thread has chosen others: (device, its own, home)."""
    with contextlib.ExitStack() as visit:
        for device, own, home in away:
            home.wait_stream(own)
            visit.callback(own.wait_stream, home)
            visit.enter_context(devices.entered(home, device))
        yield functools.partial(_lend, {device: own for device, own, _ in away})


def _lend(streams: dict[torch.device, Any], result: Result) -> Result:
    for tensor in _tensors_in(result):
        if tensor.device in streams:
            devices.keep_for(tensor, streams[tensor.device])
    return result


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an output. A cache in it has none: it reads its pages on the home stream."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        items: Iterable = value.values() if isinstance(value, Mapping) else value
        for item in items:
            yield from _tensors_in(item)
