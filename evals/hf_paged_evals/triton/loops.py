"""Loops of disassembled code: basic blocks, dominators, and the instructions that run in every iteration.

A branch backwards is not a loop by itself: compilers put waits that spin, and rare paths, behind a function's end.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Jump:
    """The target of an instruction; `falls`: it may also go on to the next one."""

    label: str | None
    falls: bool


@dataclass
class Block:
    instructions: list[str]
    successors: list[int]


def natural_loops(lines: Iterable[str], is_label: re.Pattern, jump: Callable[[str], Jump | None]) -> list[list[str]]:
    """The instructions of each loop, innermost loops first.

    Parameters
    ----------
    lines : iterable of str
        Labels and instructions of one function.
    is_label : re.Pattern
        Matches a label line; its first group is the name.
    jump : callable
        Returns the target of an instruction, or None if it does not branch.
    """
    blocks = _blocks(lines, is_label, jump)
    predecessors = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(index)
    dominators = _dominators(blocks, predecessors)
    loops: dict[int, set[int]] = {}
    for latch, block in enumerate(blocks):
        for header in block.successors:
            if header in dominators[latch]:
                loops.setdefault(header, set()).update(_body(header, latch, predecessors))
    ordered = sorted(loops.values(), key=len)
    return [[line for index in sorted(body) for line in blocks[index].instructions] for body in ordered]


def _blocks(lines, is_label, jump) -> list[Block]:
    blocks, starts, jumps = [Block([], [])], {}, {}
    for line in lines:
        if (label := is_label.match(line)) is not None:
            if blocks[-1].instructions:
                blocks.append(Block([], []))
            starts[label[1]] = len(blocks) - 1
            continue
        blocks[-1].instructions.append(line)
        if (found := jump(line)) is not None:
            jumps[len(blocks) - 1] = found
            blocks.append(Block([], []))
    for index, block in enumerate(blocks):
        found = jumps.get(index, Jump(None, True))
        if found.falls and index + 1 < len(blocks):
            block.successors.append(index + 1)
        if found.label in starts:
            block.successors.append(starts[found.label])
    return blocks


def _dominators(blocks: list[Block], predecessors: list[list[int]]) -> list[set[int]]:
    """For each block those on every way to it; for one that cannot be reached, nothing."""
    reached, waiting = {0}, [0]
    while waiting:
        for successor in blocks[waiting.pop()].successors:
            if successor not in reached:
                reached.add(successor)
                waiting.append(successor)
    dominators = [set(reached) if index in reached else set() for index in range(len(blocks))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in sorted(reached - {0}):
            before = [dominators[other] for other in predecessors[index] if other in reached]
            new = {index} | set.intersection(*before)
            if new != dominators[index]:
                dominators[index], changed = new, True
    return dominators


def _body(header: int, latch: int, predecessors: list[list[int]]) -> set[int]:
    body, waiting = {header, latch}, [latch] if latch != header else []
    while waiting:
        for other in predecessors[waiting.pop()]:
            if other not in body:
                body.add(other)
                waiting.append(other)
    return body
