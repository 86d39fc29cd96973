"""The packed forward: logits of a step's tokens."""

from collections.abc import Callable

import torch

from hf_paged.execution.packed_cache import PACKED_FORWARD, NotPackableError, PackedCache, PackedForward
from hf_paged.execution.step_inputs import StepInputs
from hf_paged.reasons import Reason


def run_step(model: Callable, inputs: StepInputs) -> torch.Tensor:
    """The model's logits where `inputs` wants them, ``[num_samples, vocab]``.

    Raises
    ------
    NotPackableError
        If the model's layers did not attend through the step.
    """
    forward = PackedForward(inputs)
    output = model(
        input_ids=inputs.input_ids,
        position_ids=inputs.position_ids,
        past_key_values=PackedCache(forward),
        logits_to_keep=inputs.sample_index,
        use_cache=True,
        return_dict=True,
        **{PACKED_FORWARD: forward},
    )
    if not forward.has_attended:
        raise NotPackableError(Reason.OWN_ATTENTION)
    return output.logits[0]
