"""The contenders of the speed tasks, by name."""

import functools

from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.speed.contenders.interface import Contender, Lengths
from hf_paged_evals.speed.contenders.llama_cpp import LlamaCpp
from hf_paged_evals.speed.contenders.local import Dense, GenerateBatch, Paged, Prepacked
from hf_paged_evals.speed.contenders.openvino import OpenVINO
from hf_paged_evals.speed.contenders.vllm import VLLM

__all__ = ["EXTRAS", "Contender", "Lengths", "contender", "label"]

_BATCHED = {each.name: each for each in (Dense, Paged, Prepacked)}
_WHOLE = {each.name: each for each in (GenerateBatch, LlamaCpp, VLLM, OpenVINO)}
EXTRAS = tuple(each.name for each in (LlamaCpp, VLLM, OpenVINO))  # Each needs a package of its own.


@functools.cache  # The extras hold a model of their own.
def contender(models: ModelPair, name: str, batch: int | None = None) -> Contender:
    """The contender of that name. `batch`, for those that take batches, is the rows it takes at a time."""
    return _BATCHED[name](models, batch) if name in _BATCHED else _WHOLE[name](models)


def label(name: str, batch: int | None) -> str:
    """The name of a contender in tables."""
    return name if batch is None else f"{name}, batch {batch}"
