"""The gate before the first call, where transformers is newer than the versions that hf_paged was tested with.

A self-check decides there whether "paged" works. It runs before the first call of a "paged" model and not when
hf_paged is imported: that may happen while a model is built, under contexts that a tiny model would not survive. It
runs in a thread of its own for the same reason, out of the caller's autocast and inference mode.
"""

import contextvars
import threading

from transformers.utils import logging

from hf_paged.compat.requirements import as_requirement, is_tested, transformers_version
from hf_paged.errors import PagedError
from hf_paged_integrations.transformers.self_check import check_paged

logger = logging.get_logger(__name__)

# Set in the threads of the check, whose own calls must pass.
_is_checking: contextvars.ContextVar[bool] = contextvars.ContextVar("hf_paged_is_checking", default=False)
_lock = threading.Lock()
_is_open = True
_has_passed = False  # A check that has passed is not run again, however often the hooks are put in.
_refusal: str | None = None  # Why the check failed. It is not tried again.


def arm() -> None:
    """Close the gate if this transformers is an untested one, and say so, once. Idempotent."""
    global _is_open
    if is_tested() or _has_passed or not _is_open:
        return
    _is_open = False
    logger.warning_once(
        f"transformers {transformers_version()} is newer than those that hf_paged was tested with "
        f"({as_requirement()}): hf_paged checks itself before the first call, which takes some seconds, and refuses "
        "to run if a token differs or a call is not packed."
    )


def enter() -> None:
    """Let a call of a "paged" model in. The first one waits for the self-check, where the gate is closed.

    Raises
    ------
    PagedError
        If the self-check fails, or has failed before.
    """
    global _is_open, _has_passed, _refusal
    if _is_open or _is_checking.get():
        return
    with _lock:
        if not _is_open and _refusal is None:
            _refusal = _why_it_fails()
            _is_open = _has_passed = _refusal is None
    if _refusal is not None:
        raise PagedError(_refusal)


def _why_it_fails() -> str | None:
    errors: list[BaseException] = []

    def check() -> None:
        try:
            check_paged()
        except BaseException as error:  # Any code of an unknown version may fail in there.
            errors.append(error)

    context = contextvars.copy_context()
    context.run(_is_checking.set, True)
    thread = threading.Thread(target=context.run, args=(check,), name="hf_paged-check")
    thread.start()
    thread.join()
    if not errors:
        return None
    return (
        f"transformers {transformers_version()} is newer than those that hf_paged was tested with, and its self-check "
        f"fails there: {str(errors[0]) or type(errors[0]).__name__}. Load the model with "
        f"attn_implementation=\"sdpa\", or pip install 'transformers{as_requirement()}'"
    )
