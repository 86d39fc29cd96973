"""A chat of several turns. Each turn computes only its new tokens: the prefix cache has those of the turns before.

    python examples/chat.py
    python examples/chat.py "What is a whale?" "How long does it live?" "And an elephant?"

The code passes the whole chat to `generate` each time, as without hf_paged. Only full blocks are found again, so a few
tokens of the turn before are computed anew.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_paged
from _demo_model import model_path

QUESTIONS = [
    "Name one animal that lives in the sea. Answer in one sentence.",
    "What does it eat?",
    "And where could I see one?",
]


def main() -> None:
    """Chat, and show after each turn how much of its prompt was found in the prefix cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="what the user says, turn by turn")
    parser.add_argument("--model", type=model_path, default="demo", help="a hub name or a folder")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="per answer")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="paged")
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}

    chat, turns, hits = [], [], []
    for question in arguments.questions:
        chat.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        length = inputs["input_ids"].shape[1]
        print(f"\nuser       {question}\nassistant  ", end="")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(**inputs, **options, streamer=streamer)
        chat.append({"role": "assistant", "content": tokenizer.decode(output[0, length:], skip_special_tokens=True)})
        turns.append((inputs, output))
        hits.append(hf_paged.stats(model).prefix_hit_tokens - sum(hits))
        print(f"           [{length} prompt tokens: {hits[-1]} from the prefix cache, {length - hits[-1]} computed]")

    model.set_attn_implementation("sdpa")
    equal = sum(torch.equal(model.generate(**inputs, **options), output) for inputs, output in turns)
    print(f"\n{equal} of {len(turns)} answers equal those of the dense cache, token for token")
    if equal < len(turns):
        sys.exit("wrong: an answer differs")
    if not all(hits[1:]):
        sys.exit("wrong: a turn found nothing of the turns before it")


if __name__ == "__main__":
    main()
