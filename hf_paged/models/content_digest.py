"""A digest of what a model computes that another process finds again: its classes, settings and whole content.

The fingerprint tells whether a model has changed within a process. It knows addresses, and samples the content of
tensors: good for as long as the process holds the model. What is saved outlives both, and a fine-tuned copy may differ
in any element, so here every byte counts. Hashing takes a second for some gigabytes, and is done again only if the
fingerprint has changed.
"""

import hashlib
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_paged.compat.torch import is_wrapper_subclass, module_parts
from hf_paged.compat.transformers import (
    ATTRIBUTES_OF_ACCELERATE,
    CONFIG_SOURCE,
    LOADING_MARK,
    is_hooked_by_accelerate,
)
from hf_paged.execution.prepacked_linear import PrepackedForward

_THREADS = 4  # Each may hold a copy of a tensor that lies on another device.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype)
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
# Said of where weights come from and how they are placed; no forward reads them.
_NO_SETTINGS = {LOADING_MARK, "name_or_path", "generation_config", "loss_type", "hf_device_map"}
# Of a config: told by the tensors, or read outside the forward of a text.
_NO_SETTINGS_OF_CONFIG = {
    CONFIG_SOURCE,
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class ContentDigest:
    """The identity of a model for another process.

    Attributes
    ----------
    model : str
        Its class, with the module that has it.
    settings : str
        A digest in hexadecimal digits over the config, and over the classes and attributes of all modules: adapters
        that are active, training mode and scales among them.
    weights : str
        One over the name, dtype, shape and every byte of each parameter, buffer and other tensor.
    """

    model: str
    settings: str
    weights: str


# The digests of models by the fingerprint for which they were computed.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[bytes, ContentDigest]]" = weakref.WeakKeyDictionary()


def content_digest(model: PreTrainedModel, fingerprint: bytes) -> ContentDigest:
    """Hash a model, all of its content. The device on which a tensor lies does not count.

    Parameters
    ----------
    model : PreTrainedModel
        Inspected before: nothing from outside the known libraries takes part in its forward.
    fingerprint : bytes
        Its fingerprint in this process; as long as it stays the same, the digest is that of before.
    """
    known = _known.get(model)
    if known is None or known[0] != fingerprint:
        known = _known[model] = fingerprint, _digest_of(model)
    return known[1]


def _digest_of(model: PreTrainedModel) -> ContentDigest:
    settings = [repr(_config(model.config.to_dict()))]
    tensors: dict[int, torch.Tensor] = {}
    numbers: dict[int, int] = {}  # A tensor that is there twice is hashed once, and named twice.
    for name, module in model.named_modules():
        described, found = _describe_module(module)
        settings.append(repr((name, described)))
        for key, tensor in found:
            settings.append(repr((name, key, numbers.setdefault(id(tensor), len(tensors)))))
            tensors[numbers[id(tensor)]] = tensor
    with ThreadPoolExecutor(_THREADS) as threads:  # Hashing holds no lock of Python's.
        weights = list(threads.map(_hash_tensor, tensors.values()))
    kind = type(model)
    return ContentDigest(
        f"{kind.__module__}.{kind.__qualname__}",
        hashlib.sha256("\n".join(settings).encode()).hexdigest(),
        hashlib.sha256(b"".join(weights)).hexdigest(),
    )


def _describe_module(module: torch.nn.Module) -> tuple[list, list[tuple[str, torch.Tensor]]]:
    """The class and attributes of a module, and its tensors by name."""
    own = vars(module)
    is_model = isinstance(module, PreTrainedModel)  # Its private attributes are for loading and placing.
    passed_over = _NO_SETTINGS | ATTRIBUTES_OF_ACCELERATE if is_hooked_by_accelerate(module) else _NO_SETTINGS
    attributes = {
        name: value
        for name, value in own.items()
        if name not in _OF_EVERY_MODULE
        and name not in passed_over
        and not (is_model and name.startswith("_"))
        and not isinstance(value, PrepackedForward)
    }
    parameters, buffers, *_ = module_parts(own)
    held = {**parameters, **buffers, **attributes}
    tensors = [(name, value) for name, value in held.items() if isinstance(value, torch.Tensor)]
    plain = sorted((name, _describe(value)) for name, value in attributes.items())
    return [type(module).__module__, type(module).__qualname__, module.training, plain], tensors


def _describe(value) -> str:
    """A text for a value that is equal in another process; objects count by their class alone."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_describe(key)}: {_describe(item)}' for key, item in value.items()))}}}"
    if isinstance(value, list | tuple | set | frozenset):
        items = map(_describe, value)
        return f"[{', '.join(sorted(items) if isinstance(value, set | frozenset) else items)}]"
    if isinstance(value, partial):
        return f"partial {_describe(value.func)} {_describe(value.args)} {_describe(value.keywords)}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


def _config(settings: dict) -> list:
    """The fields of a config, and of those in it, that a forward may read."""
    return sorted(
        (name, _config(value) if isinstance(value, dict) else _describe(value))
        for name, value in ((str(name), value) for name, value in settings.items())
        if name not in _NO_SETTINGS_OF_CONFIG and not name.endswith("token_id")
    )


def _hash_tensor(tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256()
    for part in _plain_parts(tensor.detach()):
        digest.update(repr((part.dtype, tuple(part.shape))).encode())
        digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors of which one consists, itself in most cases."""
    if not is_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))
