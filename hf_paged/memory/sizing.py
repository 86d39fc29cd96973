"""Sizing: the bytes that a pool may take on a device, the blocks of a row in it, and the tokens of a step on it."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from transformers.utils import logging

from hf_paged.compat.devices import own_memory
from hf_paged.config import PagedConfig, parse_bytes
from hf_paged.memory.limits import memory_limits

logger = logging.get_logger(__name__)

# Of the memory that is available when a pool is made without a memory_budget. The host's is for all programs. What a
# device keeps is for activations and logits, which are not measured beforehand, and for the user's own work on it.
HOST_SHARE, DEVICE_SHARE = 0.25, 0.75
WHOLE = Fraction(1)
# Tokens of a step without a token_budget. A GPU must compute for longer than Python takes to launch the step, about
# 10 ms: a model of a billion parameters would be as long over 2,000 tokens, at the rates that are reported for an H100.
# Twice that would hold rows that decode up for about 0.1 s in a model of 8 billion. No GPU has measured it.
DEFAULT_TOKENS_CPU, DEFAULT_TOKENS_GPU = 512, 4096
# On the CPU, what a process takes beside blocks and tensors: code that the first step brings into memory, scratch of
# the matrix libraries, rows and their tokens in Python. Measured: 10 to 20 MiB.
PROCESS_BYTES = 20 * 2**20
# A budget up to this is one for blocks alone: the process itself varies by as much as its few per cent.
SMALL_BUDGET = 32 * 2**20
# The shares of a budget that the tokens of a step may take beside the blocks, where token_budget is not stated, and
# the rows that are sampled; and what a step has of each at least.
_TOKENS_SHARE, _ROWS_SHARE = 1 / 16, 1 / 8
_LEAST_TOKENS, _LEAST_ROWS = 32, 8
# malloc keeps memory between tensors that come and go: measured, up to a half of what lives at once.
_SLACK = 1.5
# Tables, hashes and tokens of a full block, in Python.
_BOOKKEEPING = 1024


@dataclass(frozen=True)
class Workspace:
    """The memory that a packed step takes beside the blocks, in bytes.

    Attributes
    ----------
    token_bytes : int
        For each token that runs.
    row_bytes : int
        For each row that is sampled: its logits, as the model makes them.
    vocab_size : int
    fixed_bytes : int
        Of any step.
    """

    token_bytes: int
    row_bytes: int
    vocab_size: int
    fixed_bytes: int = 0

    def of_tokens(self, num_tokens: int) -> int:
        return int(_SLACK * (self.fixed_bytes + num_tokens * self.token_bytes))

    def of_rows(self, num_rows: int) -> int:
        """With what sampling computes of their logits: scores, probabilities, noise, their quotient."""
        return num_rows * (self.row_bytes + 4 * torch.float32.itemsize * self.vocab_size)

    def of_step(self, limits: "StepLimits") -> int:
        """Of the largest step."""
        return self.of_tokens(limits.tokens) + self.of_rows(min(limits.rows, limits.tokens))


@dataclass(frozen=True)
class StepLimits:
    """How large a packed step may be.

    Attributes
    ----------
    tokens : int
    rows : int
        Of which it runs tokens.
    """

    tokens: int
    rows: int


def is_taken_at_once(device: torch.device) -> bool:
    """Tell whether a pool takes its whole budget on `device` when it is made.

    On the CPU it reserves address space, and memory comes with the first write.
    """
    return device.type != "cpu"


def default_share(device: torch.device) -> float:
    """The share of the available memory that is the budget of a pool without a memory_budget."""
    return HOST_SHARE if own_memory(device) is None else DEVICE_SHARE


def budget_bytes(config: PagedConfig, device: torch.device, share: Fraction = WHOLE) -> int:
    """The budget of a pool that is made now on `device`, in bytes.

    Parameters
    ----------
    share : Fraction
        Of the model's layers, those on that device. They have as much of a memory_budget.
    """
    stated = parse_bytes(config.memory_budget)
    if stated is None:
        return int(available_memory(device) * default_share(device))
    return allowed_budget(int(stated * share), device)


def allowed_budget(stated: int, device: torch.device) -> int:
    """A budget in bytes, lowered to what can ever be held on `device`, with a warning."""
    memory = own_memory(device)
    if memory is not None:
        name, most = f"the memory of {device}", memory[1]
    else:
        limits = ((limit.left if limit.counts_addresses else limit.total, limit.name) for limit in memory_limits())
        most, name = min(limits)
    if stated > most:
        logger.warning_once(
            f"hf_paged: memory_budget is larger than {name}, {most:,} bytes: these are the budget. "
            "Lower memory_budget, or leave it out for the default."
        )
    return min(stated, most)


def available_memory(device: torch.device) -> int:
    """Bytes that a new allocation on `device` could get now."""
    memory = own_memory(device)
    return min(limit.left for limit in memory_limits()) if memory is None else memory[0]


def physical_memory(device: torch.device) -> int:
    """Bytes that a pool may reserve on `device`: its memory, as far as this process may have it.

    Reserving takes address space alone. Where that is limited, half of what is left stays for everything else.
    """
    memory = own_memory(device)
    if memory is not None:
        return memory[1]
    return min(limit.left // 2 if limit.counts_addresses else limit.total for limit in memory_limits())


def step_tokens(config: PagedConfig, device: torch.device) -> int:
    """The tokens that one packed step may run on `device`."""
    if config.token_budget is not None:
        return config.token_budget
    return DEFAULT_TOKENS_CPU if device.type == "cpu" else DEFAULT_TOKENS_GPU


def step_limits(token_budget: int | None, budget: int, workspace: Workspace) -> StepLimits:
    """The limits of a step on the CPU, in a process that has `budget` bytes for blocks and steps together."""
    tokens = token_budget or DEFAULT_TOKENS_CPU
    if budget <= SMALL_BUDGET:
        return StepLimits(tokens, tokens)
    if token_budget is None:
        room = budget * _TOKENS_SHARE - workspace.of_tokens(0)
        fitting = int(room / max(1, workspace.of_tokens(1) - workspace.of_tokens(0)))
        tokens = min(tokens, max(_LEAST_TOKENS, fitting))
    rows = int(budget * _ROWS_SHARE / max(1, workspace.of_rows(1)))
    return StepLimits(tokens, min(tokens, max(_LEAST_ROWS, rows)))


def missing_beside_steps(budget: int, workspace: Workspace, limits: StepLimits) -> int:
    """Bytes that `budget` lacks on the CPU for steps up to `limits`: blocks get `SMALL_BUDGET` in any case."""
    if budget <= SMALL_BUDGET:
        return 0
    return max(0, SMALL_BUDGET + PROCESS_BYTES + workspace.of_step(limits) - budget)


def blocks_beside_steps(budget: int, bytes_per_block: int, workspace: Workspace, limits: StepLimits) -> int:
    """The blocks that `budget` bytes hold on the CPU, beside steps up to `limits`."""
    if budget <= SMALL_BUDGET:
        return max(1, budget // bytes_per_block)
    left = max(SMALL_BUDGET, budget - PROCESS_BYTES - workspace.of_step(limits))
    return max(1, left // (bytes_per_block + _BOOKKEEPING))


def row_blocks(tokens: int, block_size: int, window: int | None, chunk: int = 1) -> int:
    """The most blocks that a row owns at once in one KV cache group while it grows to `tokens` tokens.

    Parameters
    ----------
    tokens : int
        Tokens of the row at its end, prompt and generated.
    block_size : int
        Tokens a block holds.
    window : int or None
        The sliding window: a token sees the last `window` tokens, itself included. None: all of them.
    chunk : int
        Tokens that one forward runs at most. The first of them sees ``window - 1`` tokens before it, so these must
        be there as well. Chunks may begin anywhere, and end at `tokens` at the latest.

    Returns
    -------
    int
        Reached by some division into chunks; no division needs more.
    """
    if window is not None:
        # What a chunk needs begins at the last slot of a block at worst.
        tokens = min(tokens, block_size - 1 + window - 1 + chunk)
    return -(-tokens // block_size)
