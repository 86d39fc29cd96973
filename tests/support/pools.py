"""Every pool that a test makes: its unused slots hold NaN, and it is known until it dies."""

import weakref

import torch

from hf_paged.memory.kv_pool import KVCacheGroup, KVPool

pools: "weakref.WeakSet[KVPool]" = weakref.WeakSet()


def poison(dtype: torch.dtype) -> float:
    """A number that no token may be computed from: NaN, or the largest one of a dtype without NaN."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def poison_new_slots() -> None:
    """Fill slots with NaN whenever they are handed out, so that a read past the context shows."""
    group_init, layer, init = KVCacheGroup.__init__, KVCacheGroup.layer, KVPool.__init__

    def poisoned_init(self, *args):
        group_init(self, *args)
        allocate = self.blocks.allocate

        def poisoned_allocate(num_blocks):
            blocks = allocate(num_blocks)
            with torch.no_grad():
                for storage in self.layers.values():
                    for page in storage.pages:
                        page[torch.tensor(blocks, dtype=torch.long)] = poison(page.dtype)
            return blocks

        self.blocks.allocate = poisoned_allocate

    def poisoned_layer(self, index, key, value):
        is_new = index not in self.layers
        storage = layer(self, index, key, value)
        if is_new:
            for page in storage.pages:
                page[: self.blocks.high_water] = poison(page.dtype)
        return storage

    def tracked_init(self, config):
        init(self, config)
        pools.add(self)

    KVCacheGroup.__init__, KVCacheGroup.layer, KVPool.__init__ = poisoned_init, poisoned_layer, tracked_init
