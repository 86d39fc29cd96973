"""attempt: tells an error of a piece of work from one that a signal handler raised while it ran."""

from collections.abc import Callable
from typing import TypeVar

from hf_paged_kernels.faults import is_device_fault, is_out_of_memory

Result = TypeVar("Result")


def attempt(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Call a function, and once more if it raises anything but a fault of the device: its result, or its error.

    Raises
    ------
    Exception
        An error that does not come again. It is not the function's: a signal handler, such as a time limit, raised
        it in this thread.
    """
    try:
        return function(), None
    except Exception as error:
        if is_device_fault(error):
            return None, error
        first = error
    try:
        result = function()
        if not is_out_of_memory(first):
            raise first
    except Exception as error:
        if error is first:
            raise
        return None, error
    finally:
        del first  # Its traceback holds this frame: no cycle.
    return result, None
