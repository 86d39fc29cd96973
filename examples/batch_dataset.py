"""A text-generation pipeline over a `datasets.Dataset`: its rows run packed, though the loop takes them one by one.

    python examples/batch_dataset.py
    python examples/batch_dataset.py --rows 64 --max-new-tokens 64

No `batch_size` is set and nothing is padded: up to 32 rows run at a time, and the next one joins when one ends. Rows
that start later find the beginning that all of them share in the prefix cache.
"""

import argparse
import sys
import time

import torch
from datasets import Dataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_paged
from _demo_model import model_path

SYSTEM = "You are a helpful assistant. Answer each question about geography in one short sentence, and in English."
PLACES = ["France", "Japan", "Brazil", "Egypt", "Canada", "Kenya", "Norway", "Peru", "India", "Greece"]
QUESTIONS = [
    "What is the capital of {}?",
    "Name a river in {}.",
    "Which languages are spoken in {}, and in which parts?",
]


def geography(count: int) -> Dataset:
    """Build a dataset of `count` chats in a column "messages": one system prompt, questions of several lengths."""
    texts = [QUESTIONS[row % len(QUESTIONS)].format(PLACES[row % len(PLACES)]) for row in range(count)]
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in texts]
    return Dataset.from_dict({"messages": chats})


def main() -> None:
    """Run the pipeline paged and dense, and compare answers and seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default="demo", help="a hub name or a folder")
    parser.add_argument("--rows", type=int, default=10, help="of the dataset")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="per row")
    arguments = parser.parse_args()

    dataset = geography(arguments.rows)
    kwargs = {"attn_implementation": "paged"}
    pipe = pipeline("text-generation", model=arguments.model, dtype=torch.float32, device="cpu", model_kwargs=kwargs)

    def run() -> tuple[list[str], float]:
        answers, start = [], time.perf_counter()
        options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "return_full_text": False}
        for result in pipe(KeyDataset(dataset, "messages"), **options):
            answers.append(result[0]["generated_text"])
        return answers, time.perf_counter() - start

    paged, paged_seconds = run()
    for chat, answer in zip(dataset["messages"], paged):
        print(f"{chat[-1]['content']:55} {' '.join(answer.split())}")
    stats = hf_paged.stats(pipe.model)
    print(f"\n{stats.packed_calls} of {arguments.rows} rows ran packed; ", end="")
    print(f"{stats.prefix_hit_tokens} tokens of their prompts came from the prefix cache")

    pipe.model.set_attn_implementation("sdpa")
    dense, dense_seconds = run()
    equal = sum(a == b for a, b in zip(paged, dense))
    print(f"{equal} of {arguments.rows} answers equal those of the dense cache")
    print(f"paged {paged_seconds:.1f} s, dense, row by row, {dense_seconds:.1f} s")
    if equal < arguments.rows:
        sys.exit("wrong: an answer differs")
    if stats.packed_calls < arguments.rows:
        sys.exit(f"wrong: some rows did not run packed: {stats.fallbacks}")


if __name__ == "__main__":
    main()
