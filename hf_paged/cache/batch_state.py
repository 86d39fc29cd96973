"""BatchState: the rows of one cache, shared by all its paged layers.

transformers' cache is a list of layers, each told on its own to append, crop or reorder. Their tokens lie
at the same slots, so the tables are kept here, once an attention group; the first layer to be told does
the work and its siblings find it done.
"""

import weakref
from collections.abc import Callable

import torch

from hf_paged.atomic import atomically
from hf_paged.cache.append_step import AppendStep
from hf_paged.cache.duplicate_rows import agree
from hf_paged.cache.group_rows import GroupRows
from hf_paged.cache.padding import Padding
from hf_paged.memory.block_table import BlockTable
from hf_paged.memory.kv_pool import KVCacheSpec, KVPool
from hf_paged.memory.reservation import keeping, of_this_thread


class BatchState:
    """Rows of one cache: their block tables, and which positions of the dense rectangle they store.

    Owns the blocks of its tables; they return to the pool when the last layer or handle lets go of it.
    Positions count as in the dense cache (pads included); tokens count what is stored.

    Parameters
    ----------
    born_in_forward : bool
        Whether a model's own forward made the cache. Nobody may ever read it again (a log-likelihood
        pass), so nothing is stored until somebody does.
    """

    def __init__(self, born_in_forward: bool = False):
        self.pool: KVPool | None = None
        self.num_layers = 0
        self.groups: dict[KVCacheSpec, GroupRows] = {}
        self.padding = Padding()
        self.twins: list[int] | None = None  # For each row the first row with the same input.
        self.batch_size: int | None = None
        self.epoch = 0  # Reorderings so far.
        self.deferred = born_in_forward
        self._held: dict[int, tuple[int | None, torch.Tensor, torch.Tensor]] = {}
        self._last_selection: list[int] | None = None
        self._last_batch_size: int | None = None
        self.read_layers: weakref.WeakSet = weakref.WeakSet()  # Layers that handed tensors out.
        self.record_past = False  # Keep blocks that left the window until the next crop.

    def __del__(self):
        for rows in self.__dict__.get("groups", {}).values():  # Its making may have been interrupted.
            for table in rows.owned:
                # A finalizer may run inside the pool's own methods, on any thread: queue, do not free.
                table.pool.give_back(table.blocks)

    def __deepcopy__(self, memo) -> "BatchState":
        """A second cache over the same blocks (the documented prompt-reuse idiom): copied on write."""
        twin = BatchState()
        memo[id(self)] = twin
        twin.num_layers, twin.epoch, twin.batch_size = self.num_layers, self.epoch, self.batch_size
        twin._last_selection, twin._last_batch_size = self._last_selection, self._last_batch_size
        twin.padding, twin.twins, twin.record_past = self.padding.copy(), self.twins, self.record_past
        twin.deferred = self.deferred
        # Cloned: either cache's keys may be edited in place.
        twin._held = {layer: (window, *map(torch.clone, states)) for layer, (window, *states) in self._held.items()}
        if self.pool is not None:
            self._settle(*self.groups.values())

            def fork() -> None:
                twin.bind(self.pool)
                for key, rows in self.groups.items():
                    twin.groups[key] = copy = GroupRows(rows.pool, 0)
                    copy.tables = [table.fork() for table in rows.tables]
                    copy.lengths = dict(rows.lengths)

            self._change(fork)
        return twin

    def bind(self, pool: KVPool) -> None:
        """Tie this cache to its model's pool, for life."""
        if self.pool is None:
            self.pool = pool
            self._change(lambda: pool.caches.add(self))

    def tables_in(self, key: KVCacheSpec) -> list[BlockTable]:
        return self.groups[key].owned if key in self.groups else []

    def _change(self, section: Callable[[], None]) -> None:
        """Run an atomic section that changes tables, under the pool's lock."""

        def locked():
            with self.pool.lock:
                section()

        atomically(locked)

    def _settle(self, *groups: GroupRows) -> None:
        """Let every block hold what its row has stored, before it is read, written or shared."""
        for rows in groups:
            if not rows.is_settled:
                with self.pool.lock, torch.no_grad():
                    rows.copy_shared()
                self._change(rows.let_go)

    def admits(self, positions: int) -> bool:
        """Whether a layer may begin with that many: cross-attention in a text's own cache counts others."""
        told = self.padding.valid
        lengths = {self._held[layer][1].shape[2] for layer in self._held}
        lengths = lengths.union(*(rows.lengths.values() for rows in self.groups.values())) - {0}
        return lengths <= {positions} and (told is None or told.shape[1] == positions)

    def hold(self, layer: int, window: int | None, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a layer's first states as they are; `store_held` stores them once somebody comes back."""
        self._held[layer] = (window, key, value)

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values that layer `layer` holds outside the pages, if it does."""
        return self._held[layer][1:] if layer in self._held else None

    def store_held(self) -> None:
        """Move what `hold` kept into pages: the cache is read again after all."""
        for layer in sorted(self._held):
            self.append(layer, *self._held[layer])
            del self._held[layer]
        self.deferred = False

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
            If the blocks do not fit in memory; nothing was stored.
        ValueError
            If the batch size is not that of the cache.
        """
        rows = self._rows(layer, window, key, value)
        start = rows.lengths.get(layer, 0)
        end = start + key.shape[2]
        if rows.step is None or (rows.step.start, rows.step.end) != (start, end):
            self._begin_step(rows, start, end)
        step = rows.step
        if step.twins is not None and not (agree(step.twins, key) and agree(step.twins, value)):
            self._part_twins(rows, step)
        self._settle(rows)
        with self.pool.lock, torch.no_grad():
            storage = rows.pool.layer(layer, key, value)
            storage.ensure(rows.pool.blocks.high_water)
            rows.step.write(storage, key, value)
            rows.lengths[layer] = end
        return rows, rows.step

    def _rows(self, layer, window, key, value) -> GroupRows:
        if self.batch_size != key.shape[0]:
            raise ValueError(
                f"the cache holds {self.batch_size} rows and got states for {key.shape[0]}: "
                "pass as many rows as before, or call cache.batch_repeat_interleave or batch_select_indices first"
            )
        group_key = KVCacheSpec(window, key.dtype, key.device)
        if group_key not in self.groups:
            with self.pool.lock:
                pool = self.pool.group(group_key, key, value, self.num_layers)
            self.groups[group_key] = GroupRows(pool, self.batch_size)
        return self.groups[group_key]

    def _begin_step(self, rows: GroupRows, start: int, end: int) -> None:
        """Make room for positions ``start .. end - 1`` in every row: all rows or none."""
        first, last = (self.padding.tokens_before(at, self.batch_size) for at in (start, end))
        valid = self.padding.valid_in(start, end)
        twins = self.twins if start == 0 and rows.length == 0 else None
        promised = of_this_thread()

        def begin() -> None:
            rows.version += 1
            if rows.window is not None:
                with keeping(rows.pool, promised):
                    self._slide(rows, first, last)
            stored = sorted(set(twins)) if twins else range(len(first))
            writes = {row: max(first[row], rows.tables[row].base) for row in stored}
            rows.make_room(writes, last, promised)
            for row, twin in enumerate(twins or ()):
                if twin != row:
                    rows.tables[row] = rows.tables[twin].fork()
            rows.step = AppendStep(
                list(rows.tables), start, end, first, last, writes, twins, valid, rows.pool.key.device
            )

        self._change(begin)

    def _part_twins(self, rows: GroupRows, step: AppendStep) -> None:
        """Rows with the same tokens turn out to differ in a layer: store each for itself.

        Layers that stored them once already are copied; handles on these stay good, their content is the same.
        """
        promised = of_this_thread()

        def part() -> None:
            writes = {row: max(first, rows.tables[row].base) for row, first in enumerate(step.first)}
            rows.make_room(writes, step.last, promised)
            rows.step = AppendStep(
                list(rows.tables), step.start, step.end, step.first, step.last, writes, None, step.valid, step.device
            )

        self._change(part)

    def _slide(self, rows: GroupRows, first: list[int], last: list[int]) -> None:
        """Free the blocks that left the window; skip prompt tokens that no later step can see.

        While the past is recorded both wait for the next crop.
        """
        reach = rows.window - 1
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

    def truncate(self, layer: int, window: int | None, removed: int) -> None:
        """Forget the last `removed` positions of one layer; blocks go with the last layer that forgets them."""
        rows, promised = self.group_rows(layer), of_this_thread()
        self._settle(rows)
        lengths = {**rows.lengths, layer: max(0, rows.lengths[layer] - removed)}
        # Its siblings may not have been told yet: keep what the longest and the shortest of them need.
        kept = self.padding.tokens_before(max(lengths.values()), self.batch_size)
        seen = self.padding.tokens_before(min(lengths.values()), self.batch_size)

        def truncate() -> None:
            rows.change()
            rows.lengths = lengths
            with keeping(rows.pool, promised):
                for table, last, first in zip(rows.tables, kept, seen):
                    if last < table.num_tokens:
                        table.truncate(last)
                    if window is not None:
                        table.evict_before(first - (window - 1))

        self._change(truncate)
        self.padding.truncate(max(group.length for group in self.groups.values()))

    def select(self, epoch: int, indices: torch.Tensor) -> None:
        """Make row ``i`` what row ``indices[i]`` is now. Tables are copied, tokens never.

        Every layer calls it with its own count of reorderings; the first does it.
        """
        # As an index of the batch dimension: a bool mask and negative numbers are good, too.
        rows = torch.arange(self.batch_size_at(epoch))[torch.as_tensor(indices, device="cpu")].tolist()
        if epoch <= self.epoch:
            assert epoch < self.epoch or rows == self._last_selection, "layers of one cache were reordered differently"
            return
        self._settle(*self.groups.values())
        promised = of_this_thread()

        def select() -> None:
            self.epoch, self._last_selection = epoch, rows
            self._last_batch_size, self.batch_size = self.batch_size, len(rows)
            self.twins = None  # Of the rows before; asked for once more if all positions are cropped.
            for group in self.groups.values():
                group.select(rows, promised)

        self._change(select)
        self.padding.select(rows)

    def batch_size_at(self, epoch: int) -> int:
        """Rows before reordering number `epoch`, the last or the next."""
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
        self._settle(rows)
        storage = rows.pool.layers[layer]
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
        self._held.pop(layer, None)

        def drop() -> None:
            for rows in self.groups.values():
                rows.lengths.pop(layer, None)
                if not rows.lengths:
                    rows.change()
                    rows.let_go()
                    for table in rows.tables:
                        table.release()
            if not any(rows.lengths for rows in self.groups.values()):
                self.groups.clear()

        if self.pool is not None:
            self._change(drop)
        if not self._held and not self.groups:
            self.padding, self.twins, self.batch_size = Padding(), None, None

    def length(self, layer: int) -> int:
        """Positions that layer `layer` has seen here; 0 if it has none."""
        if layer in self._held:
            return self._held[layer][1].shape[2]
        for rows in self.groups.values():
            if layer in rows.lengths:
                return rows.lengths[layer]
        return 0

    def group_rows(self, layer: int) -> GroupRows:
        """The rows of the attention group in which layer `layer` is stored."""
        return next(rows for rows in self.groups.values() if layer in rows.lengths)
