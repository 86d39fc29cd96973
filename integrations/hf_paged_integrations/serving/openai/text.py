"""AnswerText: the text of one answer as its tokens come, up to a stop text."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class AnswerText:
    """Turns tokens into text that is safe to send: whole characters, and nothing that may begin a stop text.

    Parameters
    ----------
    tokenizer : Tokenizer
    stops : sequence of str
        The first that comes ends the text, which does not hold it.

    Attributes
    ----------
    is_stopped : bool
        A stop text has come.
    length : int
        Characters so far, those that are held back included; of a stopped text those before the stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream(skip_special_tokens=True)
        self._undecoded: list[int] = []  # Tokens since the last whole character.
        self._held = ""
        self.is_stopped = False
        self.length = 0

    def add(self, token: int) -> str:
        """Take a token; return what can be sent now."""
        self._undecoded.append(token)
        text = self._stream.step(self._tokenizer, token)
        if not text:
            return ""
        self._undecoded.clear()
        return self._release(text)

    def end(self) -> str:
        """Return what was held back. A character that was never completed is a replacement character."""
        if self.is_stopped:
            return ""
        rest = self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        sent = self._release(rest)
        held, self._held = self._held, ""
        return sent + ("" if self.is_stopped else held)

    def _release(self, text: str) -> str:
        before = self.length - len(self._held)  # Characters that were sent.
        self._held += text
        places = [place for place in map(self._held.find, self._stops) if place >= 0]
        if places:
            sent, self._held, self.is_stopped = self._held[: min(places)], "", True
            self.length = before + len(sent)
            return sent
        self.length += len(text)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        sent, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sent


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop text may begin."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
