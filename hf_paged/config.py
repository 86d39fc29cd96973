"""The one configuration object, how the environment sets its defaults, and how a memory budget is read."""

import os
import re
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from hf_paged.errors import PagedError
from hf_paged.memory.eviction import EVICTION_POLICIES
from hf_paged.memory.kv_format import KV_FORMATS
from hf_paged_kernels.switches import is_on

# The variables that `PagedConfig.from_environment` reads, by field.
VARIABLES = {
    "block_size": "HF_PAGED_BLOCK_SIZE",
    "memory_budget": "HF_PAGED_MEMORY_BUDGET",
    "token_budget": "HF_PAGED_TOKEN_BUDGET",
    "prefix_cache": "HF_PAGED_PREFIX_CACHE",
    "prefix_cache_share": "HF_PAGED_PREFIX_CACHE_SHARE",
    "prepack_weights": "HF_PAGED_PREPACK",
    "cache_salt": "HF_PAGED_CACHE_SALT",
    "eviction_policy": "HF_PAGED_EVICTION_POLICY",
    "capture": "HF_PAGED_CAPTURE",
    "kv_dtype": "HF_PAGED_KV_DTYPE",
    "kv_dtype_window": "HF_PAGED_KV_DTYPE_WINDOW",
    "swap_space": "HF_PAGED_SWAP_SPACE",
}

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LARGEST_BLOCK = 2**16
# What `PagedConfig(capture=...)` may name.
CAPTURES = ("auto", "off", "ops", "compile")


