"""WorkspaceMeter: finds out how much memory a step's tensors take beside the blocks, from two small steps."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hf_paged.compat.torch import DispatchMode, tensors_in
from hf_paged.memory.sizing import Workspace


@dataclass
class _Seen:
    """The allocations of one step and what it freed, in order: (bytes, size of the last dimension), minus if freed."""

    num_tokens: int
    events: list[tuple[int, int]] = field(default_factory=list)
    num_rows: int = 0
    vocab: int = 0

    def peaks(self) -> tuple[int, int]:
        """The most bytes at once of all tensors but those as wide as the vocabulary, and of these."""
        live, most = [0, 0], [0, 0]
        for num_bytes, width in self.events:
            kind = int(width == self.vocab)
            live[kind] += num_bytes
            most[kind] = max(most[kind], live[kind])
        return most[0], most[1]


class WorkspaceMeter:
    """Watches a few steps of a model, and says what a step of any size takes.

    What lives at once in a forward grows with its tokens, and what is as wide as the vocabulary with the rows that are
    sampled; the rest, such as a weight that is unpacked for its product, is the same in every step. The steps may run
    on the device "meta".

    Parameters
    ----------
    gathers_experts : bool
        True: the steps gather the weights of experts for each token, which those of the model to be measured do not.
        What they gather is left out.
    """

    def __init__(self, gathers_experts: bool = False):
        self._steps: list[_Seen] = []
        self._gathers_experts = gathers_experts

    def run(self, forward: Callable[[], torch.Tensor], num_tokens: int) -> torch.Tensor:
        """Run a forward over `num_tokens` tokens; returns its logits, ``[num_rows, vocab]``."""
        seen = _Seen(num_tokens)
        with _Watch(seen.events, self._gathers_experts):
            logits = forward()
        seen.num_rows, seen.vocab = logits.shape
        self._steps.append(seen)
        return logits

    def workspace(self) -> Workspace:
        """The memory of a step, from the smallest and the largest that was seen."""
        small, large = (choose(self._steps, key=lambda seen: seen.num_tokens) for choose in (min, max))
        (least, _), (most, of_rows) = small.peaks(), large.peaks()
        token_bytes = max(0, most - least) // max(1, large.num_tokens - small.num_tokens)
        return Workspace(
            token_bytes, of_rows // large.num_rows, large.vocab, max(0, least - token_bytes * small.num_tokens)
        )


class _Watch(DispatchMode):
    """Notes when an operator of this thread allocates memory, and when it is free again."""

    def __init__(self, events: list[tuple[int, int]], gathers_experts: bool):
        super().__init__()
        self._events, self._gathers_experts = events, gathers_experts
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):  # Weights, and what the caller made: not the step's.
            self._known.add(tensor.untyped_storage())
        result = func(*args, **kwargs)
        if self._gathers_experts and func is torch.ops.aten.index.Tensor and isinstance(args[0], torch.nn.Parameter):
            self._known.add(result.untyped_storage())
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            self._known.add(storage)
            num_bytes, width = storage.nbytes(), tensor.shape[-1] if tensor.dim() else 1
            self._events.append((num_bytes, width))
            weakref.finalize(storage, self._events.append, (-num_bytes, width)).atexit = False
        return result
