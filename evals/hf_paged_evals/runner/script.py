"""A measurement that is one function: its arguments, what it prints, and the results file that it writes."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hf_paged_evals.models.pair import quiet
from hf_paged_evals.report.markdown import table
from hf_paged_evals.report.text import FIGURE_COLUMNS, conditions, figure_rows
from hf_paged_evals.runner import results
from hf_paged_evals.runner.section import Section


@dataclass(frozen=True)
class Script:
    """A measurement that runs as a whole, from the command line or by `main`.

    Attributes
    ----------
    words : str
        The words after ``hf-paged eval`` that run it.
    description : str
        What ``--help`` says.
    add_settings : callable
        Adds its arguments to a parser. The defaults are those of a published measurement.
    measure : callable
        Takes the parsed arguments and returns a `Section`.
    quick : dict
        Defaults under ``--quick``, by the names of the arguments: a trial in seconds, whose figures say nothing.
    """

    words: str
    description: str
    add_settings: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Section]
    quick: dict = field(default_factory=dict)

    def main(self, argv: list[str] | None = None) -> int:
        """Measure, print the section, and write the results file that ``--out`` names.

        Parameters
        ----------
        argv : list of str or None
            None: the words of this process' command line.

        Returns
        -------
        int
            The exit code: 1 if the section has flags.
        """
        argv = sys.argv[1:] if argv is None else argv
        given = self._parse(argv)
        quiet()
        began = time.perf_counter()
        section = dataclasses.replace(self.measure(given), seconds=time.perf_counter() - began)
        settings = {name: value for name, value in vars(given).items() if name != "out"}
        found = results.collect(settings, [section], ["hf-paged", "eval", *self.words.split(), *argv])
        print(as_text(section, conditions(found)))
        if given.out is not None:
            results.save(found, given.out)
        return 1 if section.flags else 0

    def _parse(self, argv: list[str]) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            f"hf-paged eval {self.words}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_settings(parser)
        parser.add_argument("--quick", action="store_true", help="small settings: a trial, no measurement")
        parser.add_argument("--out", type=Path, metavar="FILE", help="write a results file, for hf-paged eval compare")
        if "--quick" in argv:
            parser.set_defaults(**self.quick)
        return parser.parse_args(argv)


def as_text(section: Section, conditions: str) -> str:
    """A section as a terminal shows it.

    Parameters
    ----------
    conditions : str
        Date, machine and versions in one line.
    """
    plain = dataclasses.asdict(section)
    parts = [f"{section.title}. {section.summary}\n{conditions}"]
    if section.figures:
        parts.append(table(FIGURE_COLUMNS, figure_rows(plain)))
    for one in section.tables:
        parts.append(f"{one.title}\n{table(one.columns, one.rows)}")
    parts += section.notes
    parts += [f"WRONG: {flag}" for flag in section.flags]
    return "\n\n".join(parts)
