"""Blocks saved by sharing: parallel sampling and beam search, as the PagedAttention paper defines the saving.

    python evals/sharing.py [--prompt-tokens 512] [--new-tokens 64] [--block-size 16]

Saving = blocks saved by sharing / blocks without sharing, over the steps of one `generate`.
"""

import argparse

import torch
from transformers.utils import logging

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer
from hf_paged.models import registry
from hf_paged_evals.prompts import sharegpt_prompts

JOBS = {
    "num_beams=4": {"num_beams": 4},
    "num_return_sequences=8": {"do_sample": True, "num_return_sequences": 8},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer, model = load_tokenizer(), load_model("paged")
    hf_paged.configure(model, hf_paged.PagedConfig(block_size=arguments.block_size))
    ids = [token for prompt in sharegpt_prompts(tokenizer, 16) for token in prompt][: arguments.prompt_tokens]
    for name, options in JOBS.items():
        shared, alone = count_blocks(model, ids, arguments.new_tokens, options)
        print(
            f"{name}, {len(ids)} prompt tokens, {arguments.new_tokens} new, blocks of {arguments.block_size}: "
            f"at the end {shared[-1]} blocks against {alone[-1]} without sharing, "
            f"saving {1 - shared[-1] / alone[-1]:.1%}; mean saving {1 - sum(shared) / sum(alone):.1%}"
        )


def count_blocks(model, ids, new_tokens, options) -> tuple[list[int], list[int]]:
    """Blocks in use at every step of one `generate`, and what they would be without sharing."""
    shared, alone = [], []

    def note(input_ids, scores):
        shared.append(hf_paged.stats(model).used_blocks)
        alone.append(blocks_without_sharing(model))
        return scores

    torch.manual_seed(0)
    model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        logits_processor=[note],
        **options,
    )
    return shared, alone


def blocks_without_sharing(model) -> int:
    """Blocks the live block tables would take if every entry were a block of its own."""
    return sum(
        len(table.blocks)
        for pool in registry.pools_under(model)
        for cache in pool.caches
        for key in pool.groups
        for table in cache.tables_in(key)
    )


if __name__ == "__main__":
    main()
