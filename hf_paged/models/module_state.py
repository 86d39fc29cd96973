"""Tensors that the modules of a model hold besides their parameters, and which of them a forward has changed.

A model that keeps the state of its rows there, as recurrent layers without a cache of their own do, knows one batch at
a time: rows that come and go between its forwards would go on from each other's state.
"""

from collections.abc import Iterator
from typing import Any

import torch

from hf_paged.compat.torch import module_parts, version_of


class ModuleState:
    """The tensors that a model's modules hold as buffers and attributes, alone or in a list, tuple or dict.

    Keeps them alive, so that no other tensor gets the address of one.
    """

    def __init__(self, model: torch.nn.Module):
        self._held = dict(_held_tensors(model))

    def changed(self, model: torch.nn.Module) -> str | None:
        """The name of a tensor that was written to, replaced, added or removed since; None if there is none."""
        now = dict(_held_tensors(model))
        for name in {**self._held, **now}:
            tensor, version = self._held.get(name, (None, 0))
            other, other_version = now.get(name, (None, 0))
            if tensor is not other or version != other_version:
                return name
        return None


def _held_tensors(model: torch.nn.Module) -> Iterator[tuple[str, tuple[torch.Tensor, int]]]:
    """Each tensor by its name, with the number of writes to it; not those that are offloaded, which come and go."""
    for path, module in model.named_modules():
        namespace = vars(module)
        _, buffers, *_ = module_parts(namespace)
        for name, value in (*buffers.items(), *namespace.items()):
            for part, tensor in _tensors_in(value):
                if not tensor.is_meta:
                    version = 0 if tensor.is_inference() else version_of(tensor)  # Those of inference mode count none.
                    yield f"{path}.{name}{part}", (tensor, version)


def _tensors_in(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield "", value
    elif isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((f"[{key!r}]", item) for key, item in items if isinstance(item, torch.Tensor))
