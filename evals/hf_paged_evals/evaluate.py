"""``hf-paged eval`` itself: run tasks on a model, dense and paged, and write their report."""

import argparse
import json
from pathlib import Path

from hf_paged_evals.runner.arguments import add_dataset, add_model, dataset_of
from hf_paged_evals.runner.options import Options

_DESCRIPTION = "Accuracy, speed and memory of a paged cache beside the dense one, on the same samples in one run."


def main(argv: list[str], epilog: str = "") -> int:
    """Run the tasks that `argv` names and write their report; returns the exit code.

    Parameters
    ----------
    epilog : str
        Stands at the end of the help.

    Raises
    ------
    ImportError, PagedError, ValueError
        If a package, a model or data that `argv` asks for is not there.
    """
    arguments = parser(epilog).parse_args(argv)
    if arguments.list:
        _print_tasks()
        return 0
    # Here and not at the top, as it needs the extra; before a run of hours, at whose end the report is drawn.
    from hf_paged_evals.models.pair import quiet
    from hf_paged_evals.report.write import write
    from hf_paged_evals.runner import results
    from hf_paged_evals.runner.run import run_tasks
    from hf_paged_evals.tasks import TASKS, find

    tasks = find(arguments.tasks or list(TASKS))
    options = options_of(arguments, [task.name for task in tasks])
    quiet()
    sections = run_tasks(options, tasks)
    if sections is None:
        return 0
    found, folder = results.collect(options.identity(), sections, ["hf-paged", "eval", *argv]), Path(options.out)
    results.save(found, folder / results.FILE)
    write(found, folder)
    for section in sections:
        print(f"{section.title}: {section.summary}")
        for flag in section.flags:
            print(f"  WRONG: {flag}")
    print(f"Report: {folder / 'report.html'}, {folder / 'report.md'}; numbers: {folder / results.FILE}")
    return 0


def _print_tasks() -> None:
    from hf_paged_evals.tasks import TASKS

    for task in TASKS.values():
        print(f"{task.name:12} {task.title}")
        print(f"{'':12} {json.dumps(task.settings)}; --quick {json.dumps(task.quick)}")


def parser(epilog: str = "") -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        "hf-paged eval",
        usage="hf-paged eval [OPTION ...]\n       hf-paged eval COMMAND [ARGUMENT ...]",
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", metavar="DIR", default="eval-report", help="folder of the report (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small settings: a first report in a few minutes")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N prompts, windows or problems a task")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (default: all; --list shows them)")
    parser.add_argument("--list", action="store_true", help="list the tasks and their settings, and stop")
    parser.add_argument("--set", action="append", default=[], metavar="TASK.KEY=VALUE", help="a setting of one task")
    model = parser.add_argument_group("what is judged")
    add_model(model)
    model.add_argument("--baseline", default="sdpa", help="attention implementation that is trusted (default: sdpa)")
    model.add_argument("--backend", default="paged", help="the one that is judged (default: paged)")
    model.add_argument("--block-size", type=int, default=Options.block_size, metavar="N")
    model.add_argument("--memory-budget", metavar="SIZE", help='such as "64MiB"; a small one forces preemptions')
    model.add_argument("--token-budget", type=int, default=Options.token_budget, metavar="N")
    model.add_argument("--kv-dtype", metavar="NAME", help="int8, fp8_e4m3, or a torch dtype to round to first")
    data = parser.add_argument_group("on which data (default: offline data of each task)")
    add_dataset(data)
    return parser


def options_of(arguments: argparse.Namespace, tasks: list[str]) -> Options:
    """The options of a run, validated."""
    names = ("out", "quick", "limit", "seed", "model", "dtype", "baseline", "backend", "block_size", "memory_budget")
    given = {name: getattr(arguments, name) for name in (*names, "token_budget", "kv_dtype")}
    return Options(tasks=tuple(tasks), dataset=dataset_of(arguments), extra=_settings(arguments.set), **given)


def _settings(texts: list[str]) -> dict[str, dict]:
    """``TASK.KEY=VALUE`` texts as settings; values are JSON, or else plain text."""
    found: dict[str, dict] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        task, dot, key = name.partition(".")
        if not (equals and dot and task and key):
            raise ValueError(f"--set wants TASK.KEY=VALUE, such as perplexity.stride=256; got {text!r}")
        settings = found.setdefault(task, {})
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return found
