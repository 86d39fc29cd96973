"""Saved prefixes: the blocks of a prompt's beginning, from the pages of an engine into a file, and back.

Saving owns the blocks while they are read, and loading while they are written; both own nothing afterwards. What was
loaded is cached, as if a row had just stored it and left: it is found by the same hashes, and evicted in its turn.

A file outlives the process, so it names the model by the content of its weights (`models/content_digest`).
"""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from transformers import PreTrainedModel

from hf_paged.atomic import Undo, atomically
from hf_paged.errors import OutOfBlocksError, SavedPrefixError, UnsupportedError
from hf_paged.generation import prefix_file
from hf_paged.generation.engine import Engine
from hf_paged.generation.prefix_file import PrefixFile, refused
from hf_paged.memory.block_table import BlockTable
from hf_paged.memory.kv_format import Pages
from hf_paged.memory.kv_pool import KVCacheGroup, KVCacheSpec
from hf_paged.models.content_digest import content_digest
from hf_paged.models.fingerprint import Identity
from hf_paged.scheduling.cache_salt import current_salt
from hf_paged.scheduling.request import Request

Result = TypeVar("Result")
_VERSION = 1
_TOKENS = "tokens"
_WRITTEN_BY = "written_by"  # For people, and for messages.
_LONGEST_DETAIL = 160  # Characters of a message that come from a file.
# What to say of a field of the header that is not as expected, and the remedy. "layer" stands for each of them.
_REFUSALS = {
    "version": ("its format has version {got}, and this hf_paged reads {wanted}", "save the prefix anew"),
    "block_size": (
        "its blocks hold {got} tokens, and those of the pool {wanted}",
        "hf_paged.configure(model, PagedConfig(block_size={got})), or save the prefix anew",
    ),
    "num_tokens": ("it has {got} tokens, where full blocks are expected", "save the prefix anew"),
    "model": ("it was saved with a {got}, and this is a {wanted}", "load it into that model"),
    "layer": (
        "a layer lies in other pages, {got}, and the model's in {wanted}",
        "load the model in the dtype that it had, and with its PagedConfig, or save the prefix anew",
    ),
    "weights": ("it was saved with other weights", "load it into the model that it was saved with, or save it anew"),
    "settings": (
        "the model has the weights that it was saved with, and another config, other adapters or other attributes",
        "set the model up as it was, eval() included, with the versions that the file names ({versions}), or save the "
        "prefix anew",
    ),
    "salt": (
        "it was saved under another cache salt",
        "load it inside the hf_paged.cache_salt, and with the PagedConfig.cache_salt, that it was saved under",
    ),
}


class HeldPrefix:
    """A row that owns the blocks of a prefix for a while. Its state changes in sections, under the pool's lock.

    Parameters
    ----------
    engine : Engine
    tokens : list of int
        As many as fill blocks.

    Attributes
    ----------
    request : Request
        Its tables have the blocks. It is in no queue.
    """

    def __init__(self, engine: Engine, tokens: list[int]):
        self.request = Request(tokens, engine.block_pools)
        self.request.salt = current_salt()
        self._engine, self._prefix = engine, engine.scheduler.prefix
        self._num_blocks = len(tokens) // self._prefix.block_size

    def tables_in(self, spec: KVCacheSpec) -> list[BlockTable]:
        """Its tables, as `BlockOwner` says."""
        return [table for own, table in zip(self._engine.specs, self.request.tables) if own == spec]

    def find(self, digest: bytes) -> bool:
        """Own the blocks, if all of them are cached or used under this digest of the model.

        Raises
        ------
        SavedPrefixError
            If calls run that have found another model.
        """
        self._use(digest)
        found = self._prefix.stored(self.request)
        if found is None:
            return False
        self._engine.pool.caches.add(self)
        for table, blocks in zip(self.request.tables, found):
            self._start(table, len(blocks))
            table.reuse(blocks, self.request.num_tokens)
        return True

    def allocate(self) -> None:
        """Own new blocks, for all that later rows look up.

        Raises
        ------
        OutOfBlocksError
            If too few are free or cached. The pool is as before.
        """
        counts = [self._prefix.num_lasting(number, self._num_blocks) for number in range(len(self.request.tables))]
        for table, count in zip(self.request.tables, counts):  # Before any of them evicts a block.
            if count > table.pool.spare_blocks:
                raise OutOfBlocksError(count, table.pool.spare_blocks, table.pool.total_blocks)
        self._engine.pool.caches.add(self)
        for table, count in zip(self.request.tables, counts):
            self._start(table, count)
            table.blocks, table.num_tokens = table.pool.allocate(count), self.request.num_tokens
        self.request.num_stored = self.request.num_tokens

    def insert(self, digest: bytes) -> None:
        """Let rows find the blocks, which are written, and give them up.

        Raises
        ------
        SavedPrefixError
            If calls run that have found another model.
        """
        self._use(digest)
        self._prefix.insert(self.request)
        self.release()

    def release(self) -> None:
        """Give the blocks up. Idempotent."""
        self.request.release()

    def _use(self, digest: bytes) -> None:
        # Rows that run would store under this digest what another model has computed.
        if self._engine.is_running and not self._prefix.serves(digest):
            raise SavedPrefixError(
                "calls run that began before the model was changed: nothing was saved or loaded. Try again when they "
                "have ended"
            )
        self._prefix.use(digest)

    def _start(self, table: BlockTable, num_blocks: int) -> None:
        table.start_at((self._num_blocks - num_blocks) * self._prefix.block_size)


