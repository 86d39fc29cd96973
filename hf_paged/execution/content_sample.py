"""A sample of a tensor's content: it shows an edit that left no trace, through ``.data`` or by a fused optimizer.

torch counts writes in place by a tensor's version; fused optimizers write without it.

A sample is a view with two strides, so that the samples of many tensors are copied together: on a GPU, where a model's
hundreds of tensors would take a launch each, torch concatenates some sixty views in one.
"""

import collections
import functools
from collections.abc import Iterable

import torch

_SAMPLES = 64  # Elements of each tensor.
_GOLDEN_RATIO = 0.6180339887498949
_MOST_ELEMENTS = 2**31 - 1  # Beyond it torch concatenates one by one: one such tensor would slow all others down.


class ContentSamples:
    """Some elements of each of many tensors, always the same ones.

    Parameters
    ----------
    contents : iterable of torch.Tensor
        Detached ones.
    """

    def __init__(self, contents: Iterable[torch.Tensor]):
        # By device, dtype and number of columns: what can be concatenated.
        self._views: dict[tuple[torch.device, torch.dtype, int], list[torch.Tensor]] = collections.defaultdict(list)
        self._others: list[torch.Tensor] = []  # Those that no view samples.
        for content in map(_with_whole_bytes, contents):
            lattice = _lattice(content.shape, content.stride())
            if lattice is None:
                self._others.append(content)
            else:
                self._views[content.device, content.dtype, lattice[0][1]].append(content.as_strided(*lattice))

    def read(self) -> bytes:
        """The samples as they are now, with one copy from each device."""
        parts: dict[torch.device, list[torch.Tensor]] = collections.defaultdict(list)
        for (device, _, _), views in self._views.items():
            parts[device].append(torch.cat(views).view(-1).view(torch.uint8))
        for content in self._others:
            parts[content.device].append(_take(content).view(torch.uint8))
        return b"".join(torch.cat(each).cpu().numpy().tobytes() for each in parts.values())


def sample(content: torch.Tensor) -> torch.Tensor:
    """Copy some elements of a detached tensor, always the same ones."""
    content = _with_whole_bytes(content)
    lattice = _lattice(content.shape, content.stride())
    return _take(content) if lattice is None else content.as_strided(*lattice).clone()


def _with_whole_bytes(content: torch.Tensor) -> torch.Tensor:
    """The tensor, or its bytes where its dtype is one of those of a byte that few operators know."""
    return content if content.itemsize > 1 else content.view(torch.uint8)


@functools.lru_cache(maxsize=1024)
def _lattice(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Shape and strides of a view of a tensor; None if the tensor leaves gaps in memory, or is too large.

    Rows of the view go far down the tensor's rows and a little along its columns, columns of the view the other way: so
    few elements share a row or a column, and an edit of a whole row or column of a small matrix is seen.
    """
    width, count = 1, 1  # Of the axis whose elements lie side by side, and of all.
    for step, size in sorted(zip(stride, shape)):
        if size != 1:
            if step != count:
                return None
            width = size if count == 1 else width
            count *= size
    if count == 0:
        return (0, 1), (1, 1)
    if count > _MOST_ELEMENTS:
        return None
    height = count // width
    rows = min(height, _SAMPLES // min(width, 8))
    columns = min(width, _SAMPLES // rows)
    if min(height, width) == 1:
        return (rows, columns), (height // rows * width, max(1, width // columns))
    # Of a matrix with fewer rows or columns than samples every one is to be seen: a step of one may make up for none,
    # and a shorter step leave room for it.
    down, along = max(
        (
            (
                (height // rows - up) * width + max(right, width // _SAMPLES),
                max(low, height // _SAMPLES) * width + width // columns - left,
            )
            for up in ((0, 1) if height >= 2 * rows else (0,))
            for left in ((0, 1) if width >= 2 * columns else (0,))
            for right in (0, 1)
            for low in (0, 1)
        ),
        key=lambda strides: _num_seen((rows, columns), strides, width, count),
    )
    return (rows, columns), (down, along)


def _num_seen(shape: tuple[int, int], strides: tuple[int, int], width: int, count: int) -> int:
    """Rows, columns and elements that a view sees of a matrix of `count` elements; 0 if it reaches behind them."""
    places = [row * strides[0] + column * strides[1] for row in range(shape[0]) for column in range(shape[1])]
    if places[-1] >= count:
        return 0
    return len({place // width for place in places}) + len({place % width for place in places}) + len(set(places))


def _take(content: torch.Tensor) -> torch.Tensor:
    """Some elements of any tensor, ``[num_samples]``: they need an index on its device."""
    return content.take(_index(content.numel(), content.device))


@functools.lru_cache(maxsize=64)
def _index(count: int, device: torch.device) -> torch.Tensor:
    """Indices into a tensor of `count` elements, ``[num_samples]`` int64, over rows and columns alike."""
    numbers = torch.arange(min(count, _SAMPLES), dtype=torch.float64)
    index = numbers if count <= _SAMPLES else (numbers * _GOLDEN_RATIO) % 1 * count
    return index.long().to(device)
