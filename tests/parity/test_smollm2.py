"""A real model: SmolLM2-135M-Instruct, float32, left-padded ragged batches."""

import copy

import pytest
import torch

import hf_paged
from hf_paged.cli.demo_model import load_model, load_tokenizer
from support.parity import PageReads, assert_rows_equal

QUESTIONS = [
    "What is the capital of France?",
    "Write two sentences about why the sea is salty, and how one could find out.",
    "2 + 2 = ?",
]
MODES = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "sample": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "sample_return": {"do_sample": True, "num_return_sequences": 2},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module")
def smollm2():
    """(model, tokenizer); tests switch the implementation, so the weights are loaded once."""
    return load_model("sdpa"), load_tokenizer()


def encode(tokenizer, questions):
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def generate(model, implementation, inputs, **options):
    model.set_attn_implementation(implementation)
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=24, **options)


@pytest.mark.parametrize(
    "mode, block_size",
    [
        pytest.param(mode, size, marks=() if (mode, size) == ("greedy", 32) else pytest.mark.slow)
        for mode in MODES
        for size in (4, 32)
    ],
)
def test_ragged_batch(smollm2, mode, block_size):
    model, tokenizer = smollm2
    inputs = encode(tokenizer, QUESTIONS[:1] if mode == "lookup" else QUESTIONS)
    expected = generate(model, "sdpa", inputs, **MODES[mode])
    hf_paged.configure(model, hf_paged.PagedConfig(block_size=block_size))
    with PageReads(model):
        got = generate(model, "paged", inputs, **MODES[mode])
    model.set_attn_implementation("sdpa")
    assert_rows_equal(model, inputs, expected, got)


def test_stop_strings(smollm2):
    model, tokenizer = smollm2
    inputs = encode(tokenizer, QUESTIONS[:1])
    options = {"do_sample": False, "stop_strings": ["Paris"], "tokenizer": tokenizer}
    expected = generate(model, "sdpa", inputs, **options)
    with PageReads(model):
        got = generate(model, "paged", inputs, **options)
    assert torch.equal(expected, got) and "Paris" in tokenizer.decode(got[0])


@pytest.mark.slow
def test_bfloat16_logits_are_as_good_as_those_of_sdpa():
    """In bf16 every engine rounds otherwise: distance to the float32 logits is compared, teacher-forced."""
    model = load_model("sdpa", torch.bfloat16)
    ids = torch.randint(100, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    exact = _logits(copy.deepcopy(model).float(), ids)
    divergence = {}
    for implementation in ("sdpa", "paged"):
        model.set_attn_implementation(implementation)
        logits = _logits(model, ids)
        divergence[implementation] = torch.nn.functional.kl_div(logits, exact, log_target=True, reduction="none").sum(
            -1
        )
    assert hf_paged.stats(model).page_reads > 0
    assert divergence["paged"].mean() < 1.5 * divergence["sdpa"].mean()
    assert divergence["paged"].max() < 2e-2


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after a prompt of 8 tokens and after each further one, [pieces, batch, vocabulary]."""
    cache, rows = None, []
    with torch.no_grad():
        for piece in (ids[:, :8], *ids[:, 8:].split(1, dim=1)):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[:, -1].float())
    return torch.stack(rows).log_softmax(-1)
