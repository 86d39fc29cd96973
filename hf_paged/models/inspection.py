"""Inspection: describes all that a model's forward depends on, or says that some of it cannot be seen."""

import collections
import enum
import functools
import hashlib
import logging
import pathlib
import re
import sys
import types
import weakref

import torch
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from hf_paged.compat.kernels import function_in_module
from hf_paged.compat.torch import (
    compiler_backend,
    is_part_of_compiler,
    is_wrapper_subclass,
    module_parts,
    version_of,
)
from hf_paged.execution.prepacked_linear import PrepackedForward
from hf_paged.models.snapshot import PACKAGES, Snapshot, is_known

# Functions of these, and of Python's own library, run where models do; a patch comes from elsewhere.
_LIBRARIES = PACKAGES | {"hf_paged_autoload", "huggingface_hub", "kernels", "numpy", "safetensors", "typing_extensions"}
# Their hooks leave what a module computes in evaluation alone: they capture outputs, or act in training only.
_PASSIVE = {"hf_paged", "hf_paged_integrations", "transformers"}
_CONSTANTS = {type(None), bool, int, float, complex, str, bytes, type(...), range, slice}
_PLAIN = _CONSTANTS | {torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
# Their objects, and those of their subclasses, hold nothing that changes.
_STATELESS = (int, float, complex, str, bytes, enum.Enum, pathlib.PurePath, re.Pattern, logging.Logger)
_CONTAINERS = {list, tuple, dict, set, frozenset, collections.OrderedDict, collections.defaultdict, collections.deque}
# A module may hold such objects, and no forward reads them.
_APART = (GenerationConfig, PreTrainedTokenizerBase, RemovableHandle)
_WRAPPERS = {
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset"),
    type(functools.cache(repr)): ("__wrapped__",),
}
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
# Methods that `generate` calls between forwards change no state of a token.
_OF_GENERATE = frozenset(vars(GenerationMixin)) - frozenset(vars(object))
_SKIPPED = _OF_EVERY_MODULE | _OF_GENERATE
_NOTHING: dict = {}
_BUILTIN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
)
# Snapshots and descriptions of the code of classes and files of known packages. They hold no module and no tensor.
_known_sources: "dict[type | types.ModuleType, tuple[Snapshot, str]]" = {}


class UnseenError(Exception):
    """Something takes part in a forward whose changes cannot be seen."""


