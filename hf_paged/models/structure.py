"""The structure of a model: all that decides whether packed steps work in it, as far as that can be seen.

In evaluation mode its modules alone decide. In training mode their settings do, too: dropout, layers that are skipped,
noise of a router.
"""

from collections.abc import Iterator

import torch

from hf_paged.compat.torch import module_parts
from hf_paged.execution.prepacked_linear import PrepackedForward

_SETTINGS = (bool, int, float, str)


def structure(model: torch.nn.Module) -> tuple:
    """A value that changes when the model is moved, cast, taken apart, adapted or hooked.

    Compared, never looked into. It holds no reference to the model. Of a forward that was replaced it knows the
    address alone, and it sees no change inside a function.
    """
    config = getattr(model, "config", None)
    settings = vars(config.get_text_config(decoder=True)) if config is not None else {}
    scalars = tuple((name, value) for name, value in settings.items() if isinstance(value, _SETTINGS))
    return scalars, tuple(_parts(module) for module in model.modules())


def training_state(model: torch.nn.Module) -> tuple | None:
    """A value that changes when what some modules do in training mode may change; None if all are in evaluation mode.

    Compared, never looked into: the structure, and every number and text among the attributes of the modules.
    """
    modules = list(model.modules())
    if not any(module.training for module in modules):
        return None
    return structure(model), tuple(tuple(_settings(module)) for module in modules)


def _settings(module: torch.nn.Module) -> Iterator[tuple[str, bool | int | float | str]]:
    return ((name, value) for name, value in vars(module).items() if isinstance(value, _SETTINGS))


def _parts(module: torch.nn.Module) -> tuple:
    forward = module.__dict__.get("forward")
    own_forward = None if forward is None or isinstance(forward, PrepackedForward) else id(forward)
    parameters, buffers, _, hooks, pre_hooks = module_parts(module.__dict__)
    tensors = (*parameters.values(), *buffers.values())
    places = tuple((tensor.dtype, tensor.device, tensor.shape) for tensor in tensors if tensor is not None)
    return type(module), own_forward, len(hooks), len(pre_hooks), places
