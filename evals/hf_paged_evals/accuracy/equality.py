"""Equality with dense: the same tokens row by row, or a first difference that float64 calls a tie."""

import copy
from dataclasses import dataclass

import torch

MARGIN = 1e-5


@dataclass(frozen=True)
class Difference:
    """The first token in which a row differs, and the float64 gap between the two likeliest tokens there."""

    row: int
    position: int
    margin: float

    @property
    def is_tie(self) -> bool:
        return self.margin < MARGIN

    def __str__(self) -> str:
        return f"row {self.row} differs at {self.position}: float64 top-2 margin {self.margin:.2e}"


def differences(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    dense: torch.Tensor,  # [rows, tokens]
    paged: torch.Tensor,  # [rows, tokens]
) -> list[Difference]:
    """The rows in which two outputs of `generate` differ.

    Parameters
    ----------
    model : torch.nn.Module
        The dense model; a float64 copy of it judges the margins.
    inputs : dict
        ``input_ids`` and ``attention_mask`` as `generate` got them, ``[batch, positions]``; `dense` may
        hold several rows for each.

    Raises
    ------
    ValueError
        If the outputs differ in shape.
    """
    if dense.shape != paged.shape:
        raise ValueError(f"outputs of shape {tuple(dense.shape)} and {tuple(paged.shape)}: {dense} {paged}")
    rows = (dense != paged).any(1).nonzero().flatten().tolist()
    firsts = [int((dense[row] != paged[row]).nonzero()[0]) for row in rows]
    return [Difference(row, at, _margin(model, inputs, dense, row, at)) for row, at in zip(rows, firsts)]


def _margin(model, inputs, dense, row: int, at: int) -> float:
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # The grouped products of experts know no float64.
    given = inputs["attention_mask"][row * len(inputs["input_ids"]) // len(dense)]
    mask = torch.ones(1, at, dtype=torch.long)
    mask[0, : len(given)] = given[:at]
    with torch.no_grad():
        logits = exact(dense[row : row + 1, :at], attention_mask=mask, use_cache=False).logits[0, -1]
    top = logits.topk(2).values
    return float(top[0] - top[1])
