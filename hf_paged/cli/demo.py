"""``hf-paged demo``: one real model, dense and paged, on three jobs; answers, equality, memory."""

import time
from dataclasses import dataclass

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer
from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged_kernels.cpu import loader

_CHAT = ["What is the capital of France, and what is it famous for?"]
_RAGGED = [
    "Name three primary colours.",
    "Why is the sky blue?",
    "Write one sentence about a lighthouse keeper who talks to the sea and waits for an answer.",
    "Translate to French: good morning.",
    "Here is a list: apples, pears, plums, cherries, figs, dates, quinces, medlars, grapes, melons. "
    "Which of these fruits grow on trees, and which one comes first in the alphabet?",
    "2 + 2 = ?",
]


@dataclass(frozen=True)
class _Job:
    """Questions that are asked in one call of ``generate``."""

    title: str
    questions: list[str]
    num_beams: int = 1


_JOBS = (
    _Job("a chat prompt", _CHAT),
    _Job("a ragged batch", _RAGGED),
    _Job("beam search, 4 beams", _CHAT, num_beams=4),
)


@dataclass(frozen=True)
class _Run:
    """One call of ``generate``.

    Attributes
    ----------
    sequences : torch.Tensor
        ``[rows, positions]`` int64
    kv_bytes : int
        Of the cache at its fullest.
    """

    sequences: torch.Tensor
    seconds: float
    kv_bytes: int


class _PeakHook:
    """A forward hook that keeps the statistics of the pool's fullest moment."""

    def __init__(self, model: PreTrainedModel):
        self._model, self.fullest = model, hf_paged.stats(model)

    def __call__(self, module, arguments, output) -> None:
        now = hf_paged.stats(self._model)
        if now.used_blocks >= self.fullest.used_blocks:
            self.fullest = now


def run_demo(new_tokens: int, block_size: int) -> None:
    """Print the demo. Loads the model once and switches its attention implementation.

    Parameters
    ----------
    new_tokens : int
        Tokens to generate in each row.
    block_size : int
        Tokens that a block holds.

    Raises
    ------
    MissingPackageError
        If one of the demo's packages is not installed.
    ValueError
        If one of the numbers is out of range.
    """
    if new_tokens < 1:
        raise ValueError(f"--new-tokens must be at least 1; got {new_tokens}")
    config = hf_paged.PagedConfig(block_size=block_size)
    logging.disable_progress_bar()
    print("Loading SmolLM2-135M-Instruct (float32, CPU) ...", flush=True)
    tokenizer, model = load_tokenizer(), load_model("sdpa")
    hf_paged.configure(model, config)
    if not loader.state().available:
        print("Compiling the CPU kernels, this once ...", flush=True)
        loader.load()
    for job in _JOBS:
        _run_job(tokenizer, model, job, new_tokens)
    print('\nThe same `generate`, the same arguments: only attn_implementation="paged" was set.')


def _run_job(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, job: _Job, new_tokens: int) -> None:
    """Run a job on the dense cache and on pages, and print both."""
    inputs = _encode(tokenizer, job.questions)
    rows, width = inputs["input_ids"].shape
    pads = int((inputs["attention_mask"] == 0).sum())
    print(f"\n== {job.title}: {rows} x {width} positions, {pads} of them padding ==")
    options = {**inputs, "max_new_tokens": new_tokens, "do_sample": False, "num_beams": job.num_beams}
    dense, slot_bytes = _run_dense(model, options)
    paged, fullest = _run_paged(model, options, slot_bytes)
    for answer in tokenizer.batch_decode(paged.sequences[:, width:], skip_special_tokens=True):
        print("  >", " ".join(answer.split()))
    print(f"tokens      equal to dense in {_count_equal(dense.sequences, paged.sequences)} of {rows} rows")
    print(
        f"KV memory   dense {dense.kv_bytes / 2**20:6.2f} MiB   paged {paged.kv_bytes / 2**20:6.2f} MiB"
        f"   ({fullest.used_blocks} blocks of {fullest.block_size}, {fullest.waste:.1%} of their slots empty)"
    )
    print(f"seconds     dense {dense.seconds:6.2f}       paged {paged.seconds:6.2f}")
    stats = hf_paged.stats(model)
    loop = "packed" if stats.packed_calls else "rectangular"
    print(f"page reads  {stats.page_reads}, gathers {sum(stats.gathers.values())}; rows ran {loop}")


def _encode(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> BatchEncoding:
    """Return the questions as a left-padded batch of chats."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert isinstance(inputs, BatchEncoding)
    return inputs


def _run_dense(model: PreTrainedModel, options: dict) -> tuple[_Run, int]:
    """Generate with the dense cache; return the run and the bytes of one token in all layers."""
    model.set_attn_implementation("sdpa")
    output, seconds = _timed(model, {**options, "return_dict_in_generate": True})
    layers = output[CACHE_ARGUMENT].layers
    kv_bytes = sum(states.nbytes for layer in layers for states in (layer.keys, layer.values))
    rows, _, positions, _ = layers[0].keys.shape  # [rows, num_kv_heads, positions, head_dim]
    return _Run(output.sequences, seconds, kv_bytes), kv_bytes // (rows * positions)


def _run_paged(model: PreTrainedModel, options: dict, slot_bytes: int) -> tuple[_Run, hf_paged.Stats]:
    """Generate from pages; return the run and the pool's statistics when it was fullest."""
    model.set_attn_implementation("paged")
    hf_paged.release(model)
    peak = _PeakHook(model)
    hook = model.register_forward_hook(peak)
    sequences, seconds = _timed(model, options)
    hook.remove()
    fullest = peak.fullest
    return _Run(sequences, seconds, fullest.used_blocks * fullest.block_size * slot_bytes), fullest


def _timed(model, options: dict):
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(**options)
    return output, time.perf_counter() - start


def _count_equal(dense: torch.Tensor, paged: torch.Tensor) -> int:
    """Count the rows with the same tokens; none where the lengths differ."""
    return int((dense == paged).all(1).sum()) if dense.shape == paged.shape else 0
