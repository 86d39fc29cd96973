"""Statistics of a model's pool, for users."""

from collections import Counter
from dataclasses import dataclass

import torch

from hf_paged.memory.kv_pool import CaptureCounts, KVCacheSpec, KVPool
from hf_paged.memory.sizing import step_tokens
from hf_paged.models import registry


@dataclass(frozen=True)
class Stats:
    """Counts of a model's pool, summed over its KV cache groups.

    Attributes
    ----------
    total_blocks, used_blocks, cached_blocks, free_blocks : int
        ``free + cached + used == total``. All zero before the first token.
    block_size : int
        Tokens a block holds.
    tokens_stored : int
        Filled slots of the used blocks; a slot that several rows share counts once.
    kv_formats : tuple of str
        How keys and values lie in pages, for each KV cache group that holds some: ``"int8 (full attention)"``. "native"
        is the model's dtype.
    bytes_per_token : int
        Bytes that one token takes in the pages of all layers.
    waste : float
        Share of the used slots that hold no token: ``1 - tokens_stored / (used_blocks * block_size)``.
    token_budget : int
        Tokens that one packed step runs at most.
    page_reads : int
        Attention calls that read keys and values through block tables.
    gathers : dict of str to int
        Times that keys or values were copied out of the pages into a dense tensor, by reason.
    packed_calls : int
        Calls of `generate` whose rows ran on the engine, packed with those of other calls.
    fallbacks : dict of str to int
        Calls of `generate` that ran transformers' own loop, by reason, whether they used the pool or not. Beams,
        assisted decoding and models with a loop of their own are not counted.
    pipelines_together : int
        Runs of a text-generation pipeline over several inputs whose items were begun ahead, to share steps.
    pipelines_in_turn : dict of str to int
        Those whose items ran one after another, by reason. Each item may be packed with calls of other threads.
    prefix_lookups : int
        Packed rows that looked for their first tokens in the prefix cache when they started, preempted ones again.
    prefix_hit_tokens : int
        Tokens that they found there, and did not compute.
    evictions : int
        Cached blocks that were given up because others needed them.
    preemptions : int
        Times that a packed row gave its blocks up to rows that came earlier; it computes its tokens again.
    spilled_blocks, restored_blocks : int
        Of these, blocks that went to the swap space; and blocks that came back from there for a row.
    swapped_bytes : int
        Bytes of the blocks that are in the swap space.
    captured_buckets : tuple of int
        Sizes in rows of the decode steps that are captured now.
    replayed_steps : int
        Packed steps that replayed a captured one.
    eager_steps : dict of str to int
        Packed steps that ran eagerly though the model's decode steps are captured, by reason. Empty where none are,
        as by default on CPUs.
    dropped_captures : dict of str to int
        Captured steps that were dropped, by reason.
    implementation : str
        The model's attention implementation now. Some models change it themselves: Whisper goes to "eager" for
        word timestamps, and stays there until ``model.set_attn_implementation("paged")``.
    """

    total_blocks: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    block_size: int
    tokens_stored: int
    kv_formats: tuple[str, ...]
    bytes_per_token: int
    waste: float
    token_budget: int
    page_reads: int
    gathers: dict[str, int]
    packed_calls: int
    fallbacks: dict[str, int]
    pipelines_together: int
    pipelines_in_turn: dict[str, int]
    prefix_lookups: int
    prefix_hit_tokens: int
    evictions: int
    preemptions: int
    spilled_blocks: int
    restored_blocks: int
    swapped_bytes: int
    captured_buckets: tuple[int, ...]
    replayed_steps: int
    eager_steps: dict[str, int]
    dropped_captures: dict[str, int]
    implementation: str


def stats(model: torch.nn.Module) -> Stats:
    """Statistics of `model`'s pool, or pools if it is made of several decoders.

    Parameters
    ----------
    model : PreTrainedModel or a module that contains some

    Returns
    -------
    Stats
    """
    pools = registry.pools_under(model)
    total = used = cached = free = tokens = reads = packed = lookups = hits = evictions = preemptions = together = 0
    token_bytes = 0
    formats: list[str] = []
    spilled = restored = swapped = 0
    gathers: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    in_turn: Counter[str] = Counter()
    captures, buckets = CaptureCounts(), list[int]()
    for pool in pools:
        with pool.lock:
            for spec, group in pool.groups.items():
                blocks = group.blocks
                free, cached = free + blocks.free_blocks, cached + blocks.cached_blocks
                used, total = used + blocks.used_blocks, total + blocks.total_blocks
                evictions += blocks.num_evictions
                tokens += _tokens_stored(pool, spec)
                token_bytes += group.bytes_per_token
                formats.append(f"{group.kv_format.name} ({group.kind})")
            reads += pool.page_reads
            lookups += pool.prefix_counts.lookups
            hits += pool.prefix_counts.hit_tokens
            spilled, restored = spilled + pool.swap_counts.spilled, restored + pool.swap_counts.restored
            swapped += sum(engine.swapped_bytes for engine in pool.engines)
            gathers.update(pool.gathers)
            captures.add(pool.capture_counts)
            preemptions += sum(engine.num_preemptions for engine in pool.engines)
            buckets += [bucket for engine in pool.engines for bucket in engine.captured_buckets]
    for counts in registry.counts_under(model):
        packed += counts.packed
        fallbacks.update(counts.fallbacks)
        together += counts.pipelines_together
        in_turn.update(counts.pipelines_in_turn)
    budgets = [engine.token_budget for pool in pools for engine in pool.engines]
    config = pools[0].config if pools else registry.config_of(model)
    block_size = config.block_size
    waste = 1 - tokens / (used * block_size) if used else 0.0
    return Stats(
        total_blocks=total,
        used_blocks=used,
        cached_blocks=cached,
        free_blocks=free,
        block_size=block_size,
        tokens_stored=tokens,
        kv_formats=tuple(dict.fromkeys(formats)),
        bytes_per_token=token_bytes,
        waste=waste,
        token_budget=min(budgets, default=step_tokens(config, _device_of(model, pools))),
        page_reads=reads,
        gathers=dict(gathers),
        packed_calls=packed,
        fallbacks=dict(fallbacks),
        pipelines_together=together,
        pipelines_in_turn=dict(in_turn),
        prefix_lookups=lookups,
        prefix_hit_tokens=hits,
        evictions=evictions,
        preemptions=preemptions,
        spilled_blocks=spilled,
        restored_blocks=restored,
        swapped_bytes=swapped,
        captured_buckets=tuple(sorted(buckets)),
        replayed_steps=captures.replays,
        eager_steps=dict(captures.eager_steps),
        dropped_captures=dict(captures.dropped),
        implementation=registry.implementation_of(model),
    )


def _device_of(model: torch.nn.Module, pools: list[KVPool]) -> torch.device:
    """Where the pools are; before the first token, where they would be made."""
    parameters = (parameter.device for parameter in model.parameters())
    return next((spec.device for pool in pools for spec in pool.groups), next(parameters, torch.device("cpu")))


def _tokens_stored(pool: KVPool, spec: KVCacheSpec) -> int:
    """Filled slots of the blocks that caches and engines use in one KV cache group."""
    filled: dict[int, int] = {}
    for cache in pool.caches:
        for table in cache.tables_in(spec):
            left = table.num_tokens - table.base
            for block in table.blocks:
                filled[block] = max(filled.get(block, 0), min(left, pool.config.block_size))
                left -= pool.config.block_size
    return sum(filled.values())
