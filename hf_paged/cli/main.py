"""The command ``hf-paged``: one function per subcommand, which returns the exit code."""

import argparse
import dataclasses
import io
import sys

from transformers import PreTrainedConfig

from hf_paged import __version__
from hf_paged.cli.demo import run_demo
from hf_paged.cli.doctor.report import run_doctor
from hf_paged.cli.gpu_kernels import CODES, build_gpu_kernels, layer_of_heads, model_layers
from hf_paged.cli.plan.footprint import read_config
from hf_paged.cli.plan.report import DTYPES, own_dtype, run_plan
from hf_paged.cli.serve import add_serve
from hf_paged.config import VARIABLES, PagedConfig
from hf_paged.errors import PagedError
from hf_paged.memory.kv_format import KV_FORMATS
from hf_paged_kernels.cpu.build import build_kernels
from hf_paged_kernels.cpu.compiler import BuildError, find_compiler

DEFAULT_BATCH, DEFAULT_CONTEXT = 8, 4096  # Of a plan; the context is shorter where the model's own limit is.


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Parameters
    ----------
    argv : list of str or None
        The arguments after the command's name; None: those of this process.

    Returns
    -------
    int
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # A path may have letters that the terminal lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if argv[:1] == ["eval"]:
            return _evaluate(argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except (BuildError, ImportError, PagedError, ValueError) as error:
        print(f"hf-paged: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-paged",
        description="A paged KV cache for Hugging Face Transformers.",
        epilog='"hf-paged COMMAND --help" lists the arguments of a command.',
    )
    parser.add_argument("--version", action="version", version=f"hf-paged {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_doctor(commands)
    _add_plan(commands)
    add_serve(commands)
    # Its arguments are its own: `main` hands them over before anything is parsed.
    commands.add_parser("eval", help="measure accuracy, speed and memory, dense and paged, and write a report")
    _add_build(commands)
    return parser


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="generate with a real model, dense and paged, and compare",
        description="Generate with SmolLM2-135M-Instruct on the CPU, dense and paged: a chat prompt, a ragged batch "
        "and beam search. Print the answers, the number of rows with equal tokens, memory and seconds. Needs no "
        "network.",
    )
    demo.add_argument(
        "--new-tokens", type=int, default=40, metavar="N", help="tokens generated in each row (default: 40)"
    )
    _add_block_size(demo)
    demo.set_defaults(run=_demo)


def _add_doctor(commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help='say what this machine offers and whether "paged" works here',
        description="Print the versions, processor, compiler, GPUs and defaults found here, generate with a tiny "
        'random model to see whether "paged" equals dense, and say which kernels are used on which device. Exit code '
        "0: it works; 1: the last lines say what to change.",
    )
    doctor.set_defaults(run=_doctor)


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="compute the KV memory of a model from its config, and whether it fits",
        description="Compute the blocks and bytes of a model's KV cache from its config alone, without its weights. "
        "Say whether they fit into the memory of this machine, or what would make them fit.",
    )
    plan.add_argument("model", help='a name on the hub, a local folder with a config.json, or "demo"')
    plan.add_argument("--batch", type=int, metavar="N", help=f"rows (default: {DEFAULT_BATCH})")
    plan.add_argument(
        "--context",
        type=int,
        metavar="L",
        help="tokens in each row, prompt and answer together "
        f"(default: {DEFAULT_CONTEXT:,}, or the longest that the model takes if that is less)",
    )
    _add_block_size(plan)
    plan.add_argument("--dtype", choices=DTYPES, help="of weights, keys and values (default: as in the model's config)")
    plan.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help='of keys and values, such as "2GiB" (default: HF_PAGED_MEMORY_BUDGET, or a share of the memory left)',
    )
    for option, layers in (("--kv-dtype", "full attention"), ("--kv-dtype-window", "a sliding window")):
        variable = VARIABLES[option[2:].replace("-", "_")]
        help_text = f"of the pages of layers with {layers} (default: {variable}, or as the model computes them)"
        plan.add_argument(option, choices=KV_FORMATS, help=help_text)
    plan.set_defaults(run=_plan)


