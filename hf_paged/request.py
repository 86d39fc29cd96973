"""Request: one row of a `generate` call on its way through the scheduler. No tensors here."""

from .block_table import BlockTable
from .pool import BlockPool


class Request:
    """A row: the tokens it has, how many of them are stored, and where.

    Owns the blocks of its tables while it runs; the scheduler takes and frees them.

    Parameters
    ----------
    tokens : list of int
        The prompt, without pads.
    pools : list of BlockPool
        One an attention group, in the scheduler's order.

    Attributes
    ----------
    tokens : list of int
        Prompt and sampled tokens.
    num_stored : int
        Tokens at the front whose keys and values lie in blocks.
    followers : list of Request
        Rows with the same prompt: they wait for this one's prefill and fork its tables.
    order : int
        Place in the queue, given once: first come, first served, preempted or not.
    """

    __slots__ = ("tokens", "num_stored", "tables", "followers", "order", "num_preemptions")

    def __init__(self, tokens: list[int], pools: list[BlockPool]):
        self.tokens = tokens
        self.num_stored = 0
        self.tables = [BlockTable(pool) for pool in pools]
        self.followers: list[Request] = []
        self.order = -1
        self.num_preemptions = 0

    @property
    def num_pending(self) -> int:
        """Tokens that the next forwards must run; 0 while the next token is being sampled."""
        return len(self.tokens) - self.num_stored

    def release(self) -> None:
        """Free all blocks; nothing is stored any more."""
        for table in self.tables:
            table.release()
        self.num_stored = 0
