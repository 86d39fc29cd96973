"""PendingTokens: next tokens of rows that the device has chosen and the host does not know yet."""

from collections.abc import Sequence

import torch

from hf_paged.compat import devices
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Chunk


class PendingTokens:
    """Tokens on the device, on their way to the host. The next step may run with them before they are there.

    The copy to the host begins here and blocks nothing: it goes to pinned memory, and an event tells that it is done.

    Parameters
    ----------
    tokens : torch.Tensor
        ``[rows]`` int64, all of them in the vocabulary: a step runs with them.
    to_read : torch.Tensor
        ``[rows]`` int64: what the host is to know of them; it may mark those that are no tokens.
    requests : sequence of Request
        Whose next tokens they are.
    """

    def __init__(self, tokens: torch.Tensor, to_read: torch.Tensor, requests: Sequence[Request]):
        self._tokens, self._index_of = tokens, {request: index for index, request in enumerate(requests)}
        self._on_host, self._event = to_read, None
        if tokens.device.type != "cpu":
            self._on_host = torch.empty(to_read.shape, dtype=to_read.dtype, pin_memory=True)
            self._on_host.copy_(to_read, non_blocking=True)
            self._stream = torch.accelerator.current_stream(tokens.device)
            self._event = self._stream.record_event()

    @property
    def device(self) -> torch.device:
        """Where they were chosen."""
        return self._tokens.device

    def read(self) -> list[int]:
        """Wait for the tokens, in the order of the requests. May be called again."""
        if self._event is not None:
            self._event.synchronize()
        return self._on_host.tolist()

    def precede(self) -> None:
        """Let all that this thread launches from now on run after the step that chose the tokens.

        Another thread may have launched that step, and have another current stream.
        """
        if self._event is None:
            return
        stream = torch.accelerator.current_stream(self._tokens.device)
        if stream != self._stream:
            stream.wait_event(self._event)
            self._tokens.record_stream(stream)

    def put_into(self, input_ids: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """Write the tokens into the input ids of a step, at the places of the chunks that run ahead with them.

        Parameters
        ----------
        input_ids : torch.Tensor
            ``[1, num_tokens]`` int64, or longer if the step is padded. Written to, on the device.
        chunks : sequence of Chunk
            Of the step, in the order of its tokens.
        """
        places, sources, end = [], [], 0
        for chunk in chunks:
            end += chunk.end - chunk.start
            if chunk.is_ahead:
                places.append(end - 1)
                sources.append(self._index_of[chunk.request])
        if not places:
            return
        if _is_run(places) and _is_run(sources):  # As in most decode steps: nothing is uploaded.
            count = len(places)
            input_ids[0, places[0] : places[0] + count] = self._tokens[sources[0] : sources[0] + count]
        else:
            place, source = devices.upload([places, sources], self._tokens.device).unbind()
            input_ids[0].index_copy_(0, place, self._tokens.index_select(0, source))


def _is_run(numbers: Sequence[int]) -> bool:
    """Tell whether rising numbers follow each other without a gap."""
    return all(number == first for first, number in enumerate(numbers, numbers[0]))
