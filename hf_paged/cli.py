"""The command ``hf-paged``."""

import argparse
import sys

from .demo import run_demo
from .errors import PagedError


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hf-paged", description="A paged KV cache for Hugging Face Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="generate with a real model, dense and paged, and compare (offline, CPU)")
    demo.add_argument("--new-tokens", type=int, default=40, metavar="N", help="tokens to generate a row (default: 40)")
    demo.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens a block holds (default: 16)")
    arguments = parser.parse_args(argv)
    try:
        run_demo(arguments.new_tokens, arguments.block_size)
    except (ImportError, PagedError, ValueError) as error:
        print(f"hf-paged: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
