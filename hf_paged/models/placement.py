"""Where a model runs: the devices of its layers."""

from fractions import Fraction

import torch


def devices_of(model: torch.nn.Module, inputs: torch.device) -> tuple[torch.device, ...]:
    """The devices on which a forward of the model queues work, that of its inputs first.

    Parameters
    ----------
    inputs : torch.device
        Of what the model is given.
    """
    devices = {inputs: None, getattr(model, "device", inputs): None}
    if getattr(model, "hf_device_map", None):  # accelerate has placed it, perhaps on several.
        devices |= dict.fromkeys(parameter.device for parameter in model.parameters())
    # Between forwards, offloaded weights are on "meta".
    return tuple(device for device in devices if device.type != "meta")


def share_of_layers(model: torch.nn.Module, device: torch.device) -> Fraction:
    """The share of a model's attention layers that are on a device, more than 0. Those whose place is unknown count."""
    places: dict[int, torch.device] = {}
    for module in model.modules():
        index, parameter = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(index, int) and parameter is not None:
            places.setdefault(index, parameter.device)
    here = sum(place.type == "meta" or place == device for place in places.values())
    return Fraction(here, len(places)) if here else Fraction(1)