def save(engine: Engine, model: PreTrainedModel, path: str, tokens: list[int]) -> bool:
    """Write the blocks of `tokens` into a file, if all of them are cached.

    Parameters
    ----------
    engine : Engine
        The model's.
    tokens : list of int
        As many as fill blocks.

    Returns
    -------
    bool
        False if some block is not cached: nothing was written.

    Raises
    ------
    UnsupportedError
        If the model has no prefix cache.
    SavedPrefixError
        If the model is changed meanwhile, or the file cannot be written.
    """
    identity = _identify(engine, model)
    held = HeldPrefix(engine, tokens)
    undo = Undo(functools.partial(_locked, engine, held.release))
    try:
        if not _change(engine, functools.partial(held.find, identity.digest)):
            return False
        tensors = {_TOKENS: torch.tensor(tokens)}
        for table, group in zip(held.request.tables, _groups(engine)):
            blocks = torch.tensor(table.blocks, device=group.spec.device)
            for index, storage in group.layers.items():
                for number, part in enumerate(storage.read_blocks(blocks)):
                    tensors[_name(index, number)] = part.cpu()
    finally:
        undo.now()
    header = _header(engine, model, identity, len(tokens))
    if not identity.is_found_again():
        raise SavedPrefixError("the model was changed while its prefix was saved: nothing was written. Save it again")
    header[_WRITTEN_BY] = {"torch": torch.__version__, "transformers": transformers.__version__}
    prefix_file.write(path, header, tensors)
    return True


def load(engine: Engine, model: PreTrainedModel, path: str) -> int:
    """Let rows find the blocks of a file, as if one of them had stored them. All of the file's, or none.

    Returns
    -------
    int
        Tokens that can be found.

    Raises
    ------
    UnsupportedError
        If the model has no prefix cache.
    SavedPrefixError
        If the file is refused, or the model is changed meanwhile. The pool is as before.
    OutOfBlocksError
        If the pool, or the share of it that may be cached, is too small. The pool is as before.
    OSError
        If the file cannot be opened.
    """
    with prefix_file.opened(path) as file:
        identity = _identify(engine, model)
        num_tokens = _check_header(engine, model, identity, path, file)
        tokens = file.tensor(_TOKENS, torch.int64, (num_tokens,)).tolist()
        if why := unknown_token(model, tokens):
            raise refused(path, why)
        pages = _checked_pages(engine, file, num_tokens)
        _check_room(engine, num_tokens)
        held = HeldPrefix(engine, tokens)
        undo = Undo(functools.partial(_locked, engine, held.release))
        try:
            if _change(engine, functools.partial(held.find, identity.digest)):
                return num_tokens
            _change(engine, held.allocate)
            _fill(engine, held.request.tables, pages)
            if not identity.is_found_again():
                raise SavedPrefixError("the model was changed while a prefix was loaded: nothing was kept. Load again")
            _change(engine, functools.partial(held.insert, identity.digest))
        finally:
            undo.now()
    return num_tokens


def unknown_token(model: PreTrainedModel, tokens: list[int]) -> str | None:
    """Why the model cannot be given some of these tokens; None if it can be given all."""
    vocab = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    wrong = next((token for token in tokens if not 0 <= token < vocab), None)
    return None if wrong is None else f"token {wrong} is not one of the {vocab:,} that the model knows"


def _identify(engine: Engine, model: PreTrainedModel) -> Identity:
    if not engine.pool.config.prefix_cache:
        raise UnsupportedError(
            "prefixes are saved and loaded by the prefix cache, and this model's is off: "
            "hf_paged.configure(model, PagedConfig(prefix_cache=True)), or leave it out"
        )
    identity = engine.identify(model)
    if identity is None:
        raise UnsupportedError(
            "prefixes are saved and loaded by the prefix cache, which does not serve this model: a class, function, "
            "hook or tensor from outside torch, transformers, peft and accelerate takes part in its forward, or its "
            "weights are elsewhere. The log at level INFO names it once; take it out of the forward"
        )
    return identity


