"""Limits on the memory of this process: the machine's, those of its control groups, and its resource limits.

Everything is read below `root`, so that a container can be told from files alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")
_UNLIMITED = 2**62  # Version 1 of the control groups says "no limit" by a number above it.


@dataclass(frozen=True)
class Limit:
    """One limit, in bytes.

    Attributes
    ----------
    name : str
        The file or setting that says it.
    total : int
        Bytes that it allows.
    left : int
        Bytes of it that are not taken yet.
    counts_addresses : bool
        True if memory is counted when it is reserved, not when it is first written to.
    """

    name: str
    total: int
    left: int
    counts_addresses: bool = False


def memory_limits(root: Path = ROOT) -> list[Limit]:
    """Every limit that is known, the machine's own first."""
    machine = psutil.virtual_memory()
    limits = [Limit("this machine's memory", machine.total, machine.available)]
    return [*limits, *_control_groups(root), *_strict_overcommit(root), *_resource_limits()]


def _control_groups(root: Path) -> Iterator[Limit]:
    """Limits of the process's control group and of the groups above it, as far as they are mounted here."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers:
            for folders in _folders(root, "cgroup2", None, group):
                yield from _version_2(folders, root)
        elif "memory" in controllers.split(","):
            for folders in _folders(root, "cgroup", "memory", group):
                yield from _version_1(folders, root)


def _version_2(folders: list[Path], root: Path) -> Iterator[Limit]:
    for folder in folders:
        # Cached files that were not read lately: the kernel takes them back before it refuses memory.
        taken = (_number(folder / "memory.current") or 0) - _statistics(folder / "memory.stat").get("inactive_file", 0)
        for name in ("memory.max", "memory.high"):
            yield from _group_limit(f"{name} of {_shown(folder, root)}", _number(folder / name), taken)


def _version_1(folders: list[Path], root: Path) -> Iterator[Limit]:
    for depth, folder in enumerate(folders):
        if depth and _number(folder / "memory.use_hierarchy") == 0:
            return  # What this group allows does not hold for the groups in it.
        statistics = _statistics(folder / "memory.stat")
        taken = (_number(folder / "memory.usage_in_bytes") or 0) - statistics.get("total_inactive_file", 0)
        # The second holds the limits above, too, where a container does not see them.
        for name, total in (
            ("memory.limit_in_bytes", _number(folder / "memory.limit_in_bytes")),
            ("hierarchical_memory_limit", statistics.get("hierarchical_memory_limit")),
        ):
            yield from _group_limit(f"{name} of {_shown(folder, root)}", total, taken)


def _group_limit(name: str, total: int | None, taken: int) -> Iterator[Limit]:
    if total is not None and total < _UNLIMITED:
        yield Limit(name, total, min(total, max(0, total - taken)))


def _folders(root: Path, kind: str, controller: str | None, group: str) -> Iterator[list[Path]]:
    """For each mounted file system of that kind: the folder of a control group, and those of the groups above it."""
    for line in _lines(root / "proc/self/mountinfo"):
        # 36 35 98:0 ROOT MOUNT_POINT rw,noatime master:1 - KIND source rw,CONTROLLERS
        about, _, source = line.partition(" - ")
        top, point = (_unescaped(field) for field in about.split()[3:5])
        mounted_kind, _, options = source.split(" ", 2)
        if mounted_kind != kind or (controller is not None and controller not in options.split(",")):
            continue
        # A mount shows its file system from `top` on. A group that is not below it has another namespace's name.
        inside = PurePosixPath(group)
        inside = inside.relative_to(top) if inside.is_relative_to(top) else PurePosixPath()
        base = root / point.lstrip("/")
        yield [base / part for part in (inside, *inside.parents)]


def _unescaped(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)


def _shown(folder: Path, root: Path) -> str:
    return f"/{folder.relative_to(root)}"


def _strict_overcommit(root: Path) -> Iterator[Limit]:
    """The limit of a system that hands out no more address space than it can back with memory."""
    if _number(root / "proc/sys/vm/overcommit_memory") == 2:
        kibibytes = _statistics(root / "proc/meminfo")
        total, taken = (kibibytes.get(name, 0) * 1024 for name in ("CommitLimit:", "Committed_AS:"))
        yield Limit("CommitLimit, as vm.overcommit_memory=2", total, max(0, total - taken), counts_addresses=True)


def _resource_limits() -> Iterator[Limit]:
    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # psutil reads them on Linux and FreeBSD alone.
        return
    taken = process.memory_info()
    for name, num_bytes in (("RLIMIT_AS", taken.vms), ("RLIMIT_DATA", taken.data)):
        total, _ = process.rlimit(getattr(psutil, name))
        if total != psutil.RLIM_INFINITY:
            yield Limit(name, total, max(0, total - num_bytes), counts_addresses=True)


def _lines(path: Path) -> list[str]:
    """Lines of a small file of the kernel's; none if there is no such file."""
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None if it holds another word, as "max", or is not there."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _statistics(path: Path) -> dict[str, int]:
    """Numbers by name, from lines of a name, a number and perhaps a unit."""
    fields = (line.split() for line in _lines(path))
    return {name: int(number) for name, number, *_ in filter(_has_number, fields)}


def _has_number(fields: list[str]) -> bool:
    return len(fields) > 1 and fields[1].isdecimal()
