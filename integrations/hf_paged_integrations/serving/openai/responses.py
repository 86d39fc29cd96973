"""Answers as OpenAI's interface states them, whole or in chunks."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_paged_integrations.serving.openai.answer import Piece
from hf_paged_integrations.serving.openai.constrained import Grammars
from hf_paged_integrations.serving.openai.processors import TokenLogprobs

Json = dict[str, Any]


def dumped(value: Json) -> str:
    """JSON as it is sent: in ASCII, for clients that end a line at every character that Unicode ends it at."""
    return json.dumps(value, separators=(",", ":"))


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """The tokens of a request: those of a prompt count once, whatever its ``n``."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Form(ABC):
    """How the answer to one request is stated.

    Parameters
    ----------
    model_name : str
    tokenizer : PreTrainedTokenizerFast
    grammars : Grammars
        Knows the bytes of tokens.
    has_logprobs : bool
    includes_usage : bool
        Chunks have a place for the usage, which the last one fills.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(
        self,
        model_name: str,
        tokenizer: PreTrainedTokenizerFast,
        grammars: Grammars,
        has_logprobs: bool,
        includes_usage: bool = False,
    ):
        self._tokenizer, self._grammars = tokenizer, grammars
        self._has_logprobs, self._includes_usage = has_logprobs, includes_usage
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, choices: Sequence[Piece], total: Json) -> Json:
        """The response with all choices, each in one piece."""
        stated = [self._choice(piece) for piece in choices]
        return {**self._head, "object": self.kind, "choices": stated, "usage": total}

    def chunk(self, piece: Piece) -> Iterator[Json]:
        """The chunks that state one piece."""
        for delta in self._deltas(piece):
            yield self._chunk([delta])

    def usage_chunk(self, total: Json) -> Json:
        """The last chunk."""
        return {**self._chunk([]), "usage": total}

    def begin(self, choices: int) -> Iterator[Json]:
        """The chunks before the first piece."""
        return iter(())

    def _chunk(self, choices: list[Json]) -> Json:
        found = {**self._head, "object": self.chunk_kind, "choices": choices}
        return {**found, "usage": None} if self._includes_usage else found

    @abstractmethod
    def _choice(self, piece: Piece) -> Json:
        """A whole choice."""

    @abstractmethod
    def _deltas(self, piece: Piece) -> Iterator[Json]:
        """The part of a chunk that a piece adds to its choice; its end comes last."""

    def _name_of(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


class ChatForm(Form):
    """The answer to a chat."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, choices: int) -> Iterator[Json]:
        for number in range(choices):
            yield self._chunk([self._delta(number, {"role": "assistant", "content": ""})])

    def _choice(self, piece: Piece) -> Json:
        return {
            "index": piece.choice,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _deltas(self, piece: Piece) -> Iterator[Json]:
        if piece.text or piece.logprobs:
            yield {**self._delta(piece.choice, {"content": piece.text}), "logprobs": self._logprobs(piece)}
        if piece.finish_reason is not None:
            yield {**self._delta(piece.choice, {}), "finish_reason": piece.finish_reason}

    @staticmethod
    def _delta(number: int, delta: Json) -> Json:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self._has_logprobs:
            return None
        return {"content": [self._token(note) for _, note in piece.logprobs], "refusal": None}

    def _token(self, note: TokenLogprobs) -> Json:
        top = [self._named(token, logprob) for token, logprob in note.top]
        return {**self._named(note.token, note.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> Json:
        name = self._name_of(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(self._grammars.bytes_of(token))}


class CompletionForm(Form):
    """The answer to a prompt."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, piece: Piece) -> Json:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _deltas(self, piece: Piece) -> Iterator[Json]:
        yield self._choice(piece)

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self._has_logprobs:
            return None
        notes = [note for _, note in piece.logprobs]
        return {
            "tokens": [self._name_of(note.token) for note in notes],
            "token_logprobs": [_finite(note.logprob) for note in notes],
            "top_logprobs": [{self._name_of(token): _finite(value) for token, value in note.top} for note in notes],
            "text_offset": [place for place, _ in piece.logprobs],
        }


def _finite(logprob: float) -> float:
    """A log-probability as JSON can state it; OpenAI's number for a token that cannot be."""
    return max(logprob, -9999.0)
