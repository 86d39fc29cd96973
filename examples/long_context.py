"""A long document under a memory budget: the plan, two questions, and what the pool did.

    python examples/long_context.py
    python examples/long_context.py --days 300 --memory-budget 320MiB

The first question computes the document; the second finds it in the prefix cache. A prompt that the budget can never
hold raises an error that says how much it needs.
"""

import argparse
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_paged
from _demo_model import model_path

PORTS = ["Lisbon", "Oslo", "Naples", "Dublin", "Bergen", "Athens", "Malta"]
CARGO = ["tea", "wool", "salt", "copper", "apples", "timber", "glass", "paper", "rice", "oil", "cloth"]
NEEDLE = "The captain hid the gold under the old lighthouse of Bergen."
QUESTIONS = ["What did the captain hide, and where?", "Repeat the sentence about gold."]


def ships_log(days: int) -> str:
    """Write a log with a line a day, and in its middle the one line that matters."""
    lines = [f"Day {day}: we left {PORTS[day % 7]} with a load of {CARGO[day % 11]}." for day in range(1, days + 1)]
    lines.insert(days // 2, NEEDLE)
    return "This is the log of a ship.\n" + "\n".join(lines)


class Clock(TextStreamer):
    """Print the text as it comes, and note when the first token came."""

    first = None

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.first = self.first or time.perf_counter()
        super().put(value)


def main() -> None:
    """Plan, ask, ask for more than fits, and compare with the dense cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default="demo", help="a hub name or a folder")
    parser.add_argument("--days", type=int, default=150, help="lines of the document")
    parser.add_argument("--memory-budget", default="160MiB", help="for keys and values")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="per answer")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="paged")
    document = ships_log(arguments.days)
    chats = [[{"role": "user", "content": f"{document}\n\n{question}"}] for question in QUESTIONS]
    encode = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompts = [tokenizer.apply_chat_template(chat, **encode) for chat in chats]
    context = max(inputs["input_ids"].shape[1] for inputs in prompts) + arguments.max_new_tokens
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}

    plan = ["plan", arguments.model, "--dtype", "float32", "--batch", "1", "--context", str(context)]
    plan += ["--memory-budget", arguments.memory_budget]
    print("$ hf-paged", *plan, flush=True)
    subprocess.run([sys.executable, "-m", "hf_paged_command", *plan], check=True)

    # The document is read again with each question: its blocks may stay, whatever they take of the budget.
    config = hf_paged.PagedConfig(memory_budget=arguments.memory_budget, prefix_cache_share=1.0)
    hf_paged.configure(model, config)
    outputs, hits = [], 0
    for question, inputs in zip(QUESTIONS, prompts):
        print(f"\n{question}\n  > ", end="")
        clock, start = Clock(tokenizer, skip_prompt=True, skip_special_tokens=True), time.perf_counter()
        outputs.append(model.generate(**inputs, **options, streamer=clock))
        stats, length, before = hf_paged.stats(model), inputs["input_ids"].shape[1], hits
        hits = stats.prefix_hit_tokens
        print(f"  first token after {clock.first - start:.2f} s", end="")
        print(f", {hits - before} of {length} prompt tokens from the prefix cache")
    print(f"\nPool: {stats.cached_blocks} of {stats.total_blocks} blocks are cached, {stats.evictions} were evicted")

    hf_paged.configure(model, hf_paged.PagedConfig(memory_budget="16MiB"))
    try:
        model.generate(**prompts[0], **options)
        sys.exit("wrong: 16MiB cannot hold this prompt")
    except hf_paged.OutOfBlocksError as error:
        print(f"With 16MiB: {error}")

    model.set_attn_implementation("sdpa")
    if not torch.equal(outputs[0], model.generate(**prompts[0], **options)):
        sys.exit("wrong: the first answer differs from that of the dense cache")
    print("The first answer equals that of the dense cache, token for token")
    if not hits:
        sys.exit("wrong: the second question found nothing of the first")


if __name__ == "__main__":
    main()
