"""A sample of a tensor's content: it shows an edit that left no trace, through ``.data`` or by a fused optimizer.

torch counts writes in place by a tensor's version; fused optimizers write without it.
"""

import functools

import torch

_SAMPLES = 64  # Elements of each tensor.
_GOLDEN_RATIO = 0.6180339887498949


def sample(content: torch.Tensor) -> torch.Tensor:
    """Take some elements of a detached tensor, always the same ones: ``[num_samples]``."""
    content = content if content.itemsize > 1 else content.view(torch.uint8)
    # Spread over rows and columns alike, as an even stride would not be.
    return content.take(_index(content.numel(), content.device))


@functools.lru_cache(maxsize=1024)
def _index(count: int, device: torch.device) -> torch.Tensor:
    """Indices into a tensor of `count` elements, ``[num_samples]`` int64."""
    numbers = torch.arange(min(count, _SAMPLES), dtype=torch.float64)
    index = numbers if count <= _SAMPLES else (numbers * _GOLDEN_RATIO) % 1 * count
    return index.long().to(device)
