"""Interrupts at a chosen line: a signal handler may raise between any two instructions, here it is repeatable."""

import sys
from pathlib import Path

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
        if event == "line" and self.fired is None:
            self.num_lines += 1
            if self.num_lines == self.countdown:
                self.fired = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                raise Interrupt
        return self._trace_line
