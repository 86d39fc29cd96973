"""Snapshot: the parts of a model as one inspection found them, held to tell at every step that they are still so."""

import operator
from collections.abc import Iterable, Mapping

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_paged.compat.torch import (
    count_dispatch_modes,
    count_function_modes,
    dispatch_modes,
    function_modes,
    has_global_hook,
    version_of,
)

PACKAGES = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "hf_paged",
    "hf_paged_integrations",
    "hf_paged_kernels",
}


def is_known(kind: type) -> bool:
    """Tell whether a class comes from a package that keeps all state of its objects where an inspection finds it."""
    return (kind.__module__ or "").partition(".")[0] in PACKAGES


class Snapshot:
    """Objects of a model beside copies of what they held.

    The copies refer to the objects themselves, so an address is never given to another object meanwhile. They keep
    modules and tensors alive: the owner of a snapshot lets go of it when no row runs any more.
    """

    def __init__(self):
        self._live: list = []  # Namespaces, lists, dicts and sets, as they are now.
        self._copies: list = []  # A copy of each as it was.
        self._owners: list[dict] = []  # Namespaces with containers in them: an equal one in its place is a change, too.
        self._names: list = []
        self._contained: list = []
        self._modules: list[torch.nn.Module] = []
        self._kinds: list[type] = []
        self._globals: list[tuple[operator.itemgetter, Mapping, object]] = []
        self._functions: list = []
        self._codes: list = []
        self._tensors: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._strides: list[tuple[int, ...]] = []
        self._aliases: list[torch.Tensor] = []  # Keep addresses from being given to other tensors.
        self._versioned: list[torch.Tensor] = []
        self._versions: list[int] = []
        self.attention = attention_functions()

    def add_container(self, container, copy) -> None:
        """Hold a namespace, list, dict or set beside a copy of it."""
        self._live.append(container)
        self._copies.append(copy)

    def add_place(self, owner: dict, name: object, value: object) -> None:
        """Hold a container's place: an equal one that is put there later is a change."""
        self._owners.append(owner)
        self._names.append(name)
        self._contained.append(value)

    def add_module(self, module: torch.nn.Module, namespaces: Iterable[dict], copies: Iterable[dict]) -> None:
        """Hold a module beside its class, and its namespaces beside copies of them."""
        self._modules.append(module)
        self._kinds.append(type(module))
        self._live.extend(namespaces)
        self._copies.extend(copies)

    def add_functions(self, namespace: Mapping, functions: dict) -> None:
        """Hold functions beside their code, and the names they have in a namespace."""
        if functions:
            get = operator.itemgetter(*functions)
            self._globals.append((get, namespace, get(functions)))

    def add_function(self, function) -> None:
        """Hold a function beside its code."""
        self._functions.append(function)
        self._codes.append(function.__code__)

    def add_tensor(self, tensor: torch.Tensor, alias: torch.Tensor) -> None:
        """Hold a tensor and an alias of it, beside where it lies and how often it was written to."""
        self._tensors.append(tensor)
        self._aliases.append(alias)
        if not tensor.is_inference():
            self._versioned.append(tensor)
            self._versions.append(version_of(tensor))
        self._addresses.append(tensor.data_ptr())
        self._strides.append(tensor.stride())

    def include(self, other: "Snapshot") -> None:
        """Hold what `other` holds."""
        for name, part in vars(other).items():
            if isinstance(part, list):
                getattr(self, name).extend(part)

    def holds(self) -> bool:
        """Tell whether all is as it was. Safe while other threads change it; an edit through ``.data`` is not seen."""
        try:
            # Lists and dicts compare in C, by identity first: microseconds for what has not changed.
            same = self._live == self._copies
        except (RuntimeError, ValueError):  # Another tensor or array: these have no one truth value.
            return False
        return (
            same
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._contained))
            and list(map(type, self._modules)) == self._kinds
            and list(map(version_of, self._versioned)) == self._versions
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(torch.Tensor.stride, self._tensors)) == self._strides
            and self._has_same_code()
            and not is_disturbed()
        )

    def _has_same_code(self) -> bool:
        try:
            same = all(get(namespace) == functions for get, namespace, functions in self._globals)
        except KeyError:
            return False
        return same and list(map(_code, self._functions)) == self._codes and self.attention == attention_functions()


_code = operator.attrgetter("__code__")


def attention_functions() -> tuple:
    """The functions that "paged" models call to attend, and to make a mask."""
    return ALL_ATTENTION_FUNCTIONS.get("paged"), ALL_MASK_ATTENTION_FUNCTIONS.get("paged")


def is_disturbed() -> bool:
    """Tell whether this thread, or every module of torch, runs something that may change what any model computes."""
    if has_global_hook():
        return True
    if not count_function_modes() and not count_dispatch_modes():
        return False
    modes = (*function_modes(), *dispatch_modes())
    return not all(is_known(type(mode)) for mode in modes)
