"""What zero-code activation costs a program that imports torch and never asks for "paged".

Fresh interpreters in turns: hf_paged installed with its entry point, the same switched off, and without one. Then
the entry point alone, which the noise of ``import torch`` hides, and what it adds to every later import.

    python evals/autoload_cost.py --repeats 25
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_TORCH = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"
_HOOK = """
import importlib.metadata, time
start = time.perf_counter()
import hf_paged_autoload
hf_paged_autoload.install()
print(time.perf_counter() - start)
"""
_FINDER = """
import sys, timeit, hf_paged_autoload
hf_paged_autoload.install()
print(min(timeit.repeat(lambda: sys.meta_path[0].find_spec("name"), number=10_000, repeat=5)) / 10_000)
"""


def installed(folder: Path, entry_point: bool) -> Path:
    """A folder with the metadata of an installed hf_paged."""
    about = folder / "hf_paged-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-paged\nVersion: 0\n")
    points = "[torch.backends]\nhf_paged = hf_paged_autoload:install\n" if entry_point else ""
    (about / "entry_points.txt").write_text(points)
    return folder


def seconds(code: str, folder: Path, **environment: str) -> float:
    """What `code` prints in an interpreter that finds `folder` first."""
    path = os.pathsep.join(map(str, (folder, _ROOT)))
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def main() -> None:
    """Run the interpreters in turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        on, off = installed(Path(folder) / "on", True), installed(Path(folder) / "off", False)
        runs = {
            "with the entry point": lambda: seconds(_TORCH, on),
            "HF_PAGED_AUTOLOAD=0": lambda: seconds(_TORCH, on, HF_PAGED_AUTOLOAD="0"),
            "without it": lambda: seconds(_TORCH, off),
            "the entry point alone": lambda: seconds(_HOOK, on),
            "a later import": lambda: seconds(_FINDER, on),
        }
        times = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, run in runs.items():
                elapsed = run()
                if turn:  # The first turn compiles and warms the file cache.
                    times[name].append(elapsed)
    for name, measured in times.items():
        low, middle, high = (number * 1e3 for number in statistics.quantiles(measured, n=4))
        print(f"  {name:22} median {middle:9.4f} ms   quartiles {low:9.4f} to {high:9.4f} ms")


if __name__ == "__main__":
    main()
