"""KV formats: how the keys and values of a layer lie in its pages.

A format with the three methods `parts`, `encode` and `decode` is right everywhere. It overrides the operations on
pages where a kernel does better. Operations get the pages from the storage that owns them and keep nothing.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from hf_paged.errors import UnsupportedError
from hf_paged_kernels import ops
from hf_paged_kernels.quantized import dequantize, quantize, rotate
from hf_paged_kernels.torch_sdpa import stored_tokens

Pages = tuple[torch.Tensor, ...]  # Each [num_blocks, num_kv_heads, block_size, size]: those of keys, then of values.


@dataclass(frozen=True)
class BlockShape:
    """The states that one block of one layer holds; key and value head sizes may differ."""

    num_kv_heads: int
    block_size: int
    key_dim: int
    value_dim: int


class Part(NamedTuple):
    """One tensor of pages: `size` numbers of `dtype` for each token and KV head."""

    dtype: torch.dtype
    size: int


class KVFormat(abc.ABC):
    """The way in which states of one dtype are stored in pages, attended to and read back.

    The keys of a layer lie in one tensor of pages for each of ``parts(key_dim)``, its values in one for each of
    ``parts(value_dim)``. Slots that hold no token contain anything, NaN included, and must never matter.

    Parameters
    ----------
    states_dtype : torch.dtype
        Of the keys and values that the model computes, and of those that it reads back.

    Attributes
    ----------
    name : str
        As `PagedConfig.kv_dtype` names it.
    is_lossless : bool
        True: states are read back as they were stored, bit for bit.

    Raises
    ------
    UnsupportedError
        If the format does not store states of that dtype.
    """

    name: ClassVar[str]
    is_lossless: ClassVar[bool] = False

    def __init__(self, states_dtype: torch.dtype):
        self.states_dtype = states_dtype
        if not self.accepts(states_dtype):
            raise UnsupportedError(
                f"the KV format {self.name!r} does not store states in {states_dtype}: load the model in another "
                "dtype, or leave kv_dtype out, which keeps the model's own"
            )

    @classmethod
    def accepts(cls, states_dtype: torch.dtype) -> bool:
        """Tell whether states of this dtype can be stored."""
        return states_dtype.is_floating_point

    @abc.abstractmethod
    def parts(self, head_dim: int) -> tuple[Part, ...]:
        """Tensors that hold the keys (or the values) of a layer, such as numbers and their scales.

        As many for every `head_dim`.
        """

    @abc.abstractmethod
    def encode(self, states: torch.Tensor, is_key: bool) -> tuple[torch.Tensor, ...]:
        """Turn keys, or values, ``[..., head_dim]`` into what is stored, ``[..., size]`` for each part.

        Each token and head by itself: what a slot holds does not depend on other slots.
        """

    @abc.abstractmethod
    def decode(self, parts: Sequence[torch.Tensor], is_key: bool) -> torch.Tensor:
        """Turn stored ``[..., size]`` tensors, one per part, into states ``[..., head_dim]`` in `states_dtype`."""

    def as_stored(self, states: torch.Tensor, is_key: bool) -> torch.Tensor:
        """Keys, or values, ``[..., head_dim]`` as they are once they are stored and read back."""
        return self.decode(self.encode(states, is_key), is_key)

    def block_bytes(self, shape: BlockShape) -> int:
        """Bytes that one block of one layer takes, keys and values."""
        parts = self.parts(shape.key_dim) + self.parts(shape.value_dim)
        return shape.num_kv_heads * shape.block_size * sum(part.dtype.itemsize * part.size for part in parts)

    def write(
        self,
        pages: Pages,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
        slot_mapping: torch.Tensor,  # [num_tokens] int64
    ) -> None:
        """Store new tokens in their slots; a negative slot is none. Mutates `pages`, nothing else."""
        if not len(slot_mapping):
            return
        size = pages[0].shape[2]
        tokens, slots, is_stored = stored_tokens(slot_mapping)
        block, offset = slots // size, slots % size
        for page, part in zip(pages, (*self.encode(key, True), *self.encode(value, False))):
            page[block, :, offset] = torch.where(is_stored, part[tokens], page[block, :, offset])

    def attend(
        self,
        pages: Pages,
        query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
        block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
        context_lens: torch.Tensor,  # [num_rows] int64
        cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,  # [num_heads]
    ) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
        """Attend to stored tokens, as `hf_paged_kernels.ops.paged_attention` does. Mutates nothing."""
        blocks = block_tables.flatten()
        keys, values = (self.gather(pages, is_key, blocks) for is_key in (True, False))
        tables = torch.arange(blocks.shape[0], device=blocks.device).view_as(block_tables)
        return ops.paged_attention(
            query, keys, values, tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks
        )

    def write_and_attend(
        self,
        pages: Pages,
        query: torch.Tensor,  # [num_tokens, num_heads, key_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, key_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, value_dim]
        slot_mapping: torch.Tensor,  # [num_tokens] int64
        block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
        context_lens: torch.Tensor,  # [num_rows] int64
        cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,  # [num_heads]
    ) -> torch.Tensor:  # [num_tokens, num_heads, value_dim]
        """`write`, then `attend`. Mutates `pages`, nothing else."""
        self.write(pages, key, value, slot_mapping)
        return self.attend(pages, query, block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks)

    def attend_latents(
        self,
        pages: Pages,
        query_latent: torch.Tensor,  # [num_tokens, num_heads, key_dim]
        query_rope: torch.Tensor,  # [num_tokens, num_heads, value_dim]
        block_tables: torch.Tensor,  # [num_rows, max_blocks] int64
        context_lens: torch.Tensor,  # [num_rows] int64
        cu_seqlens_q: torch.Tensor,  # [num_rows + 1] int64
        scale: float,
        window: int | None,
    ) -> torch.Tensor:  # [num_tokens, num_heads, key_dim]
        """Attend to stored latents, the keys, and their rope parts, the values, as `ops.latent_attention` does."""
        blocks = block_tables.flatten()
        latents, ropes = (self.gather(pages, is_key, blocks) for is_key in (True, False))
        tables = torch.arange(blocks.shape[0], device=blocks.device).view_as(block_tables)
        return ops.latent_attention(
            query_latent, query_rope, latents, ropes, tables, context_lens, cu_seqlens_q, scale, window
        )

    def gather(self, pages: Pages, is_key: bool, blocks: torch.Tensor) -> torch.Tensor:
        """Copy whole blocks out of the pages, keys or values.

        Parameters
        ----------
        blocks : torch.Tensor
            ``[num_blocks]`` int64

        Returns
        -------
        torch.Tensor
            ``[num_blocks, num_kv_heads, block_size, head_dim]`` in `states_dtype`.
        """
        half = len(pages) // 2
        return self.decode([page[blocks] for page in (pages[:half] if is_key else pages[half:])], is_key)

    def copy_blocks(
        self,
        pages: Pages,
        source: torch.Tensor,  # [num_copies] int64
        destination: torch.Tensor,  # [num_copies] int64
    ) -> None:
        """Copy whole blocks (copy-on-write). Mutates `pages`; sources and destinations are disjoint."""
        for page in pages:
            page[destination] = page[source]


class NativeFormat(KVFormat):
    """States as they are, in the model's dtype."""

    name = "native"
    is_lossless = True

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return (Part(self.states_dtype, head_dim),)

    def encode(self, states: torch.Tensor, is_key: bool) -> tuple[torch.Tensor, ...]:
        return (states,)

    def decode(self, parts: Sequence[torch.Tensor], is_key: bool) -> torch.Tensor:
        return parts[0]

    def write(self, pages, key, value, slot_mapping):
        key_cache, value_cache = pages
        ops.write_kv(key, value, key_cache, value_cache, slot_mapping)

    def attend(self, pages, query, block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks):
        key_cache, value_cache = pages
        return ops.paged_attention(
            query, key_cache, value_cache, block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks
        )

    def write_and_attend(
        self, pages, query, key, value, slot_mapping,
        block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks,
    ):  # fmt: skip
        key_cache, value_cache = pages
        return ops.write_and_attend(
            query, key, value, key_cache, value_cache, slot_mapping,
            block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks,
        )  # fmt: skip

    def attend_latents(
        self, pages, query_latent, query_rope, block_tables, context_lens, cu_seqlens_q, scale, window
    ):  # fmt: skip
        latent_cache, rope_cache = pages
        return ops.latent_attention(
            query_latent, query_rope, latent_cache, rope_cache, block_tables, context_lens, cu_seqlens_q, scale, window
        )

    def copy_blocks(self, pages, source, destination):
        key_cache, value_cache = pages
        ops.copy_blocks(key_cache, value_cache, source, destination)


