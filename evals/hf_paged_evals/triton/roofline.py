"""The speed that memory alone would allow: an estimate of decode attention on GPUs that are not here."""

from dataclasses import dataclass

from hf_paged_evals.triton.targets import TARGETS, Target

_MOST_OF_PEAK = 0.85  # Good kernels reach this share of the bandwidth on the data sheet.
_ISSUE = 4  # Instructions that a processor can issue per cycle.
_CLOCK = {"sm80": 1.41e9, "sm90": 1.755e9, "sm100": 1.85e9, "gfx942": 2.1e9}


@dataclass(frozen=True)
class Shape:
    """A decode step of one layer."""

    name: str
    rows: int
    context: int
    num_kv_heads: int
    head_dim: int
    itemsize: int = 2

    @property
    def bytes(self) -> int:
        """Keys and values, each read once."""
        return self.rows * self.context * self.num_kv_heads * 2 * self.head_dim * self.itemsize


SHAPES = (
    Shape("1 x 4,096, 8 KV heads of 128", 1, 4096, 8, 128),
    Shape("8 x 2,048, 8 KV heads of 128", 8, 2048, 8, 128),
    Shape("64 x 4,096, 8 KV heads of 128", 64, 4096, 8, 128),
    Shape("32 x 8,192, 4 KV heads of 256", 32, 8192, 4, 256),
)


def microseconds(shape: Shape, target: Target) -> float:
    """An estimate: the bytes over most of the bandwidth. Launches and short contexts only add to it."""
    return shape.bytes / (target.bandwidth * _MOST_OF_PEAK) * 1e6


def issue_share(instructions: float, shape: Shape, target: Target) -> float:
    """An estimate: the share of all issue slots that the hot loop takes while memory delivers at full bandwidth."""
    tokens_a_second = target.bandwidth / (2 * shape.head_dim * shape.itemsize)
    return instructions * tokens_a_second / (target.processors * _ISSUE * _CLOCK[target.arch])


def table(decode_instructions: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row of estimated times per shape; the last row has the shares of issue slots.

    Parameters
    ----------
    decode_instructions : dict of str to float
        Of a KV token and head in the hot loop, by architecture.
    """
    rows = [[shape.name, *(f"{microseconds(shape, target):.1f} us" for target in TARGETS.values())] for shape in SHAPES]
    shares = [
        f"{issue_share(decode_instructions[arch], SHAPES[1], target):.0%}" if arch in decode_instructions else "-"
        for arch, target in TARGETS.items()
    ]
    return ["Shape", *(target.name for target in TARGETS.values())], [*rows, ["issue slots of the hot loop", *shares]]
