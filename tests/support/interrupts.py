"""Interrupts at a chosen line: a signal handler may raise at any call or jump, here it is repeatable."""

import dis
import functools
import sys
from pathlib import Path
from types import CodeType

_PACKAGES = ("hf_paged.", "hf_paged_integrations.", "hf_paged_kernels.")


class Interrupt(KeyboardInterrupt):
    """Raised by `InterruptedAt`."""


class InterruptedAt:
    """While entered, raises `Interrupt` in this thread before the n-th line of hf_paged's own code that it runs.

    Parameters
    ----------
    countdown : int or None
        The line's number; None: only counts.

    Attributes
    ----------
    fired : str or None
        Where it was raised: file, line and function. None: nowhere so far.
    num_lines : int
        Lines that have run, up to the interrupt.
    """

    def __init__(self, countdown: int | None):
        self.countdown, self.fired, self.num_lines = countdown, None, 0

    def __enter__(self) -> "InterruptedAt":
        sys.settrace(self._trace_call)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(None)

    def _trace_call(self, frame, event, argument):
        return self._trace_line if frame.f_globals.get("__name__", "").startswith(_PACKAGES) else None

    def _trace_line(self, frame, event, argument):
        if event == "line" and self.fired is None and frame.f_lasti not in _exits(frame.f_code):
            self.num_lines += 1
            if self.num_lines == self.countdown:
                self.fired = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                raise Interrupt
        return self._trace_line


@functools.cache
def _exits(code: CodeType) -> frozenset[int]:
    """Where code that has come through a ``with`` block is about to call ``__exit__(None, None, None)``.

    The line is traced once more there, but no signal handler runs before that call: the interpreter looks for signals
    at calls and jumps. An interrupt would leave a lock held that no real one does.
    """
    steps = list(dis.get_instructions(code))
    nothing = [step.opname == "LOAD_CONST" and step.argval is None for step in steps]
    calls = [step.opname in ("PRECALL", "CALL", "CALL_FUNCTION") for step in steps]
    # Python 3.10 loads the first of the three and copies it.
    copies = [step.opname == "DUP_TOP" for step in steps]
    return frozenset(
        step.offset
        for at, step in enumerate(steps[:-3])
        if nothing[at] and all(nothing[i] or copies[i] for i in (at + 1, at + 2)) and calls[at + 3]
    )
