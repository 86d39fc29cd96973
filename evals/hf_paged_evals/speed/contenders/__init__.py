"""Whoever takes part, by name."""

import functools

from hf_paged_evals.suite.models import Models

from .interface import Contender, Lengths
from .llama_cpp import LlamaCpp
from .local import Dense, GenerateBatch, Paged
from .openvino import OpenVINO
from .vllm import VLLM

__all__ = ["EXTRAS", "Contender", "Lengths", "contender", "label"]

_BATCHED = {"dense": Dense, "paged": Paged}
_WHOLE = {each.name: each for each in (GenerateBatch, LlamaCpp, VLLM, OpenVINO)}
EXTRAS = tuple(each.name for each in (LlamaCpp, VLLM, OpenVINO))  # Each needs a package of its own.


@functools.cache  # The extras hold a model of their own.
def contender(models: Models, name: str, batch: int | None = None) -> Contender:
    """The contender of that name; `batch`, for dense and paged, is the rows it takes at a time."""
    return _BATCHED[name](models, batch) if name in _BATCHED else _WHOLE[name](models)


def label(name: str, batch: int | None) -> str:
    """As tables name it."""
    return name if batch is None else f"{name}, batch {batch}"
