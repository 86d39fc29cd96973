"""The cache salt: a text that keeps the prefix caches of its users apart."""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

_salt: contextvars.ContextVar[str] = contextvars.ContextVar("hf_paged_cache_salt", default="")


@contextmanager
def cache_salt(salt: str) -> Iterator[None]:
    """Keep the prefix cache of the calls made inside apart from that of calls with another salt.

    How soon a first token comes tells whether the same prompt was sent before. A server that must not tell one
    tenant about another gives each its own salt, here or as ``PagedConfig.cache_salt``; it is no argument of
    ``generate``, so that what a request may set there cannot choose it.

    The salt belongs to the thread or task that enters (`contextvars`): threads that are started inside begin without.

    Parameters
    ----------
    salt : str
        Any text, such as a tenant's id. The empty one is that of calls without a salt.

    Raises
    ------
    TypeError
        If `salt` is no text.

    Examples
    --------
    >>> with hf_paged.cache_salt("tenant 7"):
    ...     model.generate(**inputs)  # doctest: +SKIP
    """
    if not isinstance(salt, str):
        raise TypeError(f"cache_salt takes a text, got {type(salt).__name__}: hf_paged.cache_salt(str(tenant))")
    token = _salt.set(salt)
    try:
        yield
    finally:
        _salt.reset(token)


def current_salt() -> str:
    """The salt of the calls that this thread or task makes now."""
    return _salt.get()
