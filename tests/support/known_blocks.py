"""The plain model of a prefix cache: a dictionary per group, from what a block holds to the block, and to its copy."""


class KnownBlocks:
    """The full blocks that could be found again: those that were stored and not handed out since.

    No token may be in two prompts unless all before it is, too: so a block's last token says what the block is a
    function of, together with the salt.

    Parameters
    ----------
    groups : list of FakeGroup
        Their pools tell what they hand out.
    tier : SwapTier or None
        As its pools.
    """

    def __init__(self, groups, tier=None):
        self.groups, self.size, self.tier = groups, groups[0].blocks.block_size, tier
        self.blocks: list[dict[tuple, int]] = [{} for _ in groups]  # (salt, a block's last token) -> block
        self.swapped: list[dict[tuple, int]] = [{} for _ in groups]  # The same -> swap block.
        self.evicted: list[dict[int, tuple]] = [{} for _ in groups]  # Block -> what it held when it was handed out.
        for number, group in enumerate(groups):
            group.blocks.on_hand_out = lambda blocks, number=number: self._evict(number, blocks)
            if tier is not None:
                pool = tier.pools[number]
                pool.allocate = self._watched(pool.allocate, self.swapped[number])

    def _watched(self, allocate, known):
        def watched(count):
            blocks = allocate(count)
            self._forget(known, blocks)
            return blocks

        return watched

    def _evict(self, number, blocks):
        known = self.blocks[number]
        self.evicted[number].update({block: key for key, block in known.items() if block in blocks})
        self._forget(known, blocks)

    @staticmethod
    def _forget(known, blocks):
        for key in [key for key, block in known.items() if block in blocks]:
            del known[key]

    def clear(self):
        for known in (*self.blocks, *self.swapped, *self.evicted):
            known.clear()

    def moved(self, step):
        """The content of the blocks that a step moves: for each group, of those that it spills and that it restores."""
        held = [{block: key for key, block in known.items()} for known in self.swapped]
        return [
            (
                {swap_block: self.evicted[number][block] for block, swap_block in spills},
                {block: held[number][swap_block] for swap_block, block in restores},
            )
            for number, (spills, restores) in enumerate(zip(step.spills, step.restores))
        ]

    def learn_moved(self, moved, owned):
        """A step has moved blocks, of which rows still own some."""
        for (spilled, restored), known, swapped, blocks in zip(moved, self.blocks, self.swapped, owned):
            for swap_block, key in spilled.items():
                swapped.setdefault(key, swap_block)
            for block, key in restored.items():
                if block in blocks:
                    known.setdefault(key, block)

    def learn(self, request, tokens, start, end):
        """Tokens ``start .. end - 1`` of a row with these `tokens` were stored."""
        for key, last in zip(self.keys(request, tokens, start, end), self._ends(start, end)):
            for table, known in zip(request.tables, self.blocks):
                if (place := (last - self.size - table.base) // self.size) >= 0:
                    known.setdefault(key, table.blocks[place])

    def keys(self, request, tokens, start, end):
        """The keys of the blocks that tokens ``start .. end - 1`` complete; none for rows that are never cached."""
        return [] if request.salt is None else [(request.salt, tokens[last - 1]) for last in self._ends(start, end)]

    def _ends(self, start, end):
        return range(start // self.size * self.size + self.size, end + 1, self.size)

    def has_prefix(self, request, tokens):
        """Tell whether the row's blocks are there that rows see which go on after them, or end with the last."""
        keys, before = self.keys(request, tokens, 0, len(tokens)), len(tokens) - self.size
        seen = [0 if g.window is None else max(0, before - g.window + 1) for g in self.groups]
        return all(key in known for known, at in zip(self.blocks, seen) for key in keys[at // self.size :])

    def longest(self, request, tokens, with_swapped=True):
        """Blocks of a row that every group has, as far as its window sees; the last token is always run."""
        with_swapped = with_swapped and self.tier is not None and self.tier.costs.restoring_pays
        found = [{*known, *(swapped if with_swapped else ())} for known, swapped in zip(self.blocks, self.swapped)]
        keys, best = self.keys(request, tokens, 0, len(tokens) - 1), 0
        for count in range(1, len(keys) + 1):
            seen = [0 if g.window is None else max(0, count * self.size - g.window + 1) for g in self.groups]
            if all(key in known for known, at in zip(found, seen) for key in keys[at // self.size : count]):
                best = count
        return best
