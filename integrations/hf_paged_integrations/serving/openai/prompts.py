"""Prompts: the messages and texts of a request as tokens, within the limits of model and server."""

import json
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from hf_paged.compat.transformers import sanitizes_chats
from hf_paged_integrations.serving.openai.errors import ApiError
from hf_paged_integrations.serving.openai.schema import ChatRequest, CompletionRequest, Message


class Prompts:
    """Encodes prompts. Not for several threads at once: a tokenizer is not.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    vocab_size : int
        Of the model's embeddings.
    context_length : int or None
        Tokens that the model takes, prompt and answer together.
    max_prompt_tokens : int or None
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        context_length: int | None,
        max_prompt_tokens: int | None,
    ):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._context_length = context_length
        limits = (max_prompt_tokens, self.room(1))  # An answer has a token.
        self._most = min((limit for limit in limits if limit is not None), default=None)
        # A user who writes "<|im_end|>" does not end the message.
        self._options: dict[str, Any] = {"sanitize_control_tokens": True} if sanitizes_chats(tokenizer) else {}

    def of_chat(self, request: ChatRequest) -> list[int]:
        """Return the tokens of a chat, up to where the answer begins.

        Raises
        ------
        ApiError
            If the model has no chat template, or its template takes no such chat.
        """
        if self._tokenizer.chat_template is None:
            raise ApiError(400, "this model has no chat template: send a prompt to /v1/completions", param="messages")
        chat = [_as_template_wants(message) for message in request.messages]
        wants_tools = request.tools and request.tool_choice != "none"
        tools: list[Any] | None = [tool.model_dump() for tool in request.tools or ()] if wants_tools else None
        tokens = self._encode(chat, tools)
        if tools and tokens == self._encode(chat, None):
            raise ApiError(400, "tools: the chat template of this model shows it no tools", param="tools")
        return self._checked(tokens, "messages")

    def _encode(self, chat: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                chat, tools=tools, add_generation_prompt=True, return_dict=True, **self._options
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            text = f"messages: the chat template of this model does not take them: {error}"
            raise ApiError(400, text, param="messages") from error
        return list(encoded["input_ids"])

    def of_completion(self, request: CompletionRequest) -> list[list[int]]:
        """Return the tokens of each prompt.

        Raises
        ------
        ApiError
            If there is none, or one of them is empty or no prompt of this model.
        """
        given = request.prompt
        prompts: Sequence[str | list[int]]
        if isinstance(given, str):
            prompts = [given]
        elif given and isinstance(given[0], int):
            prompts = [[token for token in given if isinstance(token, int)]]
        else:
            prompts = [prompt for prompt in given if not isinstance(prompt, int)]
        if not prompts:
            raise ApiError(400, "prompt is an empty list: send at least one prompt", param="prompt")
        return [self._checked(self._tokens_of(prompt), "prompt") for prompt in prompts]

    def _tokens_of(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer(prompt)["input_ids"]
        strange = [token for token in prompt if not 0 <= token < self._vocab_size]
        if strange:
            text = f"prompt: there is no token {strange[0]}: this model has {self._vocab_size}"
            raise ApiError(400, text, param="prompt")
        return prompt

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        """Refuse a prompt that is empty, or leaves no room for an answer."""
        if not tokens:
            raise ApiError(400, f"{param}: the prompt has no tokens: send at least one", param=param)
        if self._most is not None and len(tokens) > self._most:
            text = f"{param}: the prompt has {len(tokens)} tokens, and this server takes {self._most}: shorten it"
            raise ApiError(400, text, code="context_length_exceeded", param=param)
        return tokens

    def room(self, length: int) -> int | None:
        """Tokens that the model's context has left beside so many; None: there is no limit."""
        return None if self._context_length is None else self._context_length - length


def _as_template_wants(message: Message) -> dict[str, Any]:
    """A message as chat templates take it: its content is one text, and arguments of calls are no text."""
    found = message.model_dump(include={"role", "content", "name", "tool_call_id"}, exclude_none=True)
    if found["role"] == "developer":  # OpenAI's newer name of it, which templates do not know.
        found["role"] = "system"
    if isinstance(message.content, list):
        found["content"] = "".join(part.text for part in message.content)
    found.setdefault("content", "")
    if message.tool_calls:
        found["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        for call in found["tool_calls"]:
            call["function"]["arguments"] = _parsed(call["function"]["arguments"])
    return found


def _parsed(arguments: str) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError as error:
        raise ApiError(400, f"messages: the arguments of a tool call are no JSON: {error}", param="messages") from error
    if not isinstance(parsed, dict):
        raise ApiError(400, "messages: the arguments of a tool call must be a JSON object", param="messages")
    return parsed