def _add_build(commands) -> None:
    build = commands.add_parser(
        "build",
        help="compile kernels now instead of at their first use",
        description="Compile the native CPU kernels, keep them for later processes, and print where they are. With "
        "--model or --heads compile the Triton kernels of those attention layers too, on all cores, for the GPU here "
        "or for --target, into Triton's cache: TRITON_CACHE_DIR, or ~/.triton.",
    )
    layers = build.add_mutually_exclusive_group()
    layers.add_argument(
        "--model", metavar="NAME", help='a name on the hub, a local folder with a config.json, or "demo"'
    )
    layers.add_argument(
        "--heads", metavar="Q,KV,SIZE", help="query heads, KV heads and head size of one layer, such as 32,8,128"
    )
    build.add_argument("--dtype", choices=DTYPES, help="(default: as in the model's config; bfloat16 with --heads)")
    _add_block_size(build)
    build.add_argument("--kv-dtype", choices=CODES, help="of quantised pages, in layers without a sliding window")
    build.add_argument("--target", metavar="ARCH", help="such as sm80 or sm90 (default: the GPU here)")
    build.add_argument("--jobs", type=int, metavar="N", help="processes that compile (default: one per core)")
    build.set_defaults(run=_build)


def _add_block_size(parser: argparse.ArgumentParser) -> None:
    help_text = f"tokens that a block holds, a power of two (default: HF_PAGED_BLOCK_SIZE, or {PagedConfig.block_size})"
    parser.add_argument("--block-size", type=int, metavar="N", help=help_text)


def _demo(arguments: argparse.Namespace) -> int:
    size = arguments.block_size
    run_demo(arguments.new_tokens, PagedConfig.from_environment().block_size if size is None else size)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    return 0 if run_doctor() else 1


def _plan(arguments: argparse.Namespace) -> int:
    model_config = read_config(arguments.model)  # First of all: a wrong name is the usual mistake.
    batch, context, assumed = arguments.batch, arguments.context, []
    if batch is None:
        batch = DEFAULT_BATCH
        assumed.append(f"--batch {batch}")
    if context is None:
        context = _default_context(model_config)
        assumed.append(f"--context {context}")
    fields = ("block_size", "memory_budget", "kv_dtype", "kv_dtype_window")
    given = {name: getattr(arguments, name) for name in fields if getattr(arguments, name) is not None}
    config = dataclasses.replace(PagedConfig.from_environment(), **given)
    run_plan(arguments.model, batch, context, config, arguments.dtype)
    if assumed:
        print(f"These numbers are for {' '.join(assumed)}, by default: give your own.")
    return 0


def _default_context(config: PreTrainedConfig) -> int:
    """Return the tokens of a row in a plan that was asked for without them."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(DEFAULT_CONTEXT, longest) if isinstance(longest, int) and longest > 0 else DEFAULT_CONTEXT


def _evaluate(argv: list[str]) -> int:
    # Imported when it is asked for: the other commands need none of it.
    from hf_paged_evals.command import main as evaluate

    return evaluate(argv)


def _build(arguments: argparse.Namespace) -> int:
    for option in ("target", "dtype", "block_size", "kv_dtype", "jobs"):
        if getattr(arguments, option) is not None and not (arguments.model or arguments.heads):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for the GPU kernels of a model: name it with --model, or heads with --heads")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1; got {arguments.jobs}")
    print(f"compiled: {build_kernels(find_compiler())}", flush=True)
    if arguments.model or arguments.heads:
        layers = _layers_to_build(arguments)
        print(f"compiled: {build_gpu_kernels(layers, arguments.target, arguments.jobs)}")
    return 0


def _layers_to_build(arguments: argparse.Namespace) -> list:
    """The attention layers whose GPU kernels were asked for."""
    given = {} if arguments.block_size is None else {"block_size": arguments.block_size}
    block_size = dataclasses.replace(PagedConfig.from_environment(), **given).block_size
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    codes = CODES[arguments.kv_dtype] if arguments.kv_dtype else None
    if arguments.heads:
        return [layer_of_heads(arguments.heads, dtype or DTYPES["bfloat16"], block_size, codes)]
    config = read_config(arguments.model)
    return model_layers(config, dtype or own_dtype(config), block_size, codes)
