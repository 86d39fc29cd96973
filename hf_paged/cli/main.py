"""The command ``hf-paged``: one function a subcommand, which returns the exit code."""

import argparse
import sys

from hf_paged.cli.demo import run_demo
from hf_paged.cli.doctor.report import run_doctor
from hf_paged.cli.plan.report import DTYPES, run_plan
from hf_paged.config import PagedConfig
from hf_paged.errors import PagedError
from hf_paged_kernels.cpu.build import build_kernels
from hf_paged_kernels.cpu.compiler import BuildError, find_compiler


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout.reconfigure(errors="backslashreplace")  # A path may have letters that the terminal lacks.
    try:
        if argv[:1] == ["eval"]:
            return _evaluate(argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except (BuildError, ImportError, PagedError, ValueError) as error:
        print(f"hf-paged: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-paged", description="A paged KV cache for Hugging Face Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="generate with a real model, dense and paged, and compare (offline, CPU)")
    demo.add_argument("--new-tokens", type=int, default=40, metavar="N", help="tokens to generate a row (default: 40)")
    _add_block_size(demo)
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help='say what this machine offers and whether "paged" works here')
    doctor.set_defaults(run=_doctor)

    plan = commands.add_parser("plan", help="compute the KV memory of a model from its config, and whether it fits")
    plan.add_argument("model", help='a name on the hub, a local folder with a config.json, or "demo"')
    plan.add_argument("--batch", type=int, required=True, metavar="N", help="rows")
    plan.add_argument(
        "--context", type=int, required=True, metavar="L", help="tokens a row, prompt and answer together"
    )
    _add_block_size(plan)
    plan.add_argument("--dtype", choices=DTYPES, help="of weights and KV (default: the one in the model's config)")
    plan.add_argument("--memory-budget", metavar="SIZE", help='such as "2GiB" (default: as in PagedConfig)')
    plan.set_defaults(run=_plan)

    # Its arguments are its own: `main` hands them over before anything is parsed.
    commands.add_parser("eval", help="measure accuracy, speed and memory, dense and paged, and write a report")

    build = commands.add_parser("build", help="compile the native CPU kernels now instead of at their first use")
    build.set_defaults(run=_build)
    return parser


def _add_block_size(parser: argparse.ArgumentParser) -> None:
    default = PagedConfig().block_size
    help_text = f"tokens a block holds (default: {default})"
    parser.add_argument("--block-size", type=int, default=default, metavar="N", help=help_text)


def _demo(arguments: argparse.Namespace) -> int:
    run_demo(arguments.new_tokens, arguments.block_size)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    return 0 if run_doctor() else 1


def _plan(arguments: argparse.Namespace) -> int:
    config = PagedConfig(arguments.block_size, arguments.memory_budget)
    run_plan(arguments.model, arguments.batch, arguments.context, config, arguments.dtype)
    return 0


def _evaluate(argv: list[str]) -> int:
    # Imported when it is asked for: the other commands need none of it.
    from hf_paged_evals.command import main as evaluate

    return evaluate(argv)


def _build(arguments: argparse.Namespace) -> int:
    print(f"compiled: {build_kernels(find_compiler())}")
    return 0
