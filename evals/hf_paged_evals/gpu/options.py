"""The options of ``hf-paged eval gpu``."""

import argparse
from pathlib import Path

from hf_paged_evals.gpu.plan import STAGES

DEFAULT_SECONDS = 470.0
_DESCRIPTION = """Prove and time the GPU path on the card at hand, beside what else runs on it. Each stage runs in a
process of its own with a limit of its own, so that a fault costs that stage alone. Findings are written as they come,
one JSON line each; verdicts against the bars, and a report page, stand at the end."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The options that the words of a command line state.

    Returns
    -------
    argparse.Namespace
        ``out`` (Path), ``only`` (list of str or None), ``seconds`` (float), ``dry`` (bool), ``report`` (Path or None).
    """
    parser = argparse.ArgumentParser(
        "hf-paged eval gpu",
        description=_DESCRIPTION,
        epilog="\n".join(["stages:", *(f"  {stage.name:15} {stage.seconds:4} s  {stage.title}" for stage in STAGES)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("eval-gpu"), metavar="DIR", help="folder of the lines and the report"
    )
    parser.add_argument("--only", type=_names, metavar="STAGE,...", help="run these stages alone")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, metavar="S", help="of the whole run (default: %(default)s)"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: a trial, no measurement")
    parser.add_argument("--report", type=Path, metavar="DIR", help="run nothing: write the page of the lines in DIR")
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    names, known = text.split(","), [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no stage is called {', '.join(unknown)}: there are {', '.join(known)}")
    return names
