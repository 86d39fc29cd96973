"""Zero-code activation, looked at from inside: the switches and the entry point that `hf_paged_autoload` needs."""

import os
from importlib.metadata import entry_points

from hf_paged_kernels.switches import is_on

GROUP, VALUE = "torch.backends", "hf_paged_autoload:install"
# Each switches it off: ours as every switch of ours, torch's by everything but "1".
SWITCH, TORCH_SWITCH = "HF_PAGED_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"


def why_off() -> str | None:
    """Say what keeps ``import torch`` from calling `hf_paged_autoload`; None if nothing does.

    Where nothing does, ``attn_implementation="paged"`` works without ``import hf_paged``.
    """
    if not is_on(SWITCH):
        return f"{SWITCH}={os.environ[SWITCH]} is set"
    if os.environ.get(TORCH_SWITCH, "1") != "1":
        return f"{TORCH_SWITCH}={os.environ[TORCH_SWITCH]} is set"
    if not any(point.value == VALUE for point in entry_points(group=GROUP)):
        return "hf_paged is not installed, or by a version without it: pip install it anew"
    return None
