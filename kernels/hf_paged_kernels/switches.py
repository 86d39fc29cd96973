"""Switches: environment variables that turn a part of hf_paged on or off."""

import functools
import os
import warnings

ON, OFF = ("1", "true", "yes", "on", "t", "y"), ("0", "false", "no", "off", "f", "n")


def is_on(name: str, default: bool = True) -> bool:
    """Read a switch: `default` if it is not set or blank, else on unless it is one of `OFF`.

    A value that is neither is warned about once.
    """
    value = os.environ.get(name, "").strip().lower()
    if value and value not in ON + OFF:
        _warn(name, os.environ[name])
    return value not in OFF if value else default


@functools.cache
def _warn(name: str, value: str) -> None:
    warnings.warn(
        f"{name}={value} is neither on ({', '.join(ON)}) nor off ({', '.join(OFF)}): it counts as on", stacklevel=3
    )
