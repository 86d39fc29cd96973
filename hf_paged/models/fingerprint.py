"""A fingerprint of what a model computes: its weights and adapters. Changed weights make stored states stale."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.utils import logging

from hf_paged.models.inspection import Inspection, UnseenError
from hf_paged.models.snapshot import Snapshot, is_disturbed

logger = logging.get_logger(__name__)

_SAMPLES = 64  # Elements looked at, of each tensor.
_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, eq=False)
class Identity:
    """A model as one look found it, with all that its results depend on.

    Keeps what was looked at alive, old weights too: hold it while rows run, and no longer.

    Attributes
    ----------
    digest : bytes
        Equal for two looks between which nothing changed.
    """

    digest: bytes
    _trace: Snapshot
    _described: bytes  # A digest of all that was seen but for the content of tensors.
    _contents: list[torch.Tensor]

    def is_found_again(self) -> bool:
        """Tell whether another look would find the same, the content of tensors included. Cheaper than that look."""
        return self.holds() and _digest(self._described, self._contents) == self.digest

    def holds(self) -> bool:
        """Tell whether the model is still what it was. Costs a fraction of a look; meant for every step.

        Sees all that `identify` sees, but for the content of tensors: an edit through ``.data`` leaves no trace. Safe
        while other threads change the model. A change that was undone before this call can be missed.
        """
        return self._trace.holds()


def identify(model: torch.nn.Module, *besides: object) -> Identity | None:
    """Look at all that the states of a token depend on, besides the tokens before it.

    Sees where each parameter and buffer lies, how often it was changed in place, and a few elements of its content: an
    edit through ``.data`` leaves no other trace. Such an edit of a few elements can be missed. Sees the class of each
    module, its attributes, and the functions of these classes and their files.

    Parameters
    ----------
    besides : objects
        What else stored states depend on: their `repr` is part of it.

    Returns
    -------
    Identity or None
        None if a change could not be seen: a class or a function from outside torch, transformers, peft and accelerate
        takes part, weights are elsewhere (offloaded), or a forward hook from outside may change what is computed.
    """
    look = Inspection()
    try:
        look.at_model(model)
        if is_disturbed():
            raise UnseenError("a hook on all modules, or a mode that sees every call of torch")
    except (UnseenError, RecursionError) as error:
        logger.info_once(f"hf_paged: the prefix cache serves no call on this model: {error} takes part in its forward")
        return None
    described = hashlib.sha256("\n".join([repr(besides), *look.seen]).encode()).digest()
    return Identity(_digest(described, look.contents), look.trace, described, look.contents)


def fingerprint(model: torch.nn.Module, *besides: object) -> bytes | None:
    """The digest of `identify`; None if a change could not be seen."""
    identity = identify(model, *besides)
    return None if identity is None else identity.digest


def _digest(described: bytes, contents: list[torch.Tensor]) -> bytes:
    digest = hashlib.sha256(described)
    for content in _by_kind(map(_sample, contents)):
        digest.update(content)
    return digest.digest()


def _sample(content: torch.Tensor) -> torch.Tensor:
    """A few elements, ``[samples]``."""
    content = content if content.itemsize > 1 else content.view(torch.uint8)
    # Spread over rows and columns alike, as an even stride would not be.
    return content.take(_places(content.numel(), content.device))


@functools.lru_cache(maxsize=1024)
def _places(count: int, device: torch.device) -> torch.Tensor:
    """Indices of elements, ``[samples]`` int64."""
    steps = torch.arange(min(count, _SAMPLES), dtype=torch.float64)
    places = steps if count <= _SAMPLES else (steps * _GOLDEN_RATIO) % 1 * count
    return places.long().to(device)


def _by_kind(samples: Iterator[torch.Tensor]) -> Iterator[bytes]:
    """The bytes of all samples, with one copy for each dtype and device."""
    kinds: dict[tuple, list[torch.Tensor]] = {}
    for sample in samples:
        kinds.setdefault((sample.dtype, sample.device), []).append(sample)
    for parts in kinds.values():
        yield torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes()
