"""Tells whether "paged" is registered with transformers. A forward is good only if it was from beginning to end.

While it is not, transformers builds no mask for a "paged" model, and says nothing. Any thread may register it or take
it out at any time.
"""

from typing import NoReturn

from hf_paged.errors import PagedError

_is_on = False
_times_off = 0


def turn(on: bool) -> None:
    """Note that "paged" has been registered, or is about to be taken out."""
    global _is_on, _times_off
    _is_on = on
    _times_off += not on


def is_on() -> bool:
    """Tell whether "paged" is registered."""
    return _is_on


def times_off() -> int:
    """How often "paged" was taken out so far: what sees the same number before and after was not disturbed."""
    return _times_off


def refuse(model) -> NoReturn:
    """Refuse a forward that begins while "paged" is not registered."""
    raise PagedError(
        f'{type(model).__name__} has attn_implementation="paged", and hf_paged is disabled: call hf_paged.enable(), or '
        'model.set_attn_implementation("sdpa")'
    )


def refuse_result(model) -> NoReturn:
    """Refuse what a model computed while "paged" was taken out."""
    raise PagedError(
        f"hf_paged.disable() was called while {type(model).__name__} ran, and what it computed may be wrong: run it "
        "again, and call disable() when no call is under way"
    )
