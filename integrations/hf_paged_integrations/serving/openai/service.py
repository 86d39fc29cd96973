"""Service: a model behind OpenAI's interface, without HTTP: checked requests in, answers out."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_paged.errors import UnsupportedError
from hf_paged.scheduling.cache_salt import cache_salt
from hf_paged_integrations.serving.async_engine import AsyncEngine, QueueFullError
from hf_paged_integrations.serving.openai.answer import Answer
from hf_paged_integrations.serving.openai.constrained import Grammars
from hf_paged_integrations.serving.openai.errors import ApiError, as_api_error
from hf_paged_integrations.serving.openai.metrics import Metrics
from hf_paged_integrations.serving.openai.prompts import Prompts
from hf_paged_integrations.serving.openai.responses import ChatForm, CompletionForm, Form
from hf_paged_integrations.serving.openai.sampling import Sampling, end_tokens
from hf_paged_integrations.serving.openai.schema import ChatRequest, CompletionRequest
from hf_paged_integrations.serving.openai.settings import ServerSettings

Result = TypeVar("Result")
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions.


class Service:
    """Answers requests on one model. Call it where an event loop runs.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="paged"``.
    tokenizer : PreTrainedTokenizerBase
    settings : ServerSettings

    Attributes
    ----------
    engine : AsyncEngine
    metrics : Metrics
    is_draining : bool
        Requests are refused, because the server shuts down.

    Raises
    ------
    UnsupportedError
        If the tokenizer is none of the fast ones, which alone can stream text.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ServerSettings):
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UnsupportedError(
                f"a server streams text with the fast tokenizers alone, got {type(tokenizer).__name__}: "
                "convert it, or take a model that has a tokenizer.json"
            )
        self.settings, self.tokenizer = settings, tokenizer
        self.engine = AsyncEngine(model, settings.max_running, settings.max_queue)
        self.metrics = Metrics(self.engine)
        self.is_draining = False
        config: Any = model.config.get_text_config(decoder=True)
        embeddings: Any = model.get_input_embeddings()
        vocab_size = len(embeddings.weight)
        self.defaults = model.generation_config
        longest = getattr(config, "max_position_embeddings", None)
        self.prompts = Prompts(tokenizer, vocab_size, longest, settings.max_prompt_tokens)
        self.grammars = Grammars(tokenizer, vocab_size, end_tokens(self.defaults))
        self._vocab_size = vocab_size
        # One thread, because a tokenizer is for one at a time.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="hf_paged-encode")

    def check_model(self, name: str) -> None:
        """Refuse a model that is not here.

        Raises
        ------
        ApiError
        """
        if name != self.settings.model_name:
            text = f"there is no model {name!r} here; this server has {self.settings.model_name!r}"
            raise ApiError(404, text, code="model_not_found", param="model")

    def _check(self, request: ChatRequest | CompletionRequest) -> None:
        """Refuse, before any work is done for it, a request that is for another model or finds the queue full."""
        self.check_model(request.model)
        engine = self.engine
        if engine.is_full:
            raise as_api_error(QueueFullError(engine.num_waiting, engine.num_running))

    async def chat(self, request: ChatRequest, tenant: str | None) -> tuple[Answer, Form]:
        """Begin the answer to a chat, and say how it is stated.

        Raises
        ------
        ApiError
            If the request cannot be answered.
        """
        self._check(request)
        self._check_choices(request.n or 1)
        prompt = await self._encoded(self.prompts.of_chat, request)
        grammar = await asyncio.to_thread(self.grammars.of, request.response_format)
        top = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.max_completion_tokens or request.max_tokens
        size = self._answer_tokens(limit, self.settings.max_new_tokens, len(prompt))
        sampling = Sampling.of(request, self.defaults, self._biases(request), top, grammar, size)
        form = ChatForm(
            self.settings.model_name, self.tokenizer, self.grammars, top is not None, request.includes_usage
        )
        return self._begin(request, [(prompt, sampling)], tenant), form

    async def complete(self, request: CompletionRequest, tenant: str | None) -> tuple[Answer, Form]:
        """Begin the answer to prompts, and say how it is stated.

        Raises
        ------
        ApiError
            If the request cannot be answered.
        """
        self._check(request)
        prompts = await self._encoded(self.prompts.of_completion, request)
        self._check_choices(len(prompts) * (request.n or 1))
        biases, jobs = self._biases(request), []
        for prompt in prompts:
            size = self._answer_tokens(request.max_tokens, _COMPLETION_TOKENS, len(prompt))
            jobs.append((prompt, Sampling.of(request, self.defaults, biases, request.logprobs, None, size)))
        has_logprobs = request.logprobs is not None
        form = CompletionForm(
            self.settings.model_name, self.tokenizer, self.grammars, has_logprobs, request.includes_usage
        )
        return self._begin(request, jobs, tenant), form

    def _begin(
        self, request: ChatRequest | CompletionRequest, jobs: list[tuple[list[int], Sampling]], tenant: str | None
    ) -> Answer:
        with _salted(tenant):
            return Answer(
                self.engine,
                self.tokenizer.backend_tokenizer,
                self.defaults,
                jobs,
                request.n or 1,
                request.stop or (),
                self.settings.request_seconds,
                self.metrics,
            )

    async def _encoded(self, encode: Callable[..., Result], request: ChatRequest | CompletionRequest) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode, request)

    def _check_choices(self, count: int) -> None:
        if count > self.settings.max_choices:
            text = f"n: the request asks for {count} answers, and this server gives {self.settings.max_choices} at once"
            raise ApiError(400, text, code="invalid_value", param="n")

    def _answer_tokens(self, wanted: int | None, default: int, prompt_length: int) -> int:
        """Tokens that an answer may have."""
        most, room = self.settings.max_new_tokens, self.prompts.room(prompt_length)
        if wanted is None:
            return min(limit for limit in (default, most, room) if limit is not None)
        if wanted > most:
            text = f"max_tokens: this server generates at most {most} tokens, got {wanted}: ask for fewer"
            raise ApiError(400, text, code="invalid_value", param="max_tokens")
        if room is not None and wanted > room:
            text = f"the prompt has {prompt_length} tokens, which leaves {room} of the model's context, got max_tokens"
            raise ApiError(400, f"{text} {wanted}: ask for fewer", code="context_length_exceeded", param="max_tokens")
        return wanted

    def _biases(self, request: ChatRequest | CompletionRequest) -> dict[int, float]:
        """The biases of a request, by token."""
        found = {}
        for name, bias in (request.logit_bias or {}).items():
            is_number = name.isascii() and name.isdigit() and len(name) <= len(str(self._vocab_size))
            if not (is_number and int(name) < self._vocab_size):
                text = f"logit_bias: {name[:20]!r} is no token: this model has 0 to {self._vocab_size - 1}"
                raise ApiError(400, text, code="invalid_value", param="logit_bias")
            found[int(name)] = bias
        return found

    async def shutdown(self) -> None:
        """Refuse requests from now on, let those under way end, and end those that take too long."""
        self.is_draining = True
        await self.engine.shutdown(self.settings.drain_seconds)


@contextlib.contextmanager
def _salted(tenant: str | None) -> Iterator[None]:
    if tenant is None:
        yield
    else:
        with cache_salt(tenant):
            yield
