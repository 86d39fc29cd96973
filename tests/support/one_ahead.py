"""Steps that run one ahead on the CPU, which is no asynchronous device: its forwards end before the next is planned."""

from dataclasses import dataclass, field

from hf_paged.execution.model_runner import ModelRunner
from hf_paged.execution.pending_tokens import PendingTokens


@dataclass
class Seen:
    """The events of pending tokens.

    Attributes
    ----------
    events : list of (str, int)
        "choose" with the tokens that a step left pending or gave at once, "run" with the chunks that ran ahead in a
        step, "read" with the tokens that were waited for, in their order.
    """

    events: list[tuple[str, int]] = field(default_factory=list)

    @property
    def num_ahead(self) -> int:
        """Chunks that ran ahead."""
        return sum(count for what, count in self.events if what == "run")


def force(monkeypatch) -> Seen:
    """Let engines run one ahead until the test ends."""
    seen, init, read, put_into = Seen(), PendingTokens.__init__, PendingTokens.read, PendingTokens.put_into

    def watched_init(self, tokens, *arguments):
        init(self, tokens, *arguments)
        seen.events.append(("choose", len(tokens)))

    def watched_read(self):
        tokens = read(self)
        seen.events.append(("read", len(tokens)))
        return tokens

    def watched_put(self, input_ids, chunks):
        put_into(self, input_ids, chunks)
        seen.events.append(("run", sum(chunk.is_ahead for chunk in chunks)))

    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
    monkeypatch.setattr(PendingTokens, "__init__", watched_init)
    monkeypatch.setattr(PendingTokens, "read", watched_read)
    monkeypatch.setattr(PendingTokens, "put_into", watched_put)
    return seen
