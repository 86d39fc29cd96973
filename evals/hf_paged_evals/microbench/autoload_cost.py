"""The cost of zero-code activation for a program that imports torch and never asks for "paged".

Fresh interpreters in turns: hf_paged installed with its entry point, the same switched off, and without one. Then
the entry point alone, which the noise of ``import torch`` hides, and the time that it adds to every later import.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

import hf_paged_autoload
from hf_paged_evals.runner.script import Script
from hf_paged_evals.runner.section import Figure, Section, Table

NAME = "autoload_cost"
QUICK = {"repeats": 2}
_IMPORT_TORCH = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"
_ENTRY_POINT = """
import importlib.metadata, time
start = time.perf_counter()
import hf_paged_autoload
hf_paged_autoload.install()
print(time.perf_counter() - start)
"""
_LATER_IMPORT = """
import sys, timeit, hf_paged_autoload
hf_paged_autoload.install()
print(min(timeit.repeat(lambda: sys.meta_path[0].find_spec("name"), number=10_000, repeat=5)) / 10_000)
"""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this microbenchmark."""
    parser.add_argument("--repeats", type=int, default=25, help="timed turns (default: %(default)s)")


def measure(given: argparse.Namespace) -> Section:
    """Median times of what each interpreter prints."""
    with tempfile.TemporaryDirectory() as folder:
        on, off = _installed(Path(folder) / "on", True), _installed(Path(folder) / "off", False)
        runs = {
            "import torch, with the entry point": lambda: _seconds(_IMPORT_TORCH, on),
            "import torch, HF_PAGED_AUTOLOAD=0": lambda: _seconds(_IMPORT_TORCH, on, HF_PAGED_AUTOLOAD="0"),
            "import torch, without it": lambda: _seconds(_IMPORT_TORCH, off),
            "the entry point alone": lambda: _seconds(_ENTRY_POINT, on),
            "a later import": lambda: _seconds(_LATER_IMPORT, on),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(1 + given.repeats):
            for name, run in runs.items():
                elapsed = 1000 * run()
                if turn:  # The first turn compiles and warms the file cache.
                    times[name].append(elapsed)
    rows = [[name, *quantiles(values, n=4)] for name, values in times.items()]
    alone = median(times["the entry point alone"])
    return Section(
        NAME,
        "The entry point that torch calls",
        f"It takes {alone:.2f} ms of an import of torch.",
        [Figure(name, median(values), "ms", better="lower") for name, values in times.items()],
        [Table("Quartiles", ["Interpreter", "25 % (ms)", "50 % (ms)", "75 % (ms)"], rows)],
        notes=[f"{given.repeats} interpreters each, in turns."],
    )


def _installed(folder: Path, entry_point: bool) -> Path:
    """A folder with the metadata of an installed hf_paged."""
    about = folder / "hf_paged-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-paged\nVersion: 0\n")
    points = "[torch.backends]\nhf_paged = hf_paged_autoload:install\n" if entry_point else ""
    (about / "entry_points.txt").write_text(points)
    return folder


def _seconds(code: str, folder: Path, **environment: str) -> float:
    """The number that `code` prints in an interpreter that finds `folder` first."""
    path = os.pathsep.join(map(str, (folder, Path(hf_paged_autoload.__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-c", code]
    # Not in a checkout, whose metadata (`hf_paged.egg-info`) an interpreter that is given code finds before `folder`.
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=folder)
    return float(done.stdout)


main = Script(f"microbench {NAME}", __doc__, add_settings, measure, QUICK).main

if __name__ == "__main__":
    sys.exit(main())
