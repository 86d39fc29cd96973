"""Memory of one contender, measured in a process of its own: a request on standard input, an answer on the output.

Both are JSON: ``{"options", "contender", "batch", "prompts", "new_tokens"}`` in; peak and course out, in MiB above
the memory that was resident when generation began.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from hf_paged_evals.models.pair import ModelPair, quiet
from hf_paged_evals.runner.options import Options
from hf_paged_evals.speed.contenders import Lengths, contender
from hf_paged_evals.speed.watch import Watch, thinned

_EVERY = 0.03  # seconds
_MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    """Answer the request on standard input."""
    given = json.load(sys.stdin)
    quiet()
    models = ModelPair(Options(**given["options"]))
    chosen = contender(models, given["contender"], given["batch"])
    chosen.generate([given["prompts"][0][:8]], Lengths(2, stops=False))
    if chosen.pool_owner is not None:
        models.release()
    print(json.dumps(measure(lambda: chosen.generate(given["prompts"], Lengths(given["new_tokens"], stops=False)))))


def measure(run: Callable[[], object]) -> dict:
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
