"""StepBuffers: the tensors that describe a step, allocated once and filled anew for every step."""

import numpy as np
import torch


class StepBuffers:
    """One int64 tensor per name, written in place: every step of an engine has its inputs at the same addresses.

    A step's tensors are good until the next step is prepared. That may be while an asynchronous device still runs this
    step: then it is written to in the order of the stream, and each upload here waits for its end.

    Parameters
    ----------
    device : torch.device
        Where the tensors go.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # name -> [capacity] in the host's memory and on the device; on the CPU they are one tensor.
        self._tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def fill(self, name: str, values: np.ndarray) -> torch.Tensor:
        """Put `values` into the buffer `name`; it grows when they need more than ever before.

        Returns
        -------
        torch.Tensor
            A contiguous tensor in the shape of `values`, over the buffer's memory.
        """
        count = values.size
        if name not in self._tensors or len(self._tensors[name][0]) < count:
            new = torch.empty(_capacity(count), dtype=torch.long)
            self._tensors[name] = (new, new.to(self.device))  # Both at once: an interrupt may come at any line.
        host, tensor = self._tensors[name]
        host.numpy()[:count] = values.ravel()
        if tensor.device != host.device:
            tensor[:count].copy_(host[:count])
        # No view: a compiler would guard on the size of what it is a view of.
        return tensor.new_empty(0).set_(  # type: ignore[call-overload]  # torch's stub wants a stride; set_ does not.
            tensor.untyped_storage(), 0, torch.Size(values.shape)
        )


def _capacity(count: int) -> int:
    """The next power of two: a buffer that grows with its rows is replaced a few times at most."""
    return max(64, 1 << (count - 1).bit_length())
