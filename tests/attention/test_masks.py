"""Attention masks of every content and shape are read as dense reads them: the same result, or the same error."""

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from support import zoo

IDS = zoo.prompts([9, 9])["input_ids"]
FEW = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


def padded() -> torch.Tensor:
    mask = torch.ones(2, 9)
    mask[1, :3] = 0
    return mask


def edited(**values) -> torch.Tensor:
    """The padded mask with other values at some positions of both rows."""
    mask = padded()
    for position, value in values.items():
        mask[:, int(position[1:])] = value
    return mask


CONTENTS = {
    "twos": padded().long() * 2,
    "some_larger": edited(_4=2, _6=3).long(),
    "halves": padded() * 0.5,
    "negative": -padded().long(),
    "nan": padded() * float("nan"),
    "bytes": padded().to(torch.uint8) * 255,
    "float": padded(),
    "bool": padded().bool(),
    "bool_with_a_hole": edited(_5=0).bool(),
    "larger_at_the_start": edited(_3=2).long(),
    "right_padded_twos": padded().flip(1).long() * 2,
    "all_padding": padded() * 0,
}
SHAPES = {
    "one_row": padded()[1:].long(),
    "one_row_of_ones": torch.ones(1, 9, dtype=torch.long),
    "three_rows": torch.cat([padded(), padded()[:1]]).long(),
    "three_rows_of_ones": torch.ones(3, 9, dtype=torch.long),
    "four_rows": torch.cat([padded(), padded()]).long(),
    "no_rows": torch.ones(0, 9, dtype=torch.long),
    "too_short": padded()[:, 1:].long(),
    "too_long": torch.nn.functional.pad(padded(), (0, 2), value=1).long(),
    "one_dimension": torch.ones(9, dtype=torch.long),
    "three_dimensions": padded()[:, None].long(),
}
_BLOCK = torch.ones(9, 9).tril().bool() & padded().bool()[:, None, None]  # [2, 1, 9, 9]
WHOLE = {
    "bool": _BLOCK,
    "additive": torch.where(_BLOCK, 0.0, torch.finfo(torch.float32).min),
    "by_head": _BLOCK.expand(2, 4, 9, 9),
    "one_row": _BLOCK[1:],
    "three_rows": torch.cat([_BLOCK, _BLOCK[:1]]),
    "integers": _BLOCK.long(),
}
MASKS = {
    f"{kind}_{name}": mask
    for kind, masks in {"content": CONTENTS, "shape": SHAPES, "whole": WHOLE}.items()
    for name, mask in masks.items()
}


def generate(**options):
    return lambda model, mask: model.generate(IDS, attention_mask=mask, **FEW, **options)


def lone(model, mask):
    return model(IDS, attention_mask=mask).logits


def own_cache(model, mask):
    return model(IDS, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits


def on_a_past(model, mask):
    cache = DynamicCache(config=model.config)
    model(IDS[:, :5], past_key_values=cache)
    return model(IDS[:, 5:], attention_mask=mask, past_key_values=cache).logits


CALLS = {
    "lone": lone,
    "own_cache": own_cache,
    "on_a_past": on_a_past,
    "greedy": generate(),
    "sample": generate(do_sample=True, top_k=20),
    "sample_two": generate(do_sample=True, num_return_sequences=2),
    "beams": generate(num_beams=2),
}


def outcome(call, model, mask: torch.Tensor):
    """The result of a call, or the kind and the text of its error."""
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return call(model, mask.clone())
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_read_as_dense_reads_it(name, call, mask):
    dense, paged = (outcome(call, model, mask) for model in zoo.pair(name))
    if isinstance(dense, tuple):
        assert paged == dense
        return
    assert isinstance(paged, torch.Tensor), paged
    if dense.dim() == 3 and mask.dim() == 2 and mask.shape[1] >= 9 and mask.shape[0] >= 2:
        real = mask[:2, 9 - dense.shape[1] : 9].bool()  # At pads the results are of no account.
        dense, paged = dense[real], paged[real]
    torch.testing.assert_close(dense, paged, atol=2e-3, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("mask", [CONTENTS["bool"], CONTENTS["float"]], ids=["bool", "float"])
def test_masks_of_other_types_run_packed(mask):
    models = zoo.pair("llama")
    hf_paged.release(models[1])
    assert torch.equal(*(model.generate(IDS, attention_mask=mask, **FEW) for model in models))
    stats = hf_paged.stats(models[1])
    assert stats.packed_calls == 1 and not stats.fallbacks


def test_masks_of_other_values_do_not():
    models = zoo.pair("llama")
    hf_paged.release(models[1])
    assert torch.equal(*(model.generate(IDS, attention_mask=CONTENTS["twos"], **FEW) for model in models))
    stats = hf_paged.stats(models[1])
    assert stats.fallbacks == {"the attention mask has values other than 0 and 1": 1} and stats.page_reads