class QuantizedFormat(KVFormat):
    """Codes of eight bits, with a float32 scale for each token and KV head, see `hf_paged_kernels.quantized`.

    Keys are rotated before they are quantised, so that a channel that is far larger than the others does not drown
    them (QuaRot, Ashkboos et al., 2024). The kernels rotate queries alike, and turn codes into numbers as they read
    them. Decoded states are rotated back.
    """

    codes: ClassVar[torch.dtype]

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return Part(self.codes, head_dim), Part(torch.float32, 1)

    def encode(self, states: torch.Tensor, is_key: bool) -> tuple[torch.Tensor, ...]:
        return quantize(rotate(states) if is_key else states, self.codes)

    def decode(self, parts: Sequence[torch.Tensor], is_key: bool) -> torch.Tensor:
        codes, scales = parts
        states = dequantize(codes, scales, torch.promote_types(self.states_dtype, torch.float32))
        return (rotate(states) if is_key else states).to(self.states_dtype)

    def write(self, pages, key, value, slot_mapping):
        key_codes, key_scales, value_codes, value_scales = pages
        ops.write_kv(key, value, key_codes, value_codes, slot_mapping, key_scales, value_scales)

    def attend(self, pages, query, block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks):
        key_codes, key_scales, value_codes, value_scales = pages
        return ops.paged_attention(
            query, key_codes, value_codes, block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks,
            key_scales, value_scales,
        )  # fmt: skip

    def write_and_attend(
        self, pages, query, key, value, slot_mapping,
        block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks,
    ):  # fmt: skip
        key_codes, key_scales, value_codes, value_scales = pages
        return ops.write_and_attend(
            query, key, value, key_codes, value_codes, slot_mapping,
            block_tables, context_lens, cu_seqlens_q, scale, window, softcap, sinks, key_scales, value_scales,
        )  # fmt: skip

    def copy_blocks(self, pages, source, destination):
        key_codes, key_scales, value_codes, value_scales = pages
        ops.copy_blocks(key_codes, value_codes, source, destination)
        ops.copy_blocks(key_scales, value_scales, source, destination)


