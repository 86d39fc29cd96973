"""A small proof that "paged" works here: a tiny random model generates the same tokens both ways."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_paged.errors import PagedError
from hf_paged.metrics import Stats, stats
from hf_paged.models import registry

_ROWS, _PROMPT, _PADS, _NEW = 2, 20, 7, 16


def check_paged() -> Stats:
    """Generate with a tiny random llama on the CPU, dense and paged, from a ragged batch. "paged" must be enabled.

    Draws from no global random state and leaves no model or pool behind.

    Returns
    -------
    Stats
        Of the paged run.

    Raises
    ------
    PagedError
        If the hooks are refused, or what was generated or counted is not as it must be.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Large weights: with the default ones attention is nearly uniform, and a wrong one goes unseen.
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
            pad_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
        ids = torch.randint(3, 97, (_ROWS, _PROMPT))
    mask = torch.ones_like(ids)
    mask[1, :_PADS] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": _NEW, "min_new_tokens": _NEW}
    dense = model.generate(**arguments, do_sample=False)
    model.set_attn_implementation("paged")
    paged = model.generate(**arguments, do_sample=False)
    counted = stats(model)
    if not torch.equal(dense, paged):
        raise PagedError("a tiny model generates other tokens from pages than from the dense cache")
    if counted.fallbacks:
        raise PagedError(f"a tiny model's rows could not be packed: {', '.join(counted.fallbacks)}")
    if not counted.page_reads:
        raise PagedError("a tiny model generated without reading any page")
    if counted.used_blocks:
        raise PagedError(f"a tiny model left {counted.used_blocks} blocks in use after it had generated")
    for pool in registry.pools_under(model):
        pool.check_integrity()
    return counted