class Inspection:
    """One inspection of a model.

    Attributes
    ----------
    description : list of str
        Equal for models that compute the same.
    modules : list of torch.nn.Module
        Every module of the model.
    contents : list of torch.Tensor
        Every tensor that the model holds, detached.
    snapshot : Snapshot
        To tell later whether all is as it was.
    """

    def __init__(self):
        self.description: list[str] = []
        self.contents: list[torch.Tensor] = []
        self.snapshot = Snapshot()
        self.modules: list[torch.nn.Module] = []
        self._kinds: dict[type, int] = {}  # Classes of modules that are described already, each with a number.
        self._numbers: dict[int, int] = {}  # By address; `_held` keeps the objects, and so their addresses.
        self._held: list = []
        self._sources: set[type | types.ModuleType] = set()  # Described already.

    def describe_model(self, model: torch.nn.Module) -> None:
        """Describe a model.

        Raises
        ------
        UnseenError
            If a change of it could not be seen.
        """
        for source in (torch, torch.Tensor, torch.nn.functional):
            self._describe_source(source)
        self.description.append(repr(self._describe(self.snapshot.attention)))
        self._describe(model)
        for module in self.modules:  # Grows meanwhile.
            self._describe_module(module)

    def _describe_module(self, module: torch.nn.Module) -> None:
        kind = type(module)
        if kind not in self._kinds:
            self._describe_module_class(kind)
        own = vars(module)
        copy = dict(own)
        if isinstance(copy.get("forward"), PrepackedForward):  # There for the length of a step.
            del copy["forward"]
        live = module_parts(own)
        parts = [_copied(part) if part else _NOTHING for part in live]
        self.snapshot.add_module(module, (own, *live), (copy, *parts))
        for hooks in parts[3:]:
            for hook in hooks.values():
                _check_passive(hook)
        attributes = {
            name: value if type(value) in _PLAIN else self._describe_attribute(own, name, value)
            for name, value in copy.items()
            if name not in _SKIPPED
        }
        held = [{name: self._describe(value) for name, value in part.items()} for part in parts[:3] if part]
        # As text at once: thousands of objects would set the garbage collector going.
        self.description.append(repr((self._kinds[kind], module.training, attributes, held)))

    def _describe_module_class(self, kind: type) -> None:
        """Describe the class of a module, and the files of its forwards."""
        self._kinds[kind] = len(self._kinds)
        for part in kind.__mro__[:-1]:
            self._describe_source(part)
            if "forward" in vars(part):
                self._describe_source(sys.modules.get(part.__module__))
        self.description.append(repr([(part.__module__, part.__qualname__) for part in kind.__mro__]))

    def _describe_attribute(self, owner: dict, name: str, value):
        """Describe an attribute of a module, which must stay where it is if it is a container."""
        if isinstance(value, (list, dict, set)):
            self.snapshot.add_place(owner, name, value)
        return self._describe(value)

    def _describe(self, value):
        """Describe one value, in plain types."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        number = self._numbers.get(id(value))
        if number is not None:
            return "seen before", number
        if isinstance(value, types.MethodType):  # A new object at each access.
            return "method", self._describe(value.__func__), self._describe(value.__self__)
        number = self._numbers[id(value)] = len(self._held)
        self._held.append(value)
        if isinstance(value, torch.nn.Module):
            if (function := function_in_module(value)) is not None:
                return self._describe_function_module(value, function)
            self.modules.append(value)
            return "module", number
        if isinstance(value, torch.Tensor):
            return number, self._describe_tensor(value)
        if isinstance(value, types.FunctionType):
            return self._describe_function(value)
        if kind in _CONTAINERS:
            return kind.__name__, self._describe_container(value)
        return self._describe_object(value)

    def _describe_function_module(self, module: torch.nn.Module, function: types.FunctionType):
        """Describe a function that was made a module: `kernels` would put another forward into its namespace."""
        own = vars(module)
        copy = dict(own)
        self.snapshot.add_container(own, copy)
        attributes = [(name, self._describe(value)) for name, value in copy.items()]
        return "function module", self._describe(function), attributes

    def _describe_container(self, value) -> list:
        copy = value
        if not isinstance(value, (tuple, frozenset)):
            copy = _copied(value)
            self.snapshot.add_container(value, copy)
        if isinstance(value, dict):
            return [(self._describe(key), self._describe(item)) for key, item in copy.items()]
        items = [self._describe(item) for item in copy]
        return sorted(map(repr, items)) if isinstance(value, (set, frozenset)) else items

    def _describe_tensor(self, tensor: torch.Tensor):
        kind = type(tensor)
        is_plain = kind is torch.nn.Parameter or kind is torch.Tensor
        if not is_plain and is_wrapper_subclass(tensor):
            self.snapshot.add_container(vars(tensor), dict(vars(tensor)))
            names, context = tensor.__tensor_flatten__()
            return kind.__qualname__, repr(context), [self._describe(getattr(tensor, name)) for name in names]
        if not is_plain and not is_known(kind):
            raise UnseenError(f"a tensor of class {kind.__qualname__}")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise UnseenError(f"a tensor on {tensor.device} with layout {tensor.layout}")
        content = tensor.detach()
        self.contents.append(content)
        self.snapshot.add_tensor(tensor, content)
        version = 0 if tensor.is_inference() else version_of(tensor)
        return tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride()

    def _describe_function(self, function: types.FunctionType):
        name = _home(function)
        if name is None:
            raise UnseenError(f"a function {function.__qualname__} of {function.__globals__.get('__name__')}")
        self.snapshot.add_function(function)
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self._describe(cell.cell_contents))
            except ValueError:  # Nothing is in it yet.
                cells.append("empty")
        values = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        defaults = [value for value in values if type(value) in _PLAIN]
        return "function", name, function.__qualname__, function.__code__.co_firstlineno, defaults, cells

    def _describe_object(self, value):
        """Describe an object that is no module, tensor, function or plain container."""
        kind = type(value)
        if isinstance(value, _STATELESS):
            return kind.__qualname__, repr(value)
        if isinstance(value, _APART):
            return kind.__qualname__
        if isinstance(value, types.ModuleType):
            return "file", value.__name__
        if isinstance(value, type):
            return self._describe_class(value)
        if isinstance(value, _BUILTIN):
            return self._describe_builtin(value)
        if isinstance(value, weakref.ref):
            return "reference", self._describe(value())
        if kind.__module__ == "contextlib":  # A context manager that decorates a function.
            return kind.__qualname__, [self._describe(part) for name, part in vars(value).items() if name != "gen"]
        for wrapper, names in _WRAPPERS.items():
            if isinstance(value, wrapper):
                return wrapper.__name__, [self._describe(getattr(value, name)) for name in names]
        if is_part_of_compiler(kind):
            return kind.__qualname__, self._describe(compiler_backend(value))
        return self._describe_instance(value)

    def _describe_builtin(self, function):
        bound = getattr(function, "__self__", None)
        is_state = type(bound) in _CONTAINERS or isinstance(bound, (torch.Tensor, torch.nn.Module))
        state = is_state and self._describe(bound)
        return "builtin", getattr(function, "__module__", None), function.__qualname__, state

    def _describe_class(self, kind: type):
        if not _is_library(kind.__module__):
            raise UnseenError(f"a class {kind.__qualname__} of {kind.__module__}")
        return "class", kind.__module__, kind.__qualname__

    def _describe_instance(self, value):
        """Describe an object of a known package: its ``__dict__``, and its items if it is a container."""
        kind = type(value)
        if not is_known(kind) or not hasattr(value, "__dict__"):
            raise UnseenError(f"an object of class {kind.__qualname__} of {kind.__module__}")
        items = self._describe_container(value) if isinstance(value, (dict, list, tuple, set)) else None
        own = vars(value)
        copy = dict(own)
        self.snapshot.add_container(own, copy)
        return kind.__module__, kind.__qualname__, items, [(name, self._describe(item)) for name, item in copy.items()]

    def _describe_source(self, source: type | types.ModuleType | None) -> None:
        """Describe the code of a class or a file, once per inspection: a patch shows there."""
        if source is None or source in self._sources:
            return
        self._sources.add(source)
        if not _can_be_found(source):
            return self._describe_code(source)
        known = _known_sources.get(source)
        if known is None or not known[0].holds():
            known = _known_sources[source] = _code_of(source)
        self.snapshot.include(known[0])
        self.description.append(known[1])

    def _describe_code(self, source: type | types.ModuleType) -> None:
        if isinstance(source, type):
            self._describe_members(source)
        else:
            self._describe_file(source)

    def _describe_members(self, kind: type) -> None:
        """Describe the members that a class defines: functions, properties and plain values."""
        if not is_known(kind) and not _is_python(kind.__module__):
            raise UnseenError(f"a module class {kind.__qualname__} of {kind.__module__}")
        members = dict(vars(kind))
        self.snapshot.add_container(vars(kind), members)
        for name, value in members.items():
            is_code = callable(value) or hasattr(type(value), "__get__")
            if name not in _OF_GENERATE and (type(value) in _PLAIN or is_code and not isinstance(value, type)):
                self.description.append(repr((name, self._describe(value))))

    def _describe_file(self, module: types.ModuleType) -> None:
        """Describe the functions that a file's functions call by their globals."""
        functions = {
            name: value
            for name, value in dict(vars(module)).items()
            # What torch.compile adds begins with two underscores.
            if callable(value) and not isinstance(value, type) and not name.startswith("__")
        }
        self.snapshot.add_functions(vars(module), functions)
        for name, value in functions.items():
            is_code = isinstance(value, (*_BUILTIN, *_WRAPPERS, types.FunctionType, types.MethodType))
            is_code = is_code or function_in_module(value) is not None
            self.description.append(repr((name, self._describe(value if is_code else type(value)))))