class Int8Format(QuantizedFormat):
    """Whole numbers from -127 to 127: an error of at most 1/254 of the largest number of each token and head."""

    name = "int8"
    codes = torch.int8


class Float8Format(QuantizedFormat):
    """Floating-point numbers with three bits of mantissa: an error of at most 1/16 of each number that is stored."""

    name = "fp8_e4m3"
    codes = torch.float8_e4m3fn


# What `PagedConfig(kv_dtype=...)` may name; None names `NativeFormat`.
KV_FORMATS: dict[str, type[KVFormat]] = {each.name: each for each in (Int8Format, Float8Format)}


class KVDtypes(Protocol):
    """The part of a configuration that chooses formats: names in `KV_FORMATS`, or None for the model's own dtype."""

    @property
    def kv_dtype(self) -> str | None:
        """Of the layers with full attention."""

    @property
    def kv_dtype_window(self) -> str | None:
        """Of the layers with a sliding window."""


def make_kv_format(states_dtype: torch.dtype, window: int | None, dtypes: KVDtypes) -> KVFormat:
    """Make the format in which layers of this window keep states of this dtype: the one place that chooses it.

    Raises
    ------
    UnsupportedError
        If the format does not store them.
    """
    name = dtypes.kv_dtype if window is None else dtypes.kv_dtype_window
    return (NativeFormat if name is None else KV_FORMATS[name])(states_dtype)
