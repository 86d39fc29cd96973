"""The requests that the server takes, as OpenAI defines them.

A parameter that OpenAI does not know is refused. One that it knows and this server does not is refused where it would
change the answer, unless it has the value that changes nothing. `top_k`, `min_p` and `repetition_penalty` are not
OpenAI's: its client sends them by ``extra_body``.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hf_paged_integrations.serving.openai.errors import UNSUPPORTED, WRONG

MAX_STOPS, MAX_TOP_LOGPROBS, MAX_COMPLETION_LOGPROBS = 4, 20, 5
_MOST_SEED = 2**63


def _refuse(value: object) -> object:
    if value is not None:
        raise PydanticCustomError(UNSUPPORTED, "not supported")
    return value


def _wrong(text: str) -> PydanticCustomError:
    return PydanticCustomError(WRONG, text)


Refused = Annotated[Any, AfterValidator(_refuse)]
Ignored = Any  # It tells OpenAI about the caller, or is a hint that changes no answer.
_Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Request(_Strict):
    """The fields that requests of both kinds share."""

    model: str
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-_MOST_SEED, lt=_MOST_SEED)
    stop: _Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Ignored = None

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options is for streams: set stream, or leave it out")
        return self

    @property
    def includes_usage(self) -> bool:
        """Tell whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(_Request):
    """The body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_COMPLETION_LOGPROBS)
    best_of: int | None = None
    echo: Literal[False] | None = None
    suffix: Refused = None

    @model_validator(mode="after")
    def _check_best_of(self):
        if self.best_of not in (None, self.n or 1):
            raise _wrong(f"best_of must equal n, which is {self.n or 1}: this server ranks no answers")
        return self


class TextPart(_Strict):
    """A part of a message; other kinds than text are not served."""

    type: Literal["text"]
    text: str


class FunctionCall(_Strict):
    """A function that the model has called, with its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A tool that the model has called."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Strict):
    """One message of a chat."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    annotations: Ignored = None
    audio: Refused = None
    function_call: Refused = None
    refusal: Refused = None


class Tool(_Strict):
    """A tool that the model may call; the chat template shows it."""

    type: Literal["function"]
    function: dict[str, Any]


class JsonSchema(_Strict):
    """A JSON schema that the answer must follow."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(_Request):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    moderation: Refused = None
    prediction: Refused = None
    prompt_cache_options: Refused = None
    reasoning_effort: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None

    @model_validator(mode="after")
    def _check_pairs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs needs logprobs: set it, or leave top_logprobs out")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _wrong("max_tokens and max_completion_tokens are the same limit and differ: give one of them")
        return self