@dataclass(frozen=True)
class PagedConfig:
    """How a model's KV cache is paged. Immutable; validated when it is made.

    A model that `hf_paged.configure` was not called for is paged as `from_environment` says. A config that is made in
    code takes nothing from the environment: the fields that it leaves out have the defaults below.

    Parameters
    ----------
    block_size : int
        Tokens a block holds: a power of two, at least 4 and at most 65,536. Small blocks waste less and share more,
        large ones are read faster.
    memory_budget : int, str or None
        Bytes that generation may take above the loaded model ("512MiB", "2GB" and plain byte counts are
        understood): on the CPU blocks and steps together, on a GPU blocks. ``None``: a share of the memory that this
        process can still get on the device when the pool is made. On the CPU a quarter, by the machine, its control
        groups (a container's limit) and its resource limits; a budget larger than these allow is lowered to what they
        do, with a warning. Memory is touched block by block as tokens arrive there, so an unused budget costs nothing.
        On a GPU three quarters; the pool takes its budget at once, and keeps to it.
    token_budget : int or None
        Tokens that one packed step of `generate` runs, prompts and new tokens of all rows together. Larger
        steps use the processor better and hold up rows that are further on for longer. ``None``: 512 on CPUs, 4,096
        on GPUs.
    prefix_cache : bool
        Let packed rows find again what earlier rows stored for the same first tokens. Blocks of finished rows
        then stay cached until other rows need them, or the model's weights change.
    prefix_cache_share : float
        The share of the budget, from 0 to 1, that the blocks of finished rows may take. Beyond it they make room for
        new tokens, by `eviction_policy`, before memory is taken that was never used. Raise it where more than that
        is read again: an eighth by default, as prompts that share nothing would fill the budget otherwise.
    prepack_weights : bool
        Let packed steps use a second copy of the linear layers' weights, laid out for the processor's matrix
        kernels: faster, and the weights take their memory twice. On CPUs only. Edit no weight through ``.data`` then.
        Layers whose ``forward`` was replaced, and steps that ``torch.compile`` traces, keep to the weights.
    cache_salt : str
        Hashed into every block that is found again; see `hf_paged.cache_salt` for one per tenant.
    eviction_policy : str
        Which cached block makes room first, by its name in `hf_paged.memory.eviction.EVICTION_POLICIES`. "lru": the
        one that was freed longest ago.
    capture : str
        Which decode steps are captured at their second use, and replayed without the model's Python code. "auto": those
        on CUDA, as CUDA graphs. "ops": those on every device, as lists of operators. "compile": those on every device,
        compiled by ``torch.compile``, and on CUDA as CUDA graphs of that; tokens may differ from dense by rounding.
        "off": none.
    kv_dtype : str or None
        How keys and values lie in pages, by its name in `hf_paged.memory.kv_format.KV_FORMATS`. "int8" and "fp8_e4m3":
        as codes of eight bits with a scale for each token and head, in about half the bytes of bfloat16; tokens may
        differ from dense. ``None``: in the model's dtype.
    kv_dtype_window : str or None
        The same for layers with a sliding window, which `kv_dtype` leaves alone: they keep a few tokens only, so
        there is little to save. ``None``: in the model's dtype.
    swap_space : int, str or None
        Bytes to which blocks may be moved that make room in the pool, as for `memory_budget`; a row that needs them
        again brings them back where that was measured to be sooner than computing them. On the CPU a temporary file,
        on a GPU the host's memory. Blocks are found there by the hashes of the prefix cache. ``None``: none.

    Examples
    --------
    >>> PagedConfig(block_size=16, memory_budget="1GiB").memory_budget
    '1GiB'
    """

    block_size: int = 16
    memory_budget: int | str | None = None
    token_budget: int | None = None
    prefix_cache: bool = True
    prefix_cache_share: float = 0.125
    prepack_weights: bool = False
    cache_salt: str = ""
    eviction_policy: str = "lru"
    capture: str = "auto"
    kv_dtype: str | None = None
    kv_dtype_window: str | None = None
    swap_space: int | str | None = None

    def __post_init__(self):
        size = self.block_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 4 or size & (size - 1):
            raise ValueError(f"block_size must be a power of two, at least 4; got {size!r}: try 16, 32 or 64")
        if size > _LARGEST_BLOCK:
            raise ValueError(f"block_size must be at most {_LARGEST_BLOCK}; got {size!r}: try 16, 32 or 64")
        parse_bytes(self.memory_budget)
        tokens = self.token_budget
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
            raise ValueError(f"token_budget must be a positive number of tokens; got {tokens!r}: try 512")
        for switch in ("prefix_cache", "prepack_weights"):
            if not isinstance(getattr(self, switch), bool):
                raise ValueError(f"{switch} must be True or False; got {getattr(self, switch)!r}")
        share = self.prefix_cache_share
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
            raise ValueError(f"prefix_cache_share must be a number from 0 to 1; got {share!r}: try 0.125")
        if not isinstance(self.cache_salt, str):
            raise ValueError(f"cache_salt must be a text; got {self.cache_salt!r}: try str(...) of it")
        policy = self.eviction_policy
        if not isinstance(policy, str) or policy not in EVICTION_POLICIES:
            names = ", ".join(map(repr, EVICTION_POLICIES))
            raise ValueError(f"eviction_policy must be one of {names}; got {policy!r}: leave it out for 'lru'")
        if self.capture not in CAPTURES:
            names = ", ".join(map(repr, CAPTURES))
            raise ValueError(f"capture must be one of {names}; got {self.capture!r}: leave it out for 'auto'")
        for dtype in ("kv_dtype", "kv_dtype_window"):
            name = getattr(self, dtype)
            if name is not None and (not isinstance(name, str) or name not in KV_FORMATS):
                names = ", ".join(map(repr, KV_FORMATS))
                raise ValueError(
                    f"{dtype} must be one of {names}; got {name!r}: leave it out for the model's own dtype"
                )
        if parse_bytes(self.swap_space, "swap_space") is not None and not self.prefix_cache:
            raise ValueError(
                f"swap_space needs the prefix cache, by whose hashes blocks are found again; got {self.swap_space!r} "
                "with prefix_cache=False: leave one of them out"
            )

    @classmethod
    def from_environment(cls) -> "PagedConfig":
        """The config that the environment variables in `VARIABLES` state; a field whose variable is blank or not set
        has its default.

        Raises
        ------
        PagedError
            If a value is none that the field takes; names the variable.
        """
        stated: dict[str, Any] = {}
        for field in fields(cls):
            variable = VARIABLES[field.name]
            text = os.environ.get(variable, "")
            if not text.strip():
                continue
            stated[field.name] = _read(variable, text, field.default)
            try:
                cls(**{field.name: stated[field.name]})
            except ValueError as error:
                raise PagedError(f"{variable}={text} cannot be used: {error}") from None
        try:
            return cls(**stated)
        except ValueError as error:
            variables = ", ".join(VARIABLES[name] for name in stated)
            raise PagedError(f"{variables} cannot be used together: {error}") from None


def _read(variable: str, text: str, default: Any) -> Any:
    """The value of a variable in the type of its field's default, a number where that is None; else the text itself."""
    if isinstance(default, bool):
        return is_on(variable, default)
    if isinstance(default, str):
        return text
    try:
        return int(text) if default is None else type(default)(text)
    except ValueError:
        return text


def parse_bytes(amount: int | str | None, field: str = "memory_budget") -> int | None:
    """Turn ``"1.5GiB"``, ``1024`` or ``None`` into bytes (or ``None``). `field` names what it is read for.

    Raises
    ------
    ValueError
        If the amount is no positive number of bytes.
    """
    if amount is None:
        return None
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", amount)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f'{field} must be bytes or a text such as "512MiB" or "2GB"; got {amount!r}')
        amount = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if not isinstance(amount, int) or isinstance(amount, bool) or amount <= 0:
        raise ValueError(f"{field} must be a positive number of bytes; got {amount!r}: leave it out for the default")
    return amount
