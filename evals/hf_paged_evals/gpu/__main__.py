"""The run itself, in a process that has not touched CUDA: ``python -m hf_paged_evals.gpu``, with the same options."""

import os
import sys

# Before anything asks torch whether there is a GPU: the usual answer initialises CUDA, and no child could use it then.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hf_paged_evals.gpu.conductor import conduct
from hf_paged_evals.gpu.options import parse


def main() -> int:
    """Run as the command line says; returns the exit code."""
    try:
        return conduct(parse(sys.argv[1:]))
    except ValueError as error:
        print(f"hf-paged: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
