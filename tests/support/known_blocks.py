"""The plain model of a prefix cache: a dictionary per group, from what a block holds to the block."""


class KnownBlocks:
    """The full blocks that could be found again: those that were stored and not handed out since.

    No token may be in two prompts unless all before it is, too: so a block's last token says what the block is a
    function of, together with the salt.

    Parameters
    ----------
    groups : list of FakeGroup
        Their pools tell what they hand out.
    """

    def __init__(self, groups):
        self.groups, self.size = groups, groups[0].blocks.block_size
        self.blocks: list[dict[tuple, int]] = [{} for _ in groups]  # (salt, a block's last token) -> block
        for group, known in zip(groups, self.blocks):
            group.blocks.on_hand_out = lambda blocks, known=known: self._forget(known, blocks)

    @staticmethod
    def _forget(known, blocks):
        for key in [key for key, block in known.items() if block in blocks]:
            del known[key]

    def clear(self):
        for known in self.blocks:
            known.clear()

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

    def longest(self, request, tokens):
        """Blocks of a row that every group has, as far as its window sees; the last token is always run."""
        keys, best = self.keys(request, tokens, 0, len(tokens) - 1), 0
        for count in range(1, len(keys) + 1):
            seen = [0 if g.window is None else max(0, count * self.size - g.window + 1) for g in self.groups]
            if all(key in known for known, at in zip(self.blocks, seen) for key in keys[at // self.size : count]):
                best = count
        return best
