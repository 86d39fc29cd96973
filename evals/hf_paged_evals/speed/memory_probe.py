"""Memory of one contender in a process of its own. Reads what to do from standard input, writes what it saw.

Both are JSON: ``{"options", "contender", "batch", "prompts", "new_tokens"}`` in; peak and course out, in MiB above
what was resident when generation began.
"""

import json
import re
import sys
from pathlib import Path

import psutil

import hf_paged
from hf_paged_evals.suite.models import Models, quiet
from hf_paged_evals.suite.options import Options

from .contenders import Lengths, contender
from .watch import Watch, thinned

_EVERY = 0.03  # seconds
_MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    given = json.load(sys.stdin)
    quiet()
    models = Models(Options(**given["options"]))
    chosen = contender(models, given["contender"], given["batch"])
    words = given["prompts"][0][:8]
    chosen.generate([words], Lengths(2, stops=False))
    if given["contender"] == "paged":
        hf_paged.release(models.backend)
    print(json.dumps(measure(lambda: chosen.generate(given["prompts"], Lengths(given["new_tokens"], stops=False)))))


def measure(run) -> dict:
    """Peak and course of this process' resident memory while `run` runs."""
    process = psutil.Process()
    before = process.memory_info().rss
    _forget_peak()
    with Watch(lambda: process.memory_info().rss, _EVERY) as watch:
        run()
    course = [[seconds, (rss - before) / _MIB] for seconds, rss in watch.seen]
    # The kernel's own peak misses nothing between two looks; elsewhere than on Linux the looks must do.
    peak = max(_peak(), max(rss for _, rss in watch.seen))
    return {"peak": (peak - before) / _MIB, "seconds": course[-1][0], "course": thinned(course)}


def _forget_peak() -> None:
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def _peak() -> int:
    """Bytes of resident memory at most since `_forget_peak`; 0 where the system does not say."""
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if _CLEAR.exists() else None
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
