"""Grammars: answers that follow a JSON schema, by the masks of llguidance."""

import json
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_paged_integrations.serving.openai.errors import ApiError
from hf_paged_integrations.serving.openai.processors import PerRow
from hf_paged_integrations.serving.openai.schema import JsonFormat, JsonSchemaFormat, TextFormat

# As `json.dumps` writes. Free whitespace lets a small model write it for ever.
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes the grammars of a model's answers.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    vocab_size : int
        Of the model's logits.
    end_tokens : list of int
        That end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, end_tokens: list[int]):
        # It knows the bytes of each token, too.
        self._tokenizer = from_tokenizer(tokenizer, max(vocab_size, len(tokenizer)), end_tokens or None)

    def of(self, wanted: TextFormat | JsonFormat | JsonSchemaFormat | None) -> "Grammar | None":
        """Compile the grammar of a response format; None if any text will do. It may take a second.

        Raises
        ------
        ApiError
            If the schema is none, or asks for what no grammar can promise.
        """
        if wanted is None or isinstance(wanted, TextFormat):
            return None
        schema = wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else {"type": "object"}
        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_STYLE)
            mistake = LLMatcher.validate_grammar(text, self._tokenizer)
        except (ValueError, RecursionError) as error:
            mistake = str(error)
        matcher = None if mistake else LLMatcher(self._tokenizer, text)
        if matcher is None or matcher.is_error():
            raise _unfollowed(mistake if matcher is None else matcher.get_error())
        return Grammar(matcher)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character."""
        return self._tokenizer.decode_bytes([token])


class Grammar:
    """A compiled grammar, for the rows of one call.

    Parameters
    ----------
    matcher : LLMatcher
        At the beginning of its text.
    """

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def processor(self, prompt_length: int) -> PerRow:
        """Return the processor that leaves each row the tokens that the grammar allows."""
        return PerRow(lambda row: _RowGrammar(self._matcher.deep_copy(), prompt_length))


class _RowGrammar:
    """Follows one row. It is called once for each token, in their order, so that nothing is ever rolled back."""

    def __init__(self, matcher: LLMatcher, prompt_length: int):
        self._matcher, self._seen = matcher, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in input_ids[0, self._seen :].tolist():
            self._matcher.consume_token(token)
        self._seen = input_ids.shape[1]
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _unfollowed(self._matcher.get_error())
        allowed = np.unpackbits(bits, bitorder="little", count=scores.shape[1]).astype(bool)  # [vocab]
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -float("inf"))


def _unfollowed(reason: str) -> ApiError:
    text = f"response_format: the schema cannot be followed: {reason.splitlines()[0]}"
    return ApiError(400, text, code="invalid_schema", param="response_format")
