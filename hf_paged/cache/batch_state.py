"""The rows of one cache: `BatchState`, which all its paged layers share, and `GroupRows`, its part in one group.

transformers' cache is a list of layers, and each is told on its own to append, crop or reorder. Their tokens lie at
the same slots, so the block tables are kept here, once per KV cache group: the first layer to be told does the work,
and its siblings find it done.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hf_paged.atomic import atomically
from hf_paged.cache.append_step import AppendStep
from hf_paged.cache.duplicate_rows import have_equal_states
from hf_paged.cache.padding import Padding
from hf_paged.execution.attention_metadata import AttentionMetadata
from hf_paged.execution.home_stream import on_home_stream
from hf_paged.memory.block_table import BlockTable, make_writable
from hf_paged.memory.kv_pool import KVCacheGroup, KVCacheSpec, KVPool
from hf_paged.memory.reservation import Reservation, keeping, of_this_thread
from hf_paged.memory.sizing import WHOLE
from hf_paged.models import forward_context
from hf_paged.models.placement import share_of_layers


class DeferredStates(NamedTuple):
    """The first states of a layer, which are not in pages yet."""

    key: torch.Tensor  # [batch, num_kv_heads, positions, key_dim]
    value: torch.Tensor  # [batch, num_kv_heads, positions, value_dim]
    window: int | None


class GroupRows:
    """The rows of one cache in one KV cache group: a block table per row, and how far each layer has come.

    Blocks are taken and freed in atomic sections. The content of shared blocks is copied outside of these, before the
    rows are used again: see `copy_shared_blocks`.

    Attributes
    ----------
    group : KVCacheGroup
    tables : list of BlockTable
        One per row. They own the blocks.
    lengths : dict of int to int
        By layer, the positions that it has seen.
    step : AppendStep or None
        What the last append was; None if the rows have changed since.
    version : int
        Changes so far. A handle that was made at another version is stale.
    """

    def __init__(self, group: KVCacheGroup, batch_size: int):
        self.group = group
        self.tables = [BlockTable(group.blocks) for _ in range(batch_size)]
        self.lengths: dict[int, int] = {}
        self.step: AppendStep | None = None
        self.version = 0
        # How cross-attention reads these rows, and the state of the rows for which that holds.
        self.stored_metadata: tuple[tuple, AttentionMetadata] | None = None
        self._copies: list[tuple[int, int]] = []  # (source, destination) of shared blocks, not copied yet.
        self._copy_sources = BlockTable(group.blocks)

    @property
    def length(self) -> int:
        """Positions that the layer that has come furthest has seen."""
        return max([0, *self.lengths.values()])

    @property
    def window(self) -> int | None:
        return self.group.spec.window

    @property
    def owning_tables(self) -> list[BlockTable]:
        """Every table that owns blocks for these rows."""
        return [*self.tables, self._copy_sources]

    def make_writable(self, writes: dict[int, int], last: list[int], promised: Sequence[Reservation]) -> None:
        """Give rows private blocks for the tokens that they are about to store. Runs in an atomic section.

        Parameters
        ----------
        writes : dict of int to int
            By row, the first token that it stores. Other rows store none.
        last : list of int
            For each row, the token after the last that it stores.
        promised : sequence of Reservation
            Of the call that appends.

        Raises
        ------
        OutOfBlocksError
            If the blocks do not fit in memory; nothing is changed.
        """
        tables = [self.tables[row] for row in writes]
        ranges = [(token, last[row]) for row, token in writes.items()]
        copies = make_writable(tables, ranges, lambda count: self.group.allocate_or_grow(count, promised))
        self._copy_sources.blocks += [source for source, _ in copies]
        self._copies += copies

    @property
    def has_pending_copies(self) -> bool:
        """Tell whether some block does not hold yet what its row has stored."""
        return bool(self._copies)

    def copy_shared_blocks(self) -> None:
        """Copy the shared blocks that a row is about to write to. Runs outside a section, under the pool's lock."""
        self.group.copy_blocks(self._copies)

    def free_copy_sources(self) -> None:
        """Give back what `copy_shared_blocks` has copied. Runs in an atomic section."""
        self._copies = []
        self._copy_sources.release()

    def expire_handles(self) -> None:
        """Make every handle on these rows stale: the tables are about to change."""
        self.step = None
        self.version += 1

    def select_rows(self, rows: list[int], promised: Sequence[Reservation]) -> None:
        """Make row ``i`` what row ``rows[i]`` is now. Runs in an atomic section."""
        self.expire_handles()
        with keeping(self.group, promised):
            old, self.tables = self.tables, [self.tables[row].fork() for row in rows]
            for table in old:
                table.release()


