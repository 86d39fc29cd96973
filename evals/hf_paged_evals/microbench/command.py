"""``hf-paged eval microbench``: list the microbenchmarks, or run one."""

import argparse
import importlib
import sys
from types import ModuleType

NAMES = (
    "attention_kernel",
    "decode_step",
    "latent_step",
    "short_prompt",
    "prefix",
    "saved_prefix",
    "swap",
    "threads",
    "programs",
    "pipeline_speed",
    "async_latency",
    "scheduler_cost",
    "identity_cost",
    "autoload_cost",
    "resident",
)


def main(argv: list[str] | None = None) -> int:
    """Run the microbenchmark that `argv` begins with; without a name, list them all. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in NAMES:
        return _module(argv[0]).main(argv[1:])  # It parses what follows.
    lines = [f"  {name:17} {_title(name)}" for name in NAMES]
    parser = argparse.ArgumentParser(
        "hf-paged eval microbench",
        usage="hf-paged eval microbench [NAME [ARGUMENT ...]]",
        description="Time one part alone.",
        epilog="\n".join(["names (hf-paged eval microbench NAME --help):", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", choices=NAMES, metavar="NAME", help=argparse.SUPPRESS)
    parser.parse_args(argv)
    print("\n".join(lines))
    return 0


def _title(name: str) -> str:
    """The first sentence of a module's docstring, which is its description."""
    return (_module(name).__doc__ or "").partition("\n")[0]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"hf_paged_evals.microbench.{name}")
