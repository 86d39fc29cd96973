"""TRL's GRPOTrainer with a paged model: the completions that it trains on are those of dense, token for token.

    pip install -c constraints.txt -e ".[examples]"
    python examples/trl_grpo.py

The trainer calls `generate` in training mode, between the steps of its optimizer. Its model has no dropout, so the rows
run packed. With dropout (`LoraConfig(lora_dropout=0.1)`), or in autocast (TRL's default, `bf16=True`), they would run
transformers' own loop, and `fallbacks` would say so.
"""

import argparse
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import hf_paged
from _demo_model import model_path

PROMPT = [{"role": "user", "content": "Describe the sea in one sentence."}]


def train(implementation: str, arguments: argparse.Namespace) -> tuple[list[str], hf_paged.Stats]:
    """Train a LoRA adapter to use short words; return all completions, in the order of their rewards, and the stats."""
    sampled = []

    def short_words(completions, **_) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        sampled.extend(texts)
        return [-len(text) / max(1, len(text.split())) for text in texts]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            max_steps=arguments.steps,
            num_generations=arguments.completions,
            per_device_train_batch_size=arguments.completions,
            max_completion_length=arguments.max_completion_length,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, attn_implementation=implementation
        )
        dataset = Dataset.from_list([{"prompt": PROMPT}] * arguments.steps)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
        trainer = GRPOTrainer(model, short_words, config, dataset, processing_class=tokenizer, peft_config=lora)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    stats, seconds = hf_paged.stats(trainer.model), trainer.state.log_history[-1]["train_runtime"]
    print(f"{implementation:6} {seconds:4.1f} s  ", end="")
    print(f"{stats.packed_calls} packed calls, {stats.page_reads} page reads, fallbacks {stats.fallbacks}")
    return sampled, stats


def main() -> None:
    """Train twice from one seed, dense and paged, and compare what was sampled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default="demo", help="a hub name or a folder")
    parser.add_argument("--steps", type=int, default=2, help="of the optimizer")
    parser.add_argument("--completions", type=int, default=4, help="per prompt")
    parser.add_argument("--max-completion-length", type=int, default=12, help="tokens")
    arguments = parser.parse_args()

    dense, _ = train("sdpa", arguments)
    paged, stats = train("paged", arguments)
    for text in dense:
        print(f"  > {' '.join(text.split())}")
    equal = sum(one == other for one, other in zip(dense, paged))
    print(f"{equal} of {len(dense)} completions are the same, dense and paged")
    if dense != paged:
        sys.exit("wrong: the completions differ")
    if stats.packed_calls < arguments.steps or stats.fallbacks or not stats.page_reads:
        sys.exit("wrong: a call was not packed, or nothing was read from pages")


if __name__ == "__main__":
    main()
