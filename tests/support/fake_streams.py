"""Streams that are none: they note what is queued on them, and find what a device could run in the wrong order.

A piece of work must come after all earlier work that writes to what it touches, and a write after all earlier reads.
On a device it does only where both are on one stream, or where the later stream has waited for the earlier one. Each
stream has a vector clock, as race detectors have for threads.
"""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Hashable

import torch


class Stream:
    """A stream of a fake device.

    Attributes
    ----------
    seen : dict of Stream to int
        How much of the work of each stream comes before what is queued here next.
    """

    def __init__(self, name: str):
        self.name, self.seen = name, defaultdict(int)

    def __repr__(self):
        return self.name

    def wait_stream(self, other: "Stream") -> None:
        for stream, count in list(other.seen.items()):
            self.seen[stream] = max(self.seen[stream], count)


class FakeStreams:
    """Takes the place of torch's module for a type of device.

    Attributes
    ----------
    races : list of str
        Pieces of work whose order the device does not know.
    kept : set of (int, Stream)
        Identities of the tensors whose memory is kept for a stream.
    num_visits : int
        Times at which a thread has changed its stream.
    """

    def __init__(self):
        self.races: list[str] = []
        self.kept: set[tuple[int, Stream]] = set()
        self.num_visits = 0
        self._defaults: dict[torch.device, Stream] = {}
        self._lock, self._thread = threading.RLock(), threading.local()
        # What was touched -> the last work that wrote to it, and all that read it since: (name, stream, its count).
        self._writes: dict[Hashable, tuple[str, Stream, int]] = {}
        self._reads: dict[Hashable, list[tuple[str, Stream, int]]] = defaultdict(list)

    def default_stream(self, device: torch.device) -> Stream:
        with self._lock:
            return self._defaults.setdefault(device, Stream(f"home of {device}"))

    def current_stream(self, device: torch.device) -> Stream:
        return getattr(self._thread, "stream", None) or self.default_stream(device)

    def current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    @contextlib.contextmanager
    def device(self, index: int):
        before, self._thread.device = self.current_device(), index
        yield
        self._thread.device = before

    @contextlib.contextmanager
    def stream(self, stream: Stream):
        before, self._thread.stream = getattr(self._thread, "stream", None), stream
        self.num_visits += 1
        try:
            yield
        finally:
            self._thread.stream = before

    def keep_for(self, tensor: torch.Tensor, stream: Stream) -> None:
        self.kept.add((id(tensor), stream))

    def queue(self, name: str, device: torch.device, reads: Hashable = None, writes: Hashable = None) -> None:
        """Queue a piece of work on this thread's stream that reads one thing and writes to another."""
        with self._lock:
            stream = self.current_stream(device)
            stream.seen[stream] += 1
            work = (name, stream, stream.seen[stream])
            before = [self._writes[thing] for thing in (reads, writes) if thing in self._writes]
            before += self._reads[writes] if writes is not None else []
            self.races += [f"{name} on {stream} beside {earlier[0]} on {earlier[1]}" for earlier in before
                           if stream.seen[earlier[1]] < earlier[2]]  # fmt: skip
            if reads is not None:
                self._reads[reads].append(work)
            if writes is not None:
                self._writes[writes], self._reads[writes] = work, []
