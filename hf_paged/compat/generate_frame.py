"""The call of ``generate`` that runs on this thread, as its frame shows it."""

import inspect

from transformers import GenerationMixin


def names_passed_to_generate() -> frozenset[str] | None:
    """The names of the model inputs that the caller of the innermost ``generate`` on this thread passed by keyword.

    ``generate`` hands its loop one dict with the caller's inputs and those that it makes itself. Only its own frame
    keeps them apart: ``**kwargs`` of its signature.

    Returns
    -------
    frozenset of str or None
        None if no ``generate`` of transformers is running: its loop was called by another name.
    """
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return None
    values = inspect.getargvalues(frame)
    return frozenset(values.locals.get(values.keywords or "", ()))
