"""Quantised pages: codes of eight bits with a scale for each token and head, in torch.

A vector of one token and head is ``codes * scale``. Its scale maps its largest number to the largest code, so what a
slot holds depends on no other slot.

The keys of many models have a few channels that are far larger than the others (those of Qwen2.5 by their biases).
Such a channel would set the scale, and the others would be lost to rounding. Keys are therefore rotated by a
Walsh-Hadamard transform before they are quantised, which spreads each channel over all of them (QuaRot, Ashkboos et
al., 2024). Queries are rotated alike: it is orthogonal, so the scores stay as they are. Values are not rotated.
"""

import functools

import torch

# The largest number that a code of each dtype stands for.
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(states: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn vectors into codes and scales.

    Parameters
    ----------
    states : torch.Tensor
        ``[..., head_dim]``
    dtype : torch.dtype
        Of the codes, one of `LARGEST_CODE`.

    Returns
    -------
    codes : torch.Tensor
        ``[..., head_dim]``; all zero where the vector is.
    scales : torch.Tensor
        ``[..., 1]`` float32. Of a vector that is not finite it is not either, so that `dequantize` is NaN.
    """
    states = states.to(_computed_in(states.dtype))
    largest = LARGEST_CODE[dtype]
    scales = states.abs().amax(-1, keepdim=True) / largest
    # A vector whose largest number underflows here is zero.
    codes = states / torch.where(scales > 0, scales, 1)
    codes = codes.nan_to_num(0).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales.to(torch.float32)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Turn codes ``[..., head_dim]`` and scales ``[..., 1]`` into vectors, computed in `dtype`."""
    return codes.to(dtype) * scales.to(dtype)


def rotate(states: torch.Tensor) -> torch.Tensor:
    """Rotate vectors ``[..., head_dim]``, in float32 or better; applied twice it gives them back.

    Each of the `rotated_size` parts of a vector that lie side by side is transformed by itself.
    """
    states = states.to(_computed_in(states.dtype))
    size = rotated_size(states.shape[-1])
    if size == 1:
        return states
    return (states.unflatten(-1, (-1, size)) @ _hadamard(size, states.dtype, states.device)).flatten(-2)


def rotated_size(head_dim: int) -> int:
    """The channels that are mixed with each other: the largest power of two that divides `head_dim`."""
    return head_dim & -head_dim


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@functools.lru_cache(maxsize=64)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:  # [size, size]
    """The orthonormal matrix, which is its own inverse."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / size**0.5).to(dtype).to(device)
