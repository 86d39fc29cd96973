"""Request: one row of a `generate` call on its way through the scheduler. No tensors here."""

import enum

from hf_paged.memory.block_pool import BlockPool
from hf_paged.memory.block_table import BlockTable


class RequestState(enum.Enum):
    """Where a row is on its way."""

    NEW = enum.auto()  # In no queue: not added, or a duplicate whose prompt is not stored yet.
    WAITING = enum.auto()  # Has no blocks.
    RUNNING = enum.auto()
    OUT = enum.auto()  # Finished, failed or taken out, for good.


class Request:
    """A row: the tokens it has, how many of them are stored, and where.

    Owns the blocks of its tables while it runs; the scheduler takes and frees them.

    Parameters
    ----------
    tokens : list of int
        The prompt, without pads.
    pools : list of BlockPool
        One per KV cache group, in the scheduler's order.

    Attributes
    ----------
    tokens : list of int
        Prompt and sampled tokens, as far as they are known.
    runs_ahead : bool
        The token after `tokens` is chosen, but known to the device only. The row runs with it all the same; if it
        turns out to be the row's end, what was stored of it counts as never stored.
    num_prompt_tokens : int
    num_stored : int
        Tokens at the front whose keys and values lie in blocks.
    num_sampled : int
        `num_tokens` when a next one was last sampled from its logits.
    state : RequestState
    tables : list of BlockTable
        One per pool.
    duplicates : list of Request
        Rows with the same prompt: they wait for this one's prefill and fork its tables. If this one is taken
        out before, so are they.
    salt : str or None
        Separates the prefix cache of the row's owner from others'. None: its blocks depend on more than its tokens,
        so they are neither looked up nor stored there.
    block_hashes : list of bytes
        What the prefix cache has hashed of `tokens` so far: the root of its salt, then one per full block.
    order : int
        Place in the queue, given once: first come, first served, preempted or not.
    num_preemptions : int
    """

    __slots__ = (
        "block_hashes",
        "duplicates",
        "num_preemptions",
        "num_prompt_tokens",
        "num_sampled",
        "num_stored",
        "order",
        "runs_ahead",
        "salt",
        "state",
        "tables",
        "tokens",
    )

    def __init__(self, tokens: list[int], pools: list[BlockPool]):
        self.tokens = tokens
        self.runs_ahead = False
        self.num_prompt_tokens = len(tokens)
        self.num_stored = self.num_sampled = 0
        self.state = RequestState.NEW
        self.tables = [BlockTable(pool) for pool in pools]
        self.duplicates: list[Request] = []
        self.salt: str | None = None
        self.block_hashes: list[bytes] = []
        self.order = -1
        self.num_preemptions = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the row has, with the one that only the device knows."""
        return len(self.tokens) + self.runs_ahead

    @property
    def num_pending(self) -> int:
        """Tokens that the next forwards must run."""
        return self.num_tokens - self.num_stored

    @property
    def is_sampling(self) -> bool:
        """Tell whether the next token is being sampled: until it is there the row runs nothing."""
        return self.num_sampled == self.num_tokens

    def add_token(self, token: int) -> None:
        """Note the token that was sampled, whether the row has run ahead of it or has waited."""
        self.tokens.append(token)
        self.runs_ahead = False

    def release(self) -> None:
        """Free all blocks; nothing is stored any more. A row that ran ahead waits for its token from now on."""
        for table in self.tables:
            table.release()
        self.num_stored = 0
        self.runs_ahead = False
