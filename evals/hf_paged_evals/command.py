"""``hf-paged eval``: run tasks and write their report; compare two reports."""

import argparse
import json
import shlex
from pathlib import Path

from hf_paged.errors import PagedError

from .options import DTYPES, DatasetChoice, Options

_DESCRIPTION = "Accuracy, speed and memory of a paged cache beside the dense one, on the same samples in one run."
_EPILOG = "hf-paged eval compare A B sets two such folders side by side; hf-paged eval triton checks the GPU kernels."


def main(argv: list[str]) -> int:
    """Run ``hf-paged eval`` with the arguments that follow it; returns the exit code.

    Raises
    ------
    ImportError, PagedError, ValueError
        If something that was asked for is not there.
    """
    if argv[:1] == ["compare"]:
        return _compare(argv[1:])
    if argv[:1] == ["triton"]:
        from hf_paged_evals.triton.command import main as triton

        return triton(argv[1:])
    return _evaluate(argv)


def _compare(argv: list[str]) -> int:
    from hf_paged_evals.report.compare import compare

    parser = argparse.ArgumentParser(prog="hf-paged eval compare", description="Two runs side by side.")
    parser.add_argument("first", type=Path, help="a folder that hf-paged eval wrote, or its results.json")
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args(argv)
    print(compare(arguments.first, arguments.second))
    return 0


def _evaluate(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    try:
        from hf_paged_evals import report

        from . import models, registry, results, runner
    except ModuleNotFoundError as error:
        raise PagedError(f'{error.name} is not installed: pip install -c constraints.txt -e ".[evals]"') from error
    if arguments.list:
        for task in registry.TASKS.values():
            print(f"{task.name:12} {task.title}")
            print(f"{'':12} {json.dumps(task.settings)}; --quick {json.dumps(task.quick)}")
        return 0
    tasks = registry.find(arguments.tasks or list(registry.TASKS))
    options = _options(arguments, [task.name for task in tasks])
    models.quiet()
    sections = runner.run(options, tasks)
    if sections is None:
        return 0
    found = results.collect(options, sections, shlex.join(["hf-paged", "eval", *argv]))
    folder = Path(options.out)
    results.save(found, folder)
    report.write(found, folder)
    for section in sections:
        print(f"{section.title}: {section.summary}")
        for flag in section.flags:
            print(f"  WRONG: {flag}")
    print(f"Report: {folder / 'report.html'}, {folder / 'report.md'}; numbers: {folder / results.FILE}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-paged eval", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "--out", metavar="DIR", default="eval-report", help="folder of the report (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small settings: a first report in a few minutes")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N prompts, windows or problems a task")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (default: all; --list shows them)")
    parser.add_argument("--list", action="store_true", help="list the tasks and their settings, and stop")
    parser.add_argument("--set", action="append", default=[], metavar="TASK.KEY=VALUE", help="a setting of one task")
    parser.add_argument("--seed", type=int, default=0)
    model = parser.add_argument_group("what is judged")
    model.add_argument("--model", default="smollm2", help="hub name or folder (default: smollm2, the demo model)")
    model.add_argument("--dtype", choices=DTYPES, default="float32")
    model.add_argument("--baseline", default="sdpa", help="attention implementation that is trusted (default: sdpa)")
    model.add_argument("--backend", default="paged", help="the one that is judged (default: paged)")
    model.add_argument("--block-size", type=int, default=Options.block_size, metavar="N")
    model.add_argument("--memory-budget", metavar="SIZE", help='such as "64MiB"; a small one forces preemptions')
    model.add_argument("--token-budget", type=int, default=Options.token_budget, metavar="N")
    model.add_argument("--kv-dtype", metavar="DTYPE", help="round keys and values to it first, e.g. float8_e4m3fn")
    data = parser.add_argument_group("on which data (default: offline data of each task)")
    data.add_argument("--dataset", metavar="NAME", help="hub name, or a local json, jsonl, parquet, csv or text file")
    data.add_argument("--dataset-subset", metavar="NAME")
    data.add_argument("--dataset-split", metavar="NAME")
    data.add_argument("--dataset-column", metavar="NAME")
    return parser


def _options(arguments: argparse.Namespace, tasks: list[str]) -> Options:
    names = ("out", "quick", "limit", "seed", "model", "dtype", "baseline", "backend", "block_size", "memory_budget")
    given = {name: getattr(arguments, name) for name in (*names, "token_budget", "kv_dtype")}
    parts = [getattr(arguments, f"dataset_{name}") for name in ("subset", "split", "column")]
    if arguments.dataset is None and any(parts):
        raise ValueError("--dataset-subset, --dataset-split and --dataset-column belong to --dataset: name one")
    dataset = None if arguments.dataset is None else DatasetChoice(arguments.dataset, *parts)
    return Options(tasks=tuple(tasks), dataset=dataset, extra=_settings(arguments.set), **given)


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
