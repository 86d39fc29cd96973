"""The exceptions a user of hf_paged can meet."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # The allocator raises these, and imports no torch.
    import torch


class PagedError(Exception):
    """Base class of every error that hf_paged raises on purpose."""


class OutOfBlocksError(PagedError, RuntimeError):
    """The block pool cannot serve an allocation, or cannot be allocated itself. No block was taken.

    Attributes
    ----------
    needed, free, total : int
        Blocks asked for, blocks available (free or cached), blocks in the pool. Of a pool that cannot be allocated:
        its blocks, those that the device has memory for, and 0.
    sequences : torch.Tensor or None
        ``[batch, positions]`` int64: the tokens of all rows so far, where a packed call of ``generate`` raises this.
    """

    def __init__(self, needed: int, free: int, total: int, text: str | None = None):
        self.needed, self.free, self.total = needed, free, total
        self.sequences: torch.Tensor | None = None
        super().__init__(
            text
            or f"needs {needed} blocks, {free} of {total} are free: lower the batch or the context, "
            "or raise memory_budget with hf_paged.configure(model, hf_paged.PagedConfig(memory_budget=...))"
        )


class BlockError(PagedError, ValueError):
    """A block was freed twice, or used after it was freed."""


class MissingPackageError(PagedError, ImportError):
    """A package that only a command or an evaluation needs is not installed.

    Parameters
    ----------
    package : str
        What is missing, by the name that users know.
    requirement : str
        What pip installs it by. For an extra ``hf-paged[NAME]``: pip takes the hf-paged that is installed, from
        whatever it was installed, and adds the packages of the extra.
    """

    def __init__(self, package: str, requirement: str):
        super().__init__(f'{package} is not installed: pip install "{requirement}"')


class UnsupportedError(PagedError, ValueError):
    """A request that pages cannot serve and for which no equal dense path exists."""


class SavedPrefixError(PagedError, ValueError):
    """A saved prefix cannot be written, or its file is refused. Nothing was changed: no block, and no file."""
