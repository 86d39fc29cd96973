"""Running a server: until a signal comes, and then until what is under way has ended."""

import asyncio
from types import FrameType

import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_paged_integrations.serving.openai.app import make_app
from hf_paged_integrations.serving.openai.service import Service
from hf_paged_integrations.serving.openai.settings import ServerSettings

_CLOSE_SECONDS = 5  # For responses that are complete to reach slow clients.


class DrainingServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then refuses requests and lets those under way end. A second signal ends it.

    Parameters
    ----------
    service : Service
    host : str
    port : int
        0: one that is free; uvicorn logs it.
    """

    def __init__(self, service: Service, host: str, port: int):
        self._service = service
        self._drain: asyncio.Task | None = None
        config = uvicorn.Config(
            make_app(service), host, port, log_level="info", timeout_graceful_shutdown=_CLOSE_SECONDS
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal. uvicorn's own method closes the port at once, and lets the signal end the process."""
        if self._service.is_draining:
            self.should_exit = self.force_exit = True
        self._service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Look for a signal, ten times a second."""
        if self._service.is_draining and self._drain is None:
            self._drain = asyncio.create_task(self._end())
        return await super().on_tick(counter)

    async def _end(self) -> None:
        try:
            await self._service.shutdown()
        finally:
            self.should_exit = True


def run_server(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ServerSettings, host: str, port: int
) -> None:
    """Serve a model until a signal comes.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="paged"``.
    tokenizer : PreTrainedTokenizerBase
    settings : ServerSettings
    host : str
    port : int
        0: one that is free.

    Raises
    ------
    UnsupportedError
        If the tokenizer cannot stream text.
    """
    DrainingServer(Service(model, tokenizer, settings), host, port).run()
