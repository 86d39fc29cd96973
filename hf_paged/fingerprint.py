"""A fingerprint of what a model computes: its weights and adapters. Changed weights make stored states stale."""

import functools
import hashlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .prepacked import PrepackedForward

_SAMPLES = 64  # Elements looked at, of each tensor.
_GOLDEN_RATIO = 0.6180339887498949
# Their hooks leave what a module computes in evaluation alone: they capture outputs, or act in training only.
_PASSIVE = ("hf_paged.", "transformers.")


def fingerprint(model: torch.nn.Module, *besides: object) -> bytes | None:
    """A digest that changes when the weights of `model`, or its adapters, change.

    Looks at where each parameter and buffer lies, how often it was changed in place, and a few elements of its
    content: an edit through ``.data`` leaves no other trace. Such an edit of a few elements can be missed.

    Parameters
    ----------
    besides : objects
        What else stored states depend on: their `repr` is part of it.

    Returns
    -------
    bytes or None
        None if a change could not be seen: weights are elsewhere (offloaded), or a forward hook of somebody else may
        change what a module computes.
    """
    seen: list[object] = [
        *besides,
        type(model).__module__,
        type(model).__qualname__,
        getattr(model, "name_or_path", ""),
    ]
    samples: list[torch.Tensor] = []
    if torch.nn.modules.module._has_any_global_hook():
        return None
    for number, module in enumerate(model.modules()):
        if any(map(_is_foreign, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
            return None
        if "merged_adapters" in module.__dict__:  # A layer of PEFT.
            active, merged = module.active_adapters, module.merged_adapters
            seen.append((number, active, merged, module.disable_adapters, getattr(module, "scaling", None)))
        forward = module.__dict__.get("forward")
        # Somebody's own: compiled, hooked by accelerate, or with other results.
        if forward is not None and not isinstance(forward, PrepackedForward):
            seen.append((number, id(forward)))
        for tensor in _tensors(module):
            if tensor.is_meta:
                return None
            version = 0 if tensor.is_inference() else tensor._version
            seen.append((tensor.data_ptr(), version, tensor.dtype, tensor.shape))
            if tensor.numel():
                content = tensor.detach() if tensor.itemsize > 1 else tensor.detach().view(torch.uint8)
                # Spread over rows and columns alike, as an even stride would not be.
                samples.append(content.take(_places(tensor.numel(), tensor.device)))
    digest = hashlib.sha256(repr(seen).encode())
    for content in _by_kind(samples):
        digest.update(content)
    return digest.digest()


def _is_foreign(hook) -> bool:
    return not getattr(hook, "__module__", "").startswith(_PASSIVE)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The module's own parameters and buffers, those that others are wrapped around unwrapped."""
    left = [tensor for part in (module._parameters, module._buffers) for tensor in part.values() if tensor is not None]
    while left:
        tensor = left.pop()
        if is_traceable_wrapper_subclass(tensor):
            left += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            yield tensor


@functools.lru_cache(maxsize=1024)
def _places(count: int, device: torch.device) -> torch.Tensor:
    """Indices of elements, ``[samples]`` int64."""
    steps = torch.arange(min(count, _SAMPLES), dtype=torch.float64)
    places = steps if count <= _SAMPLES else (steps * _GOLDEN_RATIO) % 1 * count
    return places.long().to(device)


def _by_kind(samples: list[torch.Tensor]) -> Iterator[bytes]:
    """The bytes of all samples, with one copy for each dtype and device."""
    kinds: dict[tuple, list[torch.Tensor]] = {}
    for sample in samples:
        kinds.setdefault((sample.dtype, sample.device), []).append(sample)
    for parts in kinds.values():
        yield torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes()


class ModelIdentity:
    def full(self, model, *besides):
        return fingerprint(model, *besides)

    def quick(self, model):
        return tuple((p.data_ptr(), p._version) for p in model.parameters())
