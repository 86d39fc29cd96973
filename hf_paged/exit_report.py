"""``HF_PAGED_STATS=1``: the statistics of each paged model, on stderr when the program ends."""

import atexit
import contextlib
import dataclasses
import os
import sys
import threading
import weakref

from torch.nn import Module
from transformers import PreTrainedModel

from hf_paged.atomic import after_fork_in_child
from hf_paged.errors import PagedError
from hf_paged.metrics import Stats, stats
from hf_paged.models import registry
from hf_paged_kernels.switches import is_on

SWITCH = "HF_PAGED_STATS"


@dataclasses.dataclass
class _Record:
    """A model's title and the last statistics that showed it at work. It outlives the model, and holds none."""

    title: str
    stats: Stats


_is_installed = _is_forked = False
_records: list[_Record] = []
_record_of: "weakref.WeakKeyDictionary[Module, _Record]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def install() -> None:
    """Report at exit if the switch says so. Idempotent; called when hf_paged is imported."""
    global _is_installed
    if not _is_installed and is_on(SWITCH, default=False):
        _is_installed = True
        atexit.register(_report)


def note(model: PreTrainedModel) -> None:
    """Keep the statistics of a model that has just run: it may be gone, or released, when the program ends."""
    if _is_installed:
        with contextlib.suppress(PagedError):  # It has no pool, and the environment is wrong: the next call says so.
            _keep(model)


def forget(model: PreTrainedModel) -> None:
    """Leave a model out of the report."""
    with _lock:
        record = _record_of.pop(model, None)
        if record is not None:
            _records.remove(record)


def _keep(model: Module) -> None:
    """Make or renew the record of a model. After a release the statistics are empty: the last ones before it stay."""
    now = stats(model)
    if not (now.packed_calls or now.page_reads or now.fallbacks or now.gathers or now.total_blocks):
        return
    with _lock:
        record = _record_of.get(model)
        if record is None:
            record = _record_of[model] = _Record(_title(model), now)
            _records.append(record)
        record.stats = now


def _title(model: Module) -> str:
    name = getattr(model, "name_or_path", "")
    return f"{type(model).__name__} ({name})" if name else type(model).__name__


def _report() -> None:
    """Write the records. Whatever goes wrong, a program that ends is not disturbed by it."""
    with contextlib.suppress(Exception):
        with _lock:
            models: list[Module] = [*_record_of]
        if not _is_forked:  # What a child finds there may be its parent's.
            models += registry.models()
        for model in _outermost(models):
            with contextlib.suppress(Exception):
                _keep(model)
        sys.stderr.write("".join(map(_block, _records)))
        sys.stderr.flush()


def _outermost(models: list[Module]) -> list[Module]:
    """The models that lie in no other: the decoder owns the pool, the model around it counts the calls."""
    inner = {id(module) for model in models for module in model.modules() if module is not model}
    return list({id(model): model for model in models if id(model) not in inner}.values())


def _block(record: _Record) -> str:
    lines = [f"hf_paged: statistics of {record.title}, process {os.getpid()}"]
    for field in dataclasses.fields(record.stats):
        value = getattr(record.stats, field.name)
        if not isinstance(value, dict):
            texts = [f"{value:.3f}" if isinstance(value, float) else str(value)]
        else:
            texts = [f"{count} x {reason}" for reason, count in value.items()] or ["none"]
        lines += [f"  {label:<20}{text}" for label, text in zip([field.name, *[""] * len(texts)], texts)]
    return "\n".join([*lines, ""])


def _reset_in_child() -> None:
    """A forked child reports what runs in it, and not once more what its parent reports."""
    global _lock, _is_forked
    _lock, _is_forked = threading.Lock(), True
    _records.clear()
    _record_of.clear()


after_fork_in_child(_reset_in_child)