def _code_of(source: type | types.ModuleType) -> tuple[Snapshot, str]:
    """The snapshot of the code of a class or a file, and a digest of its description."""
    inspection = Inspection()
    inspection._describe_code(source)
    if inspection.modules or inspection.contents:
        raise UnseenError(f"code of {source.__name__} that holds modules or tensors")
    return inspection.snapshot, hashlib.sha256("\n".join(inspection.description).encode()).hexdigest()


def _can_be_found(source: type | types.ModuleType) -> bool:
    """Tell whether a class or file is there for good; a class that was made on the fly may be let go of."""
    if isinstance(source, type):
        return getattr(sys.modules.get(source.__module__), source.__qualname__, None) is source
    return sys.modules.get(source.__name__) is source


def _copied(container):
    """A plain copy of a list, dict, set or deque, or of a subclass of these."""
    try:
        return next(plain for plain in (dict, list, set, collections.deque) if isinstance(container, plain))(container)
    except (RuntimeError, KeyError) as error:
        raise UnseenError("a change by another thread") from error


def _home(function: types.FunctionType) -> str | None:
    """The module of a library in which a function was written; None if it was written elsewhere.

    Asks its globals and its code: ``functools.wraps`` gives a patch the name and the module of what it replaces.
    """
    name, file = (function.__globals__.get(key) for key in ("__name__", "__file__"))
    if not isinstance(name, str):
        return None
    is_library = _is_library(name) and function.__code__.co_filename == file
    return name if is_library or _is_python(name) else None


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES or _is_python(module)


def _is_python(module: str | None) -> bool:
    return (module or "").partition(".")[0] in sys.stdlib_module_names


def _check_passive(hook) -> None:
    """Refuse a forward hook that may change what its module computes.

    Raises
    ------
    UnseenError
        If it comes from outside the libraries whose hooks do not.
    """
    while isinstance(hook, (functools.partial, types.MethodType)):
        hook = hook.func if isinstance(hook, functools.partial) else hook.__func__
    home = _home(hook) if isinstance(hook, types.FunctionType) else None
    if home is None or home.partition(".")[0] not in _PASSIVE:
        raise UnseenError(f"a forward hook, {getattr(hook, '__qualname__', type(hook).__qualname__)},")
