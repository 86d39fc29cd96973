"""A fingerprint of what a model computes: its weights and adapters. Changed weights make stored states stale."""

import hashlib
from dataclasses import dataclass

import torch
from transformers.utils import logging

from hf_paged.execution.content_sample import ContentSamples
from hf_paged.models.inspection import Inspection, UnseenError
from hf_paged.models.snapshot import Snapshot, is_disturbed

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Identity:
    """A model as one inspection found it, with all that its results depend on.

    Keeps all that was inspected alive, old weights too: hold it while rows run, and no longer.

    Attributes
    ----------
    digest : bytes
        Equal for two inspections between which nothing changed.
    """

    digest: bytes
    _snapshot: Snapshot
    _described: bytes  # A digest of the description, which knows nothing of the content of tensors.
    _samples: ContentSamples

    def is_found_again(self) -> bool:
        """Tell whether another inspection would find the same, the content of tensors included. Costs less than one."""
        return self.holds() and _digest(self._described, self._samples) == self.digest

    def holds(self) -> bool:
        """Tell whether the model is still what it was. Costs a fraction of an inspection; meant for every step.

        Sees all that `identify` sees, but for the content of tensors: an edit through ``.data`` leaves no trace. Safe
        while other threads change the model. A change that was undone before this call can be missed.
        """
        return self._snapshot.holds()


def identify(model: torch.nn.Module, *besides: object) -> Identity | None:
    """Inspect all that the states of a token depend on, besides the tokens before it.

    Sees where each parameter and buffer lies, how often it was changed in place, and a few elements of its content: an
    edit through ``.data`` leaves no other trace. Such an edit of a few elements can be missed. Sees the class of each
    module, its attributes, and the functions of these classes and their files.

    Parameters
    ----------
    besides : objects
        Stored states depend on these as well: their `repr` is part of the digest.

    Returns
    -------
    Identity or None
        None if a change could not be seen: a class or a function from outside torch, transformers, peft and accelerate
        takes part, weights are elsewhere (offloaded), or a forward hook from outside may change what is computed.
    """
    inspection = Inspection()
    try:
        inspection.describe_model(model)
        if is_disturbed():
            raise UnseenError("a hook on all modules, or a mode that sees every call of torch")
    except (UnseenError, RecursionError) as error:
        logger.info_once(f"hf_paged: the prefix cache serves no call on this model: {error} takes part in its forward")
        return None
    described = hashlib.sha256("\n".join([repr(besides), *inspection.description]).encode()).digest()
    samples = ContentSamples(inspection.contents)
    return Identity(_digest(described, samples), inspection.snapshot, described, samples)


def fingerprint(model: torch.nn.Module, *besides: object) -> bytes | None:
    """The digest of `identify`; None if a change could not be seen."""
    identity = identify(model, *besides)
    return None if identity is None else identity.digest


def _digest(described: bytes, samples: ContentSamples) -> bytes:
    return hashlib.sha256(described + samples.read()).digest()
