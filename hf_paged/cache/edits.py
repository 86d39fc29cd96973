"""Edits in place: a reader may change the tensors that a cache hands out, as it may change those of a dense cache.

So what was handed out is compared with the pages before the cache changes or is read again.
"""

import torch


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors have the same bytes: NaN equals itself, and -0.0 is not 0.0.

    `_version` would miss edits through ``.data`` or NumPy; and a tensor that was edited in one expression
    (``layer.values[:, :, -1] += 3``) is gone before the layer is used again.
    """
    return torch.equal(*(states.detach().contiguous().view(torch.uint8) for states in (one, other)))
