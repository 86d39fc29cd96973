"""Private names of torch. What runs in every layer or step is torch's own object, bound at import."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import overrides
from torch.nn.modules import module as modules
from torch.utils import _device, _python_dispatch, _pytree

# Tensors

version_of: Callable[[torch.Tensor], int] = operator.attrgetter("_version")
"""How often a tensor was written to in place: ``Tensor._version``, which torch shows under no other name.

Inference tensors keep no count; asking one raises `RuntimeError`.
"""

make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
"""``Tensor._make_wrapper_subclass(cls, shape, *, dtype, device)``: a tensor without storage.

torch's guide to ``__torch_dispatch__`` builds on it, and no public constructor does the same.
"""

is_wrapper_subclass = _python_dispatch.is_traceable_wrapper_subclass
"""Tell whether a tensor is made of inner tensors that ``__tensor_flatten__`` names.

``torch.utils._python_dispatch.is_traceable_wrapper_subclass``: the protocol is documented, its test is not public.
"""

tree_map_only = _pytree.tree_map_only
"""``torch.utils._pytree.tree_map_only(type, function, tree)``. torch has no public pytree module."""


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested containers, as ``torch.utils._pytree`` sees these; those without storage left out."""
    leaves = _pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not is_wrapper_subclass(leaf)]


TO_COPY = torch.ops.aten._to_copy.default
"""The operator of ``Tensor.to``. Operators reach ``__torch_dispatch__`` as such objects, whatever their name."""


def writes_to_input(operation: Any) -> bool:
    """Tell whether an operator, as ``__torch_dispatch__`` gets it, writes to one of its arguments.

    Reads ``OpOverload._schema``. The public ``torch.library`` tells this of one's own operators only.
    """
    return operation._schema.is_mutable


DispatchMode = _python_dispatch.TorchDispatchMode
"""A context whose ``__torch_dispatch__`` sees every operator that this thread runs: ``TorchDispatchMode``.

``torch.utils._python_dispatch``: torch's guides build on it, and no public module exports it.
"""


def draws_random_numbers(operation: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operator, as ``__torch_dispatch__`` gets it, draws random numbers with these arguments.

    Its tags are public. Fused attention has the tag always, and draws where its ``dropout_p`` is not 0: the place of
    that comes from ``OpOverload._schema``.
    """
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    names = [argument.name for argument in operation._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return bool(args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))


_TO_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def returns_to_host(operation: Any, args: tuple) -> bool:
    """Tell whether the host learns from an operator what tensors hold: a number, or a size that depends on it.

    Its tags are public. Indexing has the tag always, and such a size where it selects by a mask.
    """
    if operation is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return any(tag in operation.tags for tag in _TO_HOST)


# Modules

module_parts: Callable[[Mapping[str, Any]], tuple[dict, ...]] = operator.itemgetter(
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"
)
"""Of ``vars(module)`` the parameters, buffers and children by name, the forward hooks and forward pre-hooks by id.

Hooks have no public view. ``named_parameters`` and its kin give copies without the names that hold None.
"""

children_of: Callable[[torch.nn.Module], dict[str, torch.nn.Module | None]] = operator.attrgetter("_modules")
"""The children of a module by name: ``Module._modules``. ``Module.named_children`` is slower by its check for twins."""

forward_pre_hooks: Callable[[torch.nn.Module], dict[int, Callable]] = operator.attrgetter("_forward_pre_hooks")
"""The forward pre-hooks of a module by id: ``Module._forward_pre_hooks``, of which there is no public view."""

has_global_hook = modules._has_any_global_hook
"""Tell whether a hook sees the forwards of all modules: ``torch.nn.modules.module._has_any_global_hook``.

The hooks of ``register_module_forward_hook`` and its kin have no public view.
"""

# Modes: context managers that see every call of torch in a thread

count_function_modes = torch._C._len_torch_function_stack
"""How many function modes this thread is in: ``torch._C._len_torch_function_stack``."""

count_dispatch_modes = torch._C._len_torch_dispatch_stack
"""How many dispatch modes this thread is in: ``torch._C._len_torch_dispatch_stack``."""

function_modes = overrides._get_current_function_mode_stack
"""The function modes that this thread is in: ``torch.overrides._get_current_function_mode_stack``.

The documentation says how to enter a mode, and gives no view of those that are entered.
"""

dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack
"""The dispatch modes that this thread is in: ``torch.utils._python_dispatch._get_current_dispatch_mode_stack``."""

DeviceMode = _device.DeviceContext
"""The function mode of ``torch.set_default_device`` and of ``with torch.device(...)``: ``torch.utils._device``."""

# torch.compile


def is_part_of_compiler(kind: type) -> bool:
    """Tell whether a class is ``torch.compile``'s own: such objects stand where a model's forward was.

    They come from ``torch._dynamo``; ``torch.compiler`` has no test for them.
    """
    return kind.__module__.startswith("torch._dynamo.")


def compiler_backend(part: Any) -> Any:
    """The backend that a part of ``torch.compile`` hands graphs to; None if it has none.

    Follows ``callback`` and ``_torchdynamo_orig_backend``, by which wrappers of Dynamo remember what they wrap.
    ``torch.compile`` keeps the backend it is given, and gives it back nowhere.
    """
    backend = getattr(part, "callback", part)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return None if backend is part else backend


# oneDNN: operators that `torch.compile` uses for frozen weights. torch has no public way to keep a weight prepacked.
# A torch that was built without oneDNN has none of them.

_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_multiply: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HALF_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@functools.cache
def prepackable_dtypes() -> frozenset[torch.dtype]:
    """Dtypes of the weights that oneDNN prepacks and multiplies on this processor; none without oneDNN.

    Asks ``torch.ops.mkldnn._is_mkldnn_bf16_supported`` and its fp16 twin.
    """
    if not torch.backends.mkldnn.is_available() or _reorder is None or _multiply is None:
        return frozenset()
    checks = {dtype: getattr(torch.ops.mkldnn, name, None) for dtype, name in _HALF_CHECKS.items()}
    return frozenset({torch.float32, *(dtype for dtype, check in checks.items() if check is not None and check())})


def prepack_linear_weight(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A copy of a weight in the layout of oneDNN's matrix kernels, opaque to all else.

    Parameters
    ----------
    weight : torch.Tensor
        ``[out_features, in_features]``, contiguous, on the CPU, of one of `prepackable_dtypes`.
    num_rows : int
        The layout is chosen for a product of so many rows. Other products read it as well.
    """
    return _reorder(weight, num_rows)


def prepacked_linear(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``torch.nn.functional.linear`` with a weight of `prepack_linear_weight`.

    Parameters
    ----------
    input : torch.Tensor
        ``[..., in_features]``, not empty, of the weight's dtype.

    Returns
    -------
    torch.Tensor
        ``[..., out_features]``
    """
    return _multiply(input, packed, bias, "none", [], "")