class BatchState:
    """The rows of one cache: their block tables, and which positions of the dense rectangle they store.

    Owns the blocks of its tables; they return to the pool when the last layer or handle lets go of it.
    Positions count as in the dense cache (pads included); tokens count what is stored.

    Parameters
    ----------
    is_deferring : bool
        Keep the first states out of the pages until the cache is used again. A cache that a model's own forward made
        may never be (a log-likelihood pass reads the logits alone).

    Attributes
    ----------
    num_layers : int
        Paged layers of the cache.
    groups : dict of KVCacheSpec to GroupRows
    padding : Padding
    batch_size : int
        0 before the first states.
    duplicate_of : list of int or None
        For each row the first row with the same input; None if all rows differ.
    epoch : int
        Selections of rows so far.
    read_layers : WeakSet of PagedLayer
        Layers whose dense keys or values were read since they last changed.
    record_past : bool
        Keep blocks that left the window until the next crop.
    """

    def __init__(self, is_deferring: bool = False):
        self._pool: KVPool | None = None
        self.num_layers = 0
        self.groups: dict[KVCacheSpec, GroupRows] = {}
        self.padding = Padding()
        self.batch_size = 0
        self.duplicate_of: list[int] | None = None
        self.is_deferring = is_deferring
        self._deferred: dict[int, DeferredStates] = {}
        self.epoch = 0
        self._last_selection: list[int] | None = None
        self._last_batch_size = 0
        self.read_layers: weakref.WeakSet = weakref.WeakSet()
        self.record_past = False

    def __del__(self):
        for rows in self.__dict__.get("groups", {}).values():  # Its making may have been interrupted.
            for table in rows.owning_tables:
                # A finalizer may run inside the pool's own methods, on any thread: queue, do not free.
                table.pool.give_back(table.blocks)

    def __deepcopy__(self, memo) -> "BatchState":
        """A second cache over the same blocks (the documented prompt-reuse idiom): copied on write."""
        other = BatchState(self.is_deferring)
        memo[id(self)] = other
        other.num_layers, other.batch_size, other.record_past = self.num_layers, self.batch_size, self.record_past
        other.padding, other.duplicate_of = self.padding.copy(), self.duplicate_of
        other.epoch, other._last_selection = self.epoch, self._last_selection
        other._last_batch_size = self._last_batch_size
        for layer, states in self._deferred.items():
            # Cloned: either cache's keys may be edited in place.
            other._deferred[layer] = states._replace(key=states.key.clone(), value=states.value.clone())
        if self._pool is not None:
            pool = self._pool
            self._finish_copies(*self.groups.values())

            def fork() -> None:
                other.bind(pool)
                for key, rows in self.groups.items():
                    other.groups[key] = forked = GroupRows(rows.group, 0)
                    forked.tables = [table.fork() for table in rows.tables]
                    forked.lengths = dict(rows.lengths)

            self._change_tables(fork)
        return other

    @property
    def pool(self) -> KVPool:
        """The pool of the cache's model."""
        assert self._pool is not None, "a cache has no pool before its first states"
        return self._pool

    @property
    def is_bound(self) -> bool:
        """Tell whether the cache has a pool."""
        return self._pool is not None

    def bind(self, pool: KVPool) -> None:
        """Tie this cache to its model's pool, for life."""
        if self._pool is None:
            self._pool = pool
            self._change_tables(lambda: pool.caches.add(self))

    def tables_in(self, spec: KVCacheSpec) -> list[BlockTable]:
        """Every table that owns blocks of the KV cache group `spec`."""
        return self.groups[spec].owning_tables if spec in self.groups else []

    def _change_tables(self, change: Callable[[], None]) -> None:
        """Run `change` as an atomic section, under the pool's lock."""

        def locked() -> None:
            with self.pool.lock:
                change()

        atomically(locked)

    def _finish_copies(self, *groups: GroupRows) -> None:
        """Let every block hold what its row has stored, before it is read, written or shared."""
        for rows in groups:
            if rows.has_pending_copies:
                with on_home_stream(rows.group.spec.device), self.pool.lock, torch.no_grad():
                    rows.copy_shared_blocks()
                self._change_tables(rows.free_copy_sources)

    def admits(self, positions: int) -> bool:
        """Tell whether a layer may begin with this many positions: as many as its siblings have seen.

        Cross-attention that lives in the text's own cache begins with others.
        """
        told = self.padding.valid
        lengths = {states.key.shape[2] for states in self._deferred.values()}
        lengths = lengths.union(*(rows.lengths.values() for rows in self.groups.values())) - {0}
        return lengths <= {positions} and (told is None or told.shape[1] == positions)

    def defer(self, layer: int, states: DeferredStates) -> None:
        """Keep a layer's first states as they are, until `store_deferred`."""
        self._deferred[layer] = states

    def deferred_states(self, layer: int) -> DeferredStates | None:
        """The states that layer `layer` holds outside the pages; None if it holds none."""
        return self._deferred.get(layer)

    def store_deferred(self) -> None:
        """Move deferred states into pages, and defer no more: the cache is used again after all."""
        readers = [layer for layer in self.read_layers if layer.index in self._deferred]
        for layer in sorted(self._deferred):
            states = self._deferred[layer]
            self.append(layer, states.window, states.key, states.value)
            del self._deferred[layer]
        self.is_deferring = False
        for reader in readers:
            reader.forget_reads_before_rounding()

    def append(
        self,
        layer: int,
        window: int | None,
        key: torch.Tensor,  # [batch, num_kv_heads, positions, key_dim]
        value: torch.Tensor,  # [batch, num_kv_heads, positions, value_dim]
    ) -> tuple[GroupRows, AppendStep]:
        """Store the new states of one layer; pads are left out, rows with the same input are stored once.

        Raises
        ------
        OutOfBlocksError
            If the blocks do not fit in memory, or the pool does not; nothing was stored.
        ValueError
            If the batch size is not that of the cache.
        """
        rows = self._rows(layer, window, key, value)
        start = rows.lengths.get(layer, 0)
        end = start + key.shape[2]
        step = rows.step
        if step is None or (step.start, step.end) != (start, end):
            step = self._begin_step(rows, start, end)
        duplicate_of = step.duplicate_of
        if duplicate_of is not None and not all(have_equal_states(duplicate_of, states) for states in (key, value)):
            step = self._separate_duplicates(rows, step)
        self._finish_copies(rows)
        with on_home_stream(key.device), self.pool.lock, torch.no_grad():
            storage = rows.group.layer(layer, key, value)
            step.write(storage, key, value)
            rows.lengths[layer] = end
        return rows, step

    def _rows(self, layer: int, window: int | None, key: torch.Tensor, value: torch.Tensor) -> GroupRows:
        if self.batch_size != key.shape[0]:
            raise ValueError(
                f"the cache holds {self.batch_size} rows and got states for {key.shape[0]}: "
                "pass as many rows as before, or call cache.batch_repeat_interleave or batch_select_indices first"
            )
        spec = KVCacheSpec(window, key.dtype, key.device)
        if spec not in self.groups:
            call = forward_context.current_forward()
            share = WHOLE if spec in self.pool.groups or call is None else share_of_layers(call.model, spec.device)
            with self.pool.lock:
                group = self.pool.group(spec, key, value, self.num_layers, share)
            self.groups[spec] = GroupRows(group, self.batch_size)
        return self.groups[spec]

    def _begin_step(self, rows: GroupRows, start: int, end: int) -> AppendStep:
        """Make room for positions ``start .. end - 1`` in every row: all rows or none."""
        first, last = (self.padding.tokens_before(at, self.batch_size) for at in (start, end))
        valid = self.padding.valid_in(start, end)
        duplicate_of = self.duplicate_of if start == 0 and rows.length == 0 else None
        promised = of_this_thread()

        def begin() -> None:
            rows.version += 1
            if rows.window is not None:
                with keeping(rows.group, promised):
                    self._slide(rows, rows.window, first, last)
            stored = sorted(set(duplicate_of)) if duplicate_of else range(len(first))
            writes = {row: max(first[row], rows.tables[row].base) for row in stored}
            rows.make_writable(writes, last, promised)
            for row, original in enumerate(duplicate_of or ()):
                if original != row:
                    rows.tables[row] = rows.tables[original].fork()
            tables, device = list(rows.tables), rows.group.spec.device
            rows.step = AppendStep(tables, start, end, first, last, writes, duplicate_of, valid, device)

        self._change_tables(begin)
        assert rows.step is not None, "the section above has set it"
        return rows.step

    def _separate_duplicates(self, rows: GroupRows, step: AppendStep) -> AppendStep:
        """Store each row for itself: rows with the same tokens turn out to differ in a layer.

        Layers that stored them once already are copied; handles on these stay good, their content is the same.
        """
        promised = of_this_thread()

        def separate() -> None:
            writes = {row: max(first, rows.tables[row].base) for row, first in enumerate(step.first)}
            rows.make_writable(writes, step.last, promised)
            rows.step = dataclasses.replace(step, tables=list(rows.tables), writes=writes, duplicate_of=None)

        self._change_tables(separate)
        assert rows.step is not None, "the section above has set it"
        return rows.step

    def _slide(self, rows: GroupRows, window: int, first: list[int], last: list[int]) -> None:
        """Free the blocks that left the window; skip prompt tokens that no later step can see.

        While the past is recorded both wait for the next crop.
        """
        reach = window - 1
        for table, seen, total in zip(rows.tables, first, last):
            if table.base > max(0, seen - reach):
                raise RuntimeError(
                    "the cache was cropped by more than it had recorded: tokens inside the sliding window are gone. "
                    "Crop at most what was appended since the last crop, after cache.activate_past_recording()"
                )
            if self.record_past:
                continue
            if rows.length > 0:
                table.evict_before(seen - reach)
            else:
                table.start_at(max(0, total - reach))

    def truncate(self, layer: int, removed: int) -> None:
        """Forget the last `removed` positions of one layer; blocks go with the last layer that forgets them."""
        rows, promised = self.group_rows(layer), of_this_thread()
        self._finish_copies(rows)
        lengths = {**rows.lengths, layer: max(0, rows.lengths[layer] - removed)}
        # Its siblings may not have been told yet: keep what the longest and the shortest of them need.
        kept = self.padding.tokens_before(max(lengths.values()), self.batch_size)
        seen = self.padding.tokens_before(min(lengths.values()), self.batch_size)

        def truncate() -> None:
            rows.expire_handles()
            rows.lengths = lengths
            with keeping(rows.group, promised):
                for table, last, first in zip(rows.tables, kept, seen):
                    if last < table.num_tokens:
                        table.truncate(last)
                    if rows.window is not None:
                        table.evict_before(first - (rows.window - 1))

        self._change_tables(truncate)
        self.padding.truncate(max(group_rows.length for group_rows in self.groups.values()))

    def select_rows(self, epoch: int, indices: torch.Tensor) -> None:
        """Make row ``i`` what row ``indices[i]`` is now. Tables are copied, tokens never.

        Parameters
        ----------
        epoch : int
            The caller's own count of selections, this one included. Every layer calls; the first does the work.
        indices : torch.Tensor
            ``[rows]``, an index of the batch dimension: a bool mask and negative numbers are good, too.
        """
        rows = torch.arange(self.batch_size_at(epoch))[torch.as_tensor(indices, device="cpu")].tolist()
        if epoch <= self.epoch:
            assert epoch < self.epoch or rows == self._last_selection, "layers of one cache were reordered differently"
            return
        self._finish_copies(*self.groups.values())
        promised = of_this_thread()

        def select() -> None:
            self.epoch, self._last_selection = epoch, rows
            self._last_batch_size, self.batch_size = self.batch_size, len(rows)
            self.duplicate_of = None  # Of the rows before; asked for once more if all positions are cropped.
            for group_rows in self.groups.values():
                group_rows.select_rows(rows, promised)

        self._change_tables(select)
        self.padding.select_rows(rows)

    def batch_size_at(self, epoch: int) -> int:
        """Rows before selection number `epoch`, the last or the next."""
        return self.batch_size if epoch > self.epoch else self._last_batch_size

    def gather(self, layer: int, is_key: bool, start: int, end: int) -> torch.Tensor:
        """Copy positions ``start .. end - 1`` of one layer out of the pages; padding is zeros.

        Returns
        -------
        torch.Tensor
            ``[batch, num_kv_heads, end - start, head_dim]``

        Raises
        ------
        RuntimeError
            If some of these positions left the window.
        """
        rows = self.group_rows(layer)
        self._finish_copies(rows)
        with on_home_stream(rows.group.spec.device) as lend:
            return lend(self._gather(rows, layer, is_key, start, end))

    def _gather(self, rows: GroupRows, layer: int, is_key: bool, start: int, end: int) -> torch.Tensor:
        storage = rows.group.layers[layer]
        dense = storage.new_states(is_key, self.batch_size, end - start)
        first, last = (self.padding.tokens_before(at, self.batch_size) for at in (start, end))
        valid = self.padding.valid_in(start, end)
        for row, table in enumerate(rows.tables):
            if first[row] == last[row]:
                continue
            if first[row] < table.base:
                raise RuntimeError("positions that left the sliding window are read: they are not stored any more")
            size = table.pool.block_size
            blocks = table.blocks[(first[row] - table.base) // size : -(-(last[row] - table.base) // size)]
            index = torch.tensor(blocks, dtype=torch.long, device=storage.device)
            tokens = storage.gather(is_key, index).transpose(0, 1).flatten(1, 2)  # [num_kv_heads, tokens, head_dim]
            tokens = tokens[:, first[row] % size :][:, : last[row] - first[row]]
            if valid is None:
                dense[row] = tokens
            else:
                dense[row][:, valid[row].to(storage.device)] = tokens
        return dense

    def drop_layer(self, layer: int) -> None:
        """Forget all that one layer stored."""
        self._deferred.pop(layer, None)

        def drop() -> None:
            for rows in self.groups.values():
                rows.lengths.pop(layer, None)
                if not rows.lengths:
                    rows.expire_handles()
                    rows.free_copy_sources()
                    for table in rows.tables:
                        table.release()
            if not any(rows.lengths for rows in self.groups.values()):
                self.groups.clear()

        if self.is_bound:
            self._change_tables(drop)
        if not self._deferred and not self.groups:
            self.padding, self.duplicate_of, self.batch_size = Padding(), None, 0

    def length(self, layer: int) -> int:
        """Positions that layer `layer` has seen here; 0 if it has none."""
        if layer in self._deferred:
            return self._deferred[layer].key.shape[2]
        for rows in self.groups.values():
            if layer in rows.lengths:
                return rows.lengths[layer]
        return 0

    def group_rows(self, layer: int) -> GroupRows:
        """The rows of the KV cache group in which layer `layer` is stored."""
        return next(rows for rows in self.groups.values() if layer in rows.lengths)
