"""Registers, memory and loops of a compiled kernel, read from the machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from hf_paged_evals.triton.loops import Jump, natural_loops

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|IMMA|FFMA2?|DMMA)\b|v_mfma_")
_COPY = re.compile(r"\b(?:LDGSTS|LDG)\b|(?:global|buffer)_load_")
_WIDE = re.compile(r"\.128\b|_dwordx4\b")
_ID = re.compile(r"\bLDG\.E(?:\.64)?(?:\.CONSTANT)?\s|_load_dword(?:x2)?\s")
_ASYNC = re.compile(r"\bLDGSTS\b")


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes
    ----------
    registers, spilled, shared : int
        Registers per thread; bytes of local memory per thread; bytes of shared memory per program.
    loops : list of list of str
        Instructions of each loop, innermost loops first.
    buffers : int
        Tiles of keys or values that shared memory holds at once, by the compiler's plan; 0: it keeps no plan.
    waits : int
        Copies that may still be under way when the hot loop begins to compute.
    """

    registers: int
    spilled: int
    shared: int
    loops: list[list[str]]
    all: list[str]
    buffers: int
    waits: int

    def hot_loop(self) -> list[str]:
        """The loop that computes on tiles copied ahead of it; the innermost with matrix products if none is."""
        products = [loop for loop in self.loops if any(_MATRIX.search(line) for line in loop)]
        ahead = [loop for loop in products if any(_ASYNC.search(line) for line in loop)]
        return (ahead or products or [[]])[0]


def wide_share(instructions: list[str]) -> float:
    """Of the loads that move keys and values, the share of 128 bits.

    Plain loads of 32 or 64 bits are block ids, slots and totals: keys and values of that width would be copied
    to shared memory, and narrower ones count as what they are.
    """
    loads = [line for line in instructions if _COPY.search(line) and not _ID.search(line)]
    return sum(bool(_WIDE.search(line)) for line in loads) / len(loads) if loads else 1.0


def read(compiled) -> Code:
    """Take a kernel that Triton compiled apart."""
    return _read_amd(compiled) if "amdgcn" in compiled.asm else _read_nvidia(compiled)


def _read_nvidia(compiled) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        text = _run("nvdisasm", "-c", file.name)
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    lines = []
    for line in text.splitlines():
        match = re.match(r"\s*(\.L_x_\d+:)|\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if match:
            lines.append(match[1] or match[2].strip())
    label = re.compile(r"(\.L_x_\d+):")
    loops = natural_loops(lines, label, _nvidia_jump)
    instructions = [line for line in lines if not label.match(line)]
    shared = compiled.metadata.shared
    spilled = found["STACK"] + found["LOCAL"]
    return Code(found["REG"], spilled, shared, loops, instructions, *_pipeline(compiled.asm["ttgir"]))


def _nvidia_jump(line: str) -> Jump | None:
    conditional = line.startswith("@")
    if re.search(r"\b(?:EXIT|RET)\b", line):
        return Jump(None, conditional)
    match = re.search(r"\bBRA\b[^`]*`\((\.L_x_\d+)\)", line)
    if match is None:
        return None
    # A branch may carry its condition as an operand: BRA P0, `(.L_x_1).
    return Jump(match[1], conditional or bool(re.search(r"\bBRA[.\w]*\s+!?U?P\w+", line)))


def _read_amd(compiled) -> Code:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    lines = []
    for line in text.splitlines():
        line = line.split(";")[0].rstrip()
        if re.match(r"\.LBB\d+_\d+:", line) or re.match(r"\t[a-z]\w*", line):
            lines.append(line.strip())
    label = re.compile(r"(\.LBB\d+_\d+):")
    loops = natural_loops(lines, label, _amd_jump)
    spilled = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
    instructions = [line for line in lines if not label.match(line)]
    # On these chips the next tile waits in registers: there is no plan of buffers to read.
    return Code(number("vgpr_count"), spilled, compiled.metadata.shared, loops, instructions, 0, 0)


def _amd_jump(line: str) -> Jump | None:
    if line.startswith("s_endpgm"):
        return Jump(None, False)
    match = re.match(r"s_(c?branch)\w*\s+(\.LBB\d+_\d+)", line)
    return Jump(match[2], match[1] == "cbranch") if match else None


def _pipeline(ttgir: str) -> tuple[int, int]:
    """Buffers a pipelined tile has, and the copies that a wait in a loop leaves under way: the best loop's."""
    buffers = [
        int(shape.split("x")[0]) for shape in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<([\dx]+)x\w", ttgir)
    ]
    waits = [int(number) for number in re.findall(r"async_wait.*?num = (\d+)", ttgir)]
    return max(buffers, default=1), max(waits, default=0)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
