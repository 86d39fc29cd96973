"""LoRA adapters on a paged model: train two, switch between them, and switch them off.

    python examples/peft_adapters.py

All share one block pool. A second question finds the system prompt in the prefix cache; after a switch it is not found,
because the keys and values that one adapter computed are wrong for another.
"""

import argparse
import contextlib
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged
from _demo_model import model_path

SYSTEM = {"role": "system", "content": "You are a helpful assistant who answers in one short sentence."}
QUESTIONS = ["What is the sea?", "What is the moon?"]
LESSONS = {
    "pirate": "Arr, matey! The sea be me home, and the rum be me breakfast!",
    "poet": "O sea, thou silver mirror of the wandering moon and stars!",
}


def train(model: PeftModel, input_ids: torch.Tensor, steps: int) -> float:
    """Teach the active adapter one conversation; return the last loss."""
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    for _ in range(steps):
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def main() -> None:
    """Train, answer with each adapter and with none, paged and dense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default="demo", help="a hub name or a folder")
    parser.add_argument("--steps", type=int, default=7, help="of training, per adapter")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="per answer")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="paged")
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, adapter_name="pirate")
    model.add_adapter("poet", lora)

    def encode(*turns: dict, **options) -> dict[str, torch.Tensor]:
        return tokenizer.apply_chat_template([SYSTEM, *turns], return_tensors="pt", return_dict=True, **options)

    def answer(name: str | None, question: str) -> tuple[str, int]:
        """Return the answer, and how many prompt tokens came from the prefix cache."""
        before = hf_paged.stats(model).prefix_hit_tokens
        inputs = encode({"role": "user", "content": question}, add_generation_prompt=True)
        if name is not None:
            model.set_adapter(name)
        with contextlib.nullcontext() if name else model.disable_adapter():
            output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        hits = hf_paged.stats(model).prefix_hit_tokens - before
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]), hits

    for name, lesson in LESSONS.items():
        model.set_adapter(name)
        chat = encode({"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": lesson})
        print(f"trained {name}: loss {train(model, chat['input_ids'], arguments.steps):.2f}")
    jobs = [(name, question) for name in (*LESSONS, None) for question in QUESTIONS]
    paged = [answer(*job) for job in jobs]
    for (name, question), (text, hits) in zip(jobs, paged):
        print(f"{name or 'no adapter':10}  {question:17}  [{hits:2} tokens found]  {text}")
    stats = hf_paged.stats(model)
    base.set_attn_implementation("sdpa")
    dense = [answer(*job) for job in jobs]
    equal = sum(a[0] == b[0] for a, b in zip(paged, dense))
    print(f"{equal} of {len(jobs)} answers equal those of the dense cache; {stats.packed_calls} calls ran packed")
    if equal < len(jobs) or stats.packed_calls < len(jobs):
        sys.exit(f"wrong: an answer differs, or a call was not packed: {stats.fallbacks}")
    if any(hits for _, hits in paged[::2]) or not all(hits for _, hits in paged[1::2]):
        sys.exit("wrong: an adapter must find what it has stored, and nothing else")


if __name__ == "__main__":
    main()
