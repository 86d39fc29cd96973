"""TRL's GRPOTrainer samples in training mode, between steps of the optimizer: packed, the completions of dense."""

import pytest
import torch

import hf_paged
from support import texts, zoo

pytestmark = pytest.mark.needs_module("trl")
STEPS, COMPLETIONS = 3, 4


def trained(implementation: str, folder, **options) -> tuple[list[str], hf_paged.Stats]:
    """All completions of a short training, and the statistics of the model."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    completed: list[str] = []

    def reward(completions, **_) -> list[float]:
        completed.extend(completions)
        return [float(sum(map(ord, text)) % 7) for text in completions]

    config = GRPOConfig(
        str(folder),
        max_steps=STEPS,
        num_generations=COMPLETIONS,
        per_device_train_batch_size=COMPLETIONS,
        max_completion_length=12,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    model = zoo.build("llama", implementation)
    hf_paged.configure(model, hf_paged.PagedConfig(block_size=4))
    prompts = Dataset.from_list([{"prompt": text} for text in texts.prompts(STEPS, longest=30)])
    trainer = GRPOTrainer(model, reward, config, prompts, processing_class=texts.tokenizer())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert model.training, "the trainer generates in training mode"
    return completed, hf_paged.stats(model)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": False, "optim": "adamw_torch"}], ids=str)
def test_grpo_samples_packed_and_equal_to_dense(options, tmp_path):
    torch.manual_seed(0)
    dense, _ = trained("sdpa", tmp_path, **options)
    paged, stats = trained("paged", tmp_path, **options)
    assert paged == dense and len(paged) == STEPS * COMPLETIONS and len(set(paged)) > STEPS
    assert stats.packed_calls == STEPS and not stats.fallbacks and stats.page_reads
