"""``hf-paged demo``: one real model, dense and paged, on three jobs; answers, equality, memory."""

import time
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer
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
_JOBS = {
    "a chat prompt": (_CHAT, {}),
    "a ragged batch": (_RAGGED, {}),
    "beam search, 4 beams": (_CHAT, {"num_beams": 4}),
}


@dataclass
class Peak:
    """A forward hook that notes the fullest moment of the pool."""

    model: PreTrainedModel
    fullest: hf_paged.Stats | None = field(default=None)

    def __call__(self, module, arguments, output):
        now = hf_paged.stats(self.model)
        if self.fullest is None or now.used_blocks >= self.fullest.used_blocks:
            self.fullest = now


def run_demo(new_tokens: int, block_size: int) -> None:
    """Print the demo. Loads the model once and switches its attention implementation.

    Raises
    ------
    ImportError, PagedError
        If the demo's packages are not installed.
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
    for title, (questions, options) in _JOBS.items():
        chats = [[{"role": "user", "content": question}] for question in questions]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        pads = int((inputs["attention_mask"] == 0).sum())
        print(f"\n== {title}: {len(chats)} x {inputs['input_ids'].shape[1]} positions, {pads} of them padding ==")
        options = {"max_new_tokens": new_tokens, "do_sample": False, **options}
        model.set_attn_implementation("sdpa")
        dense, dense_seconds = _timed(model, inputs, {**options, "return_dict_in_generate": True})
        stored = dense.past_key_values.layers[0].keys
        dense_bytes = sum(t.nbytes for layer in dense.past_key_values.layers for t in (layer.keys, layer.values))
        model.set_attn_implementation("paged")
        hf_paged.release(model)
        peak = Peak(model)
        hook = model.register_forward_hook(peak)
        paged, paged_seconds = _timed(model, inputs, options)
        hook.remove()
        _report(tokenizer, inputs, dense.sequences, paged)
        full, stats = peak.fullest, hf_paged.stats(model)
        paged_bytes = full.used_blocks * block_size * dense_bytes // (stored.shape[0] * stored.shape[2])
        print(f"KV memory   dense {dense_bytes / 2**20:6.2f} MiB   paged {paged_bytes / 2**20:6.2f} MiB", end="")
        print(f"   ({full.used_blocks} blocks of {block_size}, {full.waste:.1%} of their slots empty)")
        print(f"seconds     dense {dense_seconds:6.2f}       paged {paged_seconds:6.2f}")
        rows = "packed" if stats.packed_calls else "rectangular"
        print(f"page reads  {stats.page_reads}, gathers {sum(stats.gathers.values())}; rows ran {rows}")
        del dense, paged, stored
    print('\nThe same `generate`, the same arguments: only attn_implementation="paged" was set.')


def _timed(model, inputs, options):
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(**inputs, **options)
    return output, time.perf_counter() - start


def _report(tokenizer, inputs, dense: torch.Tensor, paged: torch.Tensor) -> None:
    width = inputs["input_ids"].shape[1]
    for answer in tokenizer.batch_decode(paged[:, width:], skip_special_tokens=True):
        print("  >", " ".join(answer.split()))
    same = dense.shape == paged.shape and (dense == paged).all(1)
    equal = int(same.sum()) if isinstance(same, torch.Tensor) else 0
    print(f"tokens      equal to dense in {equal} of {len(dense)} rows")
