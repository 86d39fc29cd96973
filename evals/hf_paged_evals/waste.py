"""How much of the blocks in use holds no token, on ShareGPT prompts.

python evals/waste.py [--prompts 32] [--new-tokens 128] [--block-size 16 --block-size 32]
"""

import argparse

from prompts import sharegpt_prompts
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--block-size", type=int, action="append")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer, model = load_tokenizer(), load_model("paged")
    prompts = sharegpt_prompts(tokenizer, arguments.prompts)
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    held = batch["attention_mask"].sum().item() / batch["attention_mask"].numel()
    print(f"{len(prompts)} prompts, {sum(map(len, prompts))} tokens; the dense rectangle holds {1 - held:.1%} padding")
    for block_size in arguments.block_size or [hf_paged.PagedConfig().block_size, 32]:
        hf_paged.configure(model, hf_paged.PagedConfig(block_size=block_size))
        seen = waste_of_every_step(model, batch, arguments.new_tokens)
        mean = sum(seen) / len(seen)
        print(
            f"block size {block_size:3}: waste {seen[0]:.2%} after the prefill, {mean:.2%} mean, "
            f"{seen[-1]:.2%} after {arguments.new_tokens} new tokens"
        )


def waste_of_every_step(model, batch, new_tokens) -> list[float]:
    """Waste at every step of one greedy `generate`."""
    seen = []

    def note(input_ids, scores):
        seen.append(hf_paged.stats(model).waste)
        return scores

    model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, logits_processor=[note])
    return seen


if __name__ == "__main__":
    main()
