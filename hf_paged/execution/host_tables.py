"""HostTables: the block tables of a step's rows as matrices on the host, kept from step to step. No tensors here."""

from dataclasses import dataclass

import numpy as np

from hf_paged.memory.block_table import BlockTable


class HostTables:
    """One matrix of block ids per KV cache group, whose rows are those of the step.

    Most rows of a decode step have the blocks that they had before, and a few one more: only what changed is written.

    Parameters
    ----------
    matrices : list of np.ndarray
        ``[most rows, table width]`` int64 of zeros, one per group.
    """

    def __init__(self, matrices: list[np.ndarray]):
        self._matrices = matrices
        self._shown: list[_Shown] | None = None  # What the matrices hold, by group; None: nothing is known.

    def show(self, groups: list[list[BlockTable]]) -> list[np.ndarray]:
        """Make the rows of each matrix the blocks of a group's tables, with zeros behind the last.

        Returns
        -------
        list of np.ndarray
            The matrices. Rows behind those of the step are left as they were.
        """
        shown, self._shown = self._shown, None  # An interrupt may come at any line: then all is written anew.
        if shown is None:
            shown = [_Shown([], [], [])] * len(self._matrices)
        self._shown = [_show(*each) for each in zip(self._matrices, groups, shown, strict=True)]
        return self._matrices


@dataclass(frozen=True)
class _Shown:
    """The tables that a matrix holds, as they were then."""

    tables: list[BlockTable]
    edits: list[int]
    lengths: list[int]


def _show(matrix: np.ndarray, tables: list[BlockTable], shown: _Shown) -> _Shown:
    """Write what the tables of a group have become since they were shown."""
    edits = [table.num_edits for table in tables]
    lengths = [len(table.blocks) for table in tables]
    new = _Shown(tables, edits, lengths)
    if tables != shown.tables:
        shown = _move(matrix, tables, shown)
    if edits == shown.edits and lengths == shown.lengths:
        return new
    for row, table in enumerate(tables):
        length, before = lengths[row], shown.lengths[row]
        if edits[row] != shown.edits[row]:
            matrix[row, :length] = table.blocks
            matrix[row, length:] = 0
        elif length != before:
            matrix[row, before:length] = table.blocks[before:]
    return new


def _move(matrix: np.ndarray, tables: list[BlockTable], shown: _Shown) -> _Shown:
    """Bring rows that were shown before to where they are now. The others are marked as edited."""
    row_of = {table: row for row, table in enumerate(shown.tables)}
    sources = [row_of.get(table, -1) for table in tables]
    matrix[: len(tables)] = matrix[sources]  # What comes from row -1 is written anew.
    return _Shown(
        tables,
        [-1 if row < 0 else shown.edits[row] for row in sources],
        [0 if row < 0 else shown.lengths[row] for row in sources],
    )
