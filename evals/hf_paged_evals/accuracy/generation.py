"""Greedy generation for lists of prompts: the new tokens of each row, batch by batch."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_paged_evals.data.sources import batches


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], batch: int, /, **options
) -> list[list[int]]:
    """New tokens of each prompt, up to its end token, that included.

    Parameters
    ----------
    batch : int
        Rows a call; shorter prompts are padded on the left.
    **options
        Of ``model.generate``.
    """
    rows = []
    for some in batches(prompts, batch):
        inputs = tokenizer.pad({"input_ids": some}, return_tensors="pt", padding_side="left").to(model.device)
        output = model.generate(**inputs, do_sample=False, pad_token_id=tokenizer.pad_token_id, **options)
        rows += [_until(row, end_tokens(model)) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
    return rows


def forced_length(tokens: int) -> dict[str, int]:
    """Options that make every row exactly that long."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens at which `model` ends a row."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def first_difference(first: list[int], second: list[int]) -> int | None:
    """The index of the first token that differs, the end of the shorter row included; None if there is none."""
    if first == second:
        return None
    return next((at for at, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second)))


def _until(row: list[int], ends: set[int]) -> list[int]:
    return next((row[: at + 1] for at, token in enumerate(row) if token in ends), row)
