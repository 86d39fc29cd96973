"""The calls that run under a sanitizer: ``python -m hf_paged_evals.gpu.sanitized``. Imports no transformers."""

import torch

from hf_paged_evals.gpu import cases
from hf_paged_evals.gpu.pages import OpCase, make_arguments
from hf_paged_kernels import ops

# Kinds of rows that take every kernel: split and whole decodes, mixed steps, a prompt.
_CASES = (
    OpCase(((40, 1), (17, 1)), cases.LLAMA_8B),
    OpCase(((700, 1),), cases.LLAMA_8B),
    OpCase(((40, 9), (33, 33), (31, 1)), cases.LLAMA_8B),
    OpCase(((40, 9), (33, 33), (31, 1)), cases.LLAMA_8B, codes=torch.int8),
    OpCase(((40, 9), (33, 33), (31, 1)), cases.HEADS[2], torch.float32, 16, cases.ALL_OPTIONS),
)
DONE = "all calls were made"


def main() -> None:
    """Run every op."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in _CASES:
        given = make_arguments(case, device)
        ops.write_and_attend(*given.write_and_attend())
        ops.paged_attention(*given.attend())
        blocks = torch.tensor([[0], [1]], device=device)
        ops.copy_blocks(given.key_cache, given.value_cache, *blocks)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(DONE)


if __name__ == "__main__":
    main()
