"""The word ``gpu`` of ``hf-paged eval``: start a run in a fresh process, or write the page of one that was recorded."""

import subprocess
import sys

from hf_paged_evals.gpu.options import parse
from hf_paged_evals.gpu.report import write_report


def main(argv: list[str] | None = None) -> int:
    """Run the stages that `argv` names, or write the report of recorded lines; returns the exit code.

    Raises
    ------
    ValueError
        If there are no lines to report on.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.report is not None:
        for path in write_report(options.report, options.report):
            print(path)
        return 0
    return subprocess.run([sys.executable, "-m", "hf_paged_evals.gpu", *argv]).returncode
