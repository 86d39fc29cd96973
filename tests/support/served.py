"""A tiny model with a byte-level tokenizer, and a server of it in a thread, on a port of the loopback."""

import asyncio
import functools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import hf_paged
from hf_paged import PagedConfig
from hf_paged_integrations.serving.openai.app import make_app
from hf_paged_integrations.serving.openai.service import Service
from hf_paged_integrations.serving.openai.settings import ServerSettings
from support import zoo

NAME = "tiny"
_SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<system>", "<tool>"]
TEMPLATE = (
    "{% if tools %}<system>{{ tools | tojson }}</s>{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' and loop.first %}{{ raise_exception('a chat begins with no tool') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.x }}{% endfor %}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, a few words of two letters and more, and special tokens: a character may take several tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the sky is blue, and the sea is blue too: a name, an age, a colour"] * 5, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=inner, extra_special_tokens=_SPECIAL[3:], **names)


@functools.cache
def pair():
    """The dense model and the paged one. Their logits have places that no token has, as those of real models do."""
    return tuple(zoo.build("llama", name, vocab_size=320, max_position_embeddings=512) for name in ("sdpa", "paged"))


@dataclass
class Served:
    """A server that runs, and clients of it."""

    port: int
    service: Service
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def async_client(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)


@contextmanager
def served(model=None, config: PagedConfig | None = None, **settings) -> Iterator[Served]:
    """Serve a model until the block ends; every block of its pool must be free then."""
    model = pair()[1] if model is None else model
    hf_paged.configure(model, PagedConfig(block_size=4, token_budget=64) if config is None else config)
    given, started = ServerSettings(model_name=NAME, **settings), Future[Served]()
    thread = threading.Thread(target=lambda: asyncio.run(_run(model, given, started)), name="server")
    thread.start()
    server = started.result(60)
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.stop.set)
        thread.join(60)
        assert not thread.is_alive() and empty(model)


async def _run(model, settings: ServerSettings, started: "Future[Served]") -> None:
    try:
        service = Service(model, tokenizer(), settings)
        server = uvicorn.Server(uvicorn.Config(make_app(service), "127.0.0.1", 0, log_level="warning"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
    except BaseException as error:
        started.set_exception(error)
        raise
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Served(port, service, asyncio.get_running_loop(), asyncio.Event())
    started.set_result(running)
    await running.stop.wait()
    await service.shutdown()
    server.should_exit = True
    await task


def empty(model) -> bool:
    """Tell whether all blocks come back soon."""
    for _ in range(500):
        if not hf_paged.stats(model).used_blocks:
            return True
        time.sleep(0.01)
    return False
