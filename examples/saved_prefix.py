"""A long system prompt in a file: a process that has just started answers its first question from it.

    python examples/saved_prefix.py
    python examples/saved_prefix.py --question "Which book is by a woman?" --books 60

One process saves the prefix. Two more answer the same question, each as its first: one computes the whole prompt, the
other loads the file and computes the question.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged
from _demo_model import model_path

AUTHORS = ["Mary Shelley", "Jules Verne", "Jane Austen", "Herman Melville", "Lewis Carroll", "Bram Stoker", "Aesop"]
KINDS = ["a novel", "a diary", "a travel book", "a book of poems", "a play"]


def catalogue(books: int) -> str:
    """Write the system prompt of a librarian with a catalogue of so many books."""
    lines = [f"Shelf {place}: {KINDS[place % 5]} by {AUTHORS[place % 7]}, {1800 + place}." for place in range(1, books)]
    return "You are a librarian. You answer in one sentence, from this catalogue.\n" + "\n".join(lines)


def encoded(tokenizer, chat: list[dict], is_asking: bool) -> dict:
    """Return the tokens of a chat; those of its system prompt alone are the beginning of those of every chat."""
    return tokenizer.apply_chat_template(chat, add_generation_prompt=is_asking, return_tensors="pt", return_dict=True)


def answer(arguments: argparse.Namespace) -> None:
    """Answer in a process that has just started, and print what came of it as JSON."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="paged")
    chat = [{"role": "system", "content": catalogue(arguments.books)}, {"role": "user", "content": arguments.question}]
    inputs, start = encoded(tokenizer, chat, is_asking=True), time.perf_counter()
    if arguments.load:
        hf_paged.load_prefix(model, arguments.load)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    first, hits = time.perf_counter() - start, hf_paged.stats(model).prefix_hit_tokens
    tokens = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)[0].tolist()
    length = inputs["input_ids"].shape[1]
    print(json.dumps({"seconds": first, "hits": hits, "length": length, "tokens": tokens}))


def main() -> None:
    """Save the prefix, let two new processes answer, and compare them with the dense cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default="demo", help="a hub name or a folder")
    parser.add_argument("--books", type=int, default=40, help="lines of the system prompt")
    parser.add_argument("--question", default="What is on shelf 7?")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer(arguments)
        return

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="paged")
    chat = [{"role": "system", "content": catalogue(arguments.books)}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "librarian.safetensors"
        saved = hf_paged.save_prefix(model, path, encoded(tokenizer, chat, is_asking=False)["input_ids"])
        print(f"Saved {saved} tokens in {path.stat().st_size / 2**20:.1f} MiB")
        own = ["--answer", "--model", arguments.model, "--books", str(arguments.books)]
        own += ["--question", arguments.question, "--max-new-tokens", str(arguments.max_new_tokens)]
        answers = []
        for name, more in (("without the file", []), ("with the file", ["--load", str(path)])):
            command = [sys.executable, __file__, *own, *more]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            answers.append(found := json.loads(done.stdout.splitlines()[-1]))
            print(f"A new process, {name}: first token after {found['seconds']:.2f} s", end="")
            print(f", {found['hits']} of {found['length']} prompt tokens found")

    chat.append({"role": "user", "content": arguments.question})
    inputs = encoded(tokenizer, chat, is_asking=True)
    model.set_attn_implementation("sdpa")
    dense = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)[0].tolist()
    text = tokenizer.decode(dense[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"\n{arguments.question}\n  > {text}")
    equal = sum(found["tokens"] == dense for found in answers)
    print(f"{equal} of 2 answers equal those of the dense cache, token for token")
    if equal < 2:
        sys.exit("wrong: an answer differs")
    if [found["hits"] for found in answers] != [0, saved]:
        sys.exit("wrong: the prefix was not found as it was saved")


if __name__ == "__main__":
    main()
