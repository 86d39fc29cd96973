"""float32: the tokens of dense, in every mode that runs packed and in some that do not."""

import copy
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

import hf_paged
from hf_paged_evals.gpu import models
from hf_paged_evals.gpu.context import Context

_SHAPE = models.Shape("small shape", 256, 512, 4, 8, 2, 64, 997, is_tied=False)
_ROWS, _TOKENS, _NEW = 8, 300, 48
_SPREAD = 0.2  # Of weights: with the usual 0.02 attention is nearly uniform, and a wrong one goes unseen.
_SEED = 11
_THREADS = 6
_BUDGET = "512MiB"
_PLAIN = {"input_ids", "attention_mask", "do_sample", "max_new_tokens"}  # Arguments of calls that choose by logits.
_WINDOWED = {"sliding_window": 33, "head_dim": 64, "num_key_value_heads": 2, "hidden_size": 128}
_WINDOWED |= {"intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 997}
_WINDOWED |= {"initializer_range": _SPREAD}
MODELS = {
    "gemma3_text": _WINDOWED,
    "gpt_oss": {
        **_WINDOWED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def run(context: Context) -> None:
    """Compare every mode with every way to run a step."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    shape = models.TINY if context.is_dry else _SHAPE
    model = models.llama(shape, context.device, torch.float32, _SPREAD)
    ids, mask = padded_prompts(context, shape)
    new = 6 if context.is_dry else _NEW
    for engine, fields in models.capture_modes(context):
        for mode, arguments in _modes(ids, mask):
            arguments = {"do_sample": False, "max_new_tokens": new, **arguments}
            _compare(context, model, engine, mode, fields, functools.partial(model.generate, **arguments))
        lone = [ids[row : row + 1, -(ids.shape[1] // 3 + row) :] for row in range(min(_THREADS, len(ids)))]
        _compare(context, model, engine, "a call per thread", fields, functools.partial(_at_once, model, lone, new))
        for model_type, sizes in MODELS.items():
            try:
                other = models.from_config(model_type, context.device, torch.float32, "eager", **sizes)
                arguments = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": new}
                call = functools.partial(other.generate, **arguments)
                _compare(context, other, engine, model_type, fields, call, "eager")
            except Exception as error:
                context.say("mode", engine=engine, mode=model_type, rows=len(ids), equal_rows=0, error=repr(error))


def padded_prompts(context: Context, shape: models.Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with pads on the left and their mask, each ``[rows, tokens]``; each row is longer than the next."""
    rows, tokens = (3, 30) if context.is_dry else (_ROWS, _TOKENS)
    ids = models.prompts(context, shape, rows, tokens)
    mask = torch.ones_like(ids)
    for row in range(rows):
        pads = row * (tokens // (rows + 1))
        mask[row, :pads] = ids[row, :pads] = 0
    return ids, mask


def _modes(ids: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[str, dict]]:
    """Names of modes, and the arguments of their calls."""
    rows = {"input_ids": ids, "attention_mask": mask}
    yield "greedy, pads on the left", rows
    yield "one row", {"input_ids": ids[:1]}
    yield "sampled", {**rows, "do_sample": True}
    yield "sampled, top k", {**rows, "do_sample": True, "top_k": 20}
    yield "sampled, top p and temperature", {**rows, "do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 1.3}
    yield "sampled, returned sequences", {"input_ids": ids[:2], "do_sample": True, "num_return_sequences": 3}
    yield "repetition penalty", {**rows, "repetition_penalty": 1.3}
    yield "beams", {"input_ids": ids[:2], "num_beams": 3}


def _compare(
    context: Context,
    model: PreTrainedModel,
    engine: str,
    mode: str,
    fields: dict,
    generate: Callable[[], torch.Tensor],
    trusted: str = "sdpa",
) -> None:
    """Run a mode dense, and twice paged from the same seed, and record the rows that are equal in all runs.

    The second paged run replays what the first captured, and finds its prompts in the prefix cache.
    """
    arguments = getattr(generate, "keywords", {})
    try:
        model.set_attn_implementation(trusted)
        torch.manual_seed(_SEED)
        expected = generate()
        models.page(model, memory_budget=_BUDGET, **fields)
        runs = []
        for _ in range(2):
            torch.manual_seed(_SEED)
            runs.append(generate())
        # A row of another length is another row.
        equal = [
            all(run.shape == expected.shape and torch.equal(run[row], expected[row]) for run in runs)
            for row in range(len(expected))
        ]
        first = [_first_difference(run, expected) for run in runs]
        found = {"equal_rows": sum(equal), "first_difference": first, "counters": models.counters(model)}
        if not all(equal) and arguments.keys() <= _PLAIN and not arguments["do_sample"]:
            found["gap"] = max(gap(model, trusted, expected, run, arguments.get("attention_mask")) for run in runs)
        context.say("mode", engine=engine, mode=mode, rows=len(expected), **found)
    except Exception as error:
        context.say("mode", engine=engine, mode=mode, rows=1, equal_rows=0, error=repr(error))
    finally:
        hf_paged.release(model)


def _first_difference(got: torch.Tensor, expected: torch.Tensor) -> int | None:
    """The first position at which any row differs; None if none does."""
    length = min(got.shape[1], expected.shape[1])
    differing = (got[:, :length] != expected[:, :length]).any(0).nonzero()
    if len(differing):
        return int(differing[0])
    return None if got.shape == expected.shape else length


def gap(
    model: PreTrainedModel, trusted: str, expected: torch.Tensor, got: torch.Tensor, mask: torch.Tensor | None
) -> float:
    """How far apart float64 puts the two tokens where greedy rows first differ: a near-tie is decided by rounding.

    Parameters
    ----------
    expected, got : torch.Tensor
        ``[rows, tokens]``
    mask : torch.Tensor or None
        Of the prompts, ``[rows, positions]``; None: there are no pads.

    Returns
    -------
    float
        The largest difference of the two logits over all rows that differ; 0 if none does.
    """
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation(trusted)
    largest = 0.0
    for row in range(len(expected)):
        differing = (expected[row] != got[row]).nonzero()
        if not len(differing):
            continue
        place, pads = int(differing[0]), 0 if mask is None else int((mask[row] == 0).sum())
        with torch.no_grad():
            logits = exact(expected[row : row + 1, pads:place]).logits[0, -1]  # [vocab]
        largest = max(largest, float(logits[expected[row, place]] - logits[got[row, place]]))
    return largest


def _at_once(model: PreTrainedModel, rows: list[torch.Tensor], new: int) -> torch.Tensor:
    """Generate from each row in a thread of its own; the new tokens, ``[rows, new]``."""
    results: list[torch.Tensor | None] = [None] * len(rows)

    def generate(index: int) -> None:
        results[index] = model.generate(rows[index], max_new_tokens=new, do_sample=False)[0, rows[index].shape[1] :]

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(result is None for result in results):
        raise RuntimeError("a thread's call ended without tokens: its own error stands above")
    return torch.stack(results)
