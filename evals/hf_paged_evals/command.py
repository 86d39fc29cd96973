"""``hf-paged eval`` and the commands below it."""

import importlib

from hf_paged_evals import evaluate

# Word, module with a `main(argv)`, and what it does. A module is imported when its word is said: some need extras.
_COMMANDS = (
    ("compare", "hf_paged_evals.report.compare", "set the figures of two runs side by side"),
    ("microbench", "hf_paged_evals.microbench.command", "time one part alone: attention, a decode step, the scheduler"),
    ("model-types", "hf_paged_evals.accuracy.model_types", "try every causal model type, dense and paged"),
    ("kv-formats", "hf_paged_evals.accuracy.kv_formats", "weigh the KV formats: bytes, perplexity, tokens, needles"),
    ("lm-eval", "hf_paged_evals.accuracy.lm_eval_parity", "run lm-evaluation-harness, unchanged, dense and paged"),
    ("triton", "hf_paged_evals.triton.command", "compile the GPU kernels and hold their code against thresholds"),
    ("gpu", "hf_paged_evals.gpu.command", "prove and time the GPU path on the card at hand, beside others"),
    ("figures", "hf_paged_evals.figures.command", "measure the figures of README.md and docs/, and rewrite them"),
)


def main(argv: list[str]) -> int:
    """Run ``hf-paged eval`` with the words that follow it; returns the exit code.

    Raises
    ------
    ImportError, PagedError, ValueError
        If a package, a model or data that was asked for is not there.
    """
    modules = {word: module for word, module, _ in _COMMANDS}
    if argv and argv[0] in modules:
        return importlib.import_module(modules[argv[0]]).main(argv[1:])
    return evaluate.main(argv, _epilog())


def _epilog() -> str:
    lines = [f"  {word:12} {purpose}" for word, _, purpose in _COMMANDS]
    return "\n".join(["other commands (hf-paged eval COMMAND --help):", *lines])