def _header(engine: Engine, model: PreTrainedModel, identity: Identity, num_tokens: int) -> dict[str, Any]:
    """The header of a file with so many tokens of this model, in the order in which its fields are looked at."""
    digest, config = content_digest(model, identity.digest), engine.pool.config
    num_blocks = num_tokens // config.block_size
    layers = {
        f"layer.{index}": {
            "window": group.window,
            "states": str(storage.states_dtype),
            "format": storage.kv_format.name,
            "blocks": engine.scheduler.prefix.num_lasting(number, num_blocks),
            "pages": [[str(page.dtype), *page.shape[1:]] for page in storage.pages],
        }
        for number, group in enumerate(_groups(engine))
        for index, storage in group.layers.items()
    }
    salts = json.dumps([config.cache_salt, current_salt()])
    return {
        "version": _VERSION,
        "block_size": config.block_size,
        "num_tokens": num_tokens,
        "model": digest.model,
        **layers,
        "weights": digest.weights,
        "settings": digest.settings,
        "salt": hashlib.sha256(salts.encode()).hexdigest(),
    }


def _check_header(engine: Engine, model: PreTrainedModel, identity: Identity, path: str, file: PrefixFile) -> int:
    """Compare a file with the model, field by field. Returns its number of tokens."""
    said, size = file.header, engine.pool.config.block_size
    number = said.get("num_tokens", "")
    num_tokens = max(1, int(number) // size) * size if number.isdecimal() else size
    expected = prefix_file.as_json(_header(engine, model, identity, num_tokens))
    for field, wanted in expected.items():
        got = said.get(field, "nothing")
        if got != wanted:
            why, remedy = _REFUSALS[field.partition(".")[0]]
            words = {"got": _short(got), "wanted": _short(wanted), "versions": _short(said.get(_WRITTEN_BY, "none"))}
            raise refused(path, why.format(**words), remedy.format(**words))
    storages = [layer for group in _groups(engine) for layer in group.layers.items()]
    names = {_name(index, part) for index, storage in storages for part in range(len(storage.pages))}
    if said.keys() != {*expected, _WRITTEN_BY} or file.names != {_TOKENS, *names}:
        raise refused(path, "it has fields or tensors of other names than a saved prefix of this model")
    return num_tokens


def _check_room(engine: Engine, num_tokens: int) -> None:
    """Refuse a prefix that could not stay cached.

    Raises
    ------
    OutOfBlocksError
    """
    prefix = engine.scheduler.prefix
    for number, pool in enumerate(engine.block_pools):
        needed = prefix.num_lasting(number, num_tokens // prefix.block_size)
        limit = min(pool.cache_blocks, pool.total_blocks)
        if needed > limit:
            raise OutOfBlocksError(
                needed,
                limit,
                pool.total_blocks,
                f"the saved prefix takes {needed} blocks, and {limit} of {pool.total_blocks} may be cached: raise "
                "prefix_cache_share or memory_budget with hf_paged.configure, or save a shorter prefix",
            )


def _checked_pages(engine: Engine, file: PrefixFile, num_tokens: int) -> dict[int, Pages]:
    """The content to be written into the blocks, for each layer. It lies in the file until it is read."""
    prefix, pages = engine.scheduler.prefix, {}
    for number, group in enumerate(_groups(engine)):
        count = prefix.num_lasting(number, num_tokens // prefix.block_size)
        for index, storage in group.layers.items():
            pages[index] = tuple(
                file.tensor(_name(index, part), page.dtype, (count, *page.shape[1:]))
                for part, page in enumerate(storage.pages)
            )
    return pages


def _fill(engine: Engine, tables: list[BlockTable], pages: dict[int, Pages]) -> None:
    """Write the blocks of some tables, layer by layer."""
    for table, group in zip(tables, _groups(engine)):
        blocks = torch.tensor(table.blocks, device=group.spec.device)
        for index, storage in group.layers.items():
            storage.write_blocks(blocks, pages[index])


def _groups(engine: Engine) -> list[KVCacheGroup]:
    """The KV cache groups in the order of a request's tables."""
    return [engine.pool.groups[spec] for spec in engine.specs]


def _name(layer: int, part: int) -> str:
    return f"layer.{layer}.part.{part}"


def _short(text: str) -> str:
    """A text from a file, of a length for messages."""
    return text if len(text) <= _LONGEST_DETAIL else f"{text[:_LONGEST_DETAIL]}..."


def _change(engine: Engine, section: Callable[[], Result]) -> Result:
    """Run an atomic section under the pool's lock."""
    return atomically(functools.partial(_locked, engine, section))


def _locked(engine: Engine, section: Callable[[], Result]) -> Result:
    with engine.pool.lock:
        return section()
