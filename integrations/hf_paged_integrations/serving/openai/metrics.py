"""Metrics: what ``/metrics`` says, for Prometheus."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hf_paged.metrics import stats
from hf_paged_integrations.serving.async_engine import AsyncEngine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server.

    Parameters
    ----------
    engine : AsyncEngine

    Attributes
    ----------
    registry : CollectorRegistry
    requests : Counter
        By ``status``, which is that of the response.
    failures : Counter
        Requests that had begun, and were not answered to their end. The response of a stream has status 200 all the
        same.
    prompt_tokens, generation_tokens : Counter
    """

    def __init__(self, engine: AsyncEngine):
        self.registry = CollectorRegistry()
        self.requests = Counter("hf_paged_requests", "Requests answered.", ["status"], registry=self.registry)
        self.failures = Counter("hf_paged_failures", "Requests that ended with an error.", registry=self.registry)
        self.prompt_tokens = Counter("hf_paged_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.generation_tokens = Counter("hf_paged_generation_tokens", "Tokens generated.", registry=self.registry)
        self._first = Histogram(
            "hf_paged_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._next = Histogram(
            "hf_paged_time_between_tokens_seconds",
            "From a token of a choice to the next.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine))

    def watch(self, began: float, choices: int) -> "TokenWatch":
        """Return what notes when the tokens of a request come that began then, in seconds of `time.monotonic`."""
        return TokenWatch(self._first, self._next, began, choices)


class TokenWatch:
    """Notes when the tokens of one request come. Made by `Metrics.watch`."""

    def __init__(self, first: Histogram, following: Histogram, began: float, choices: int):
        self._first, self._next, self._began = first, following, began
        self._last: list[float | None] = [None] * choices
        self._has_begun = False

    def token(self, choice: int) -> None:
        """Note a token of a choice."""
        now, last = time.monotonic(), self._last[choice]
        if not self._has_begun:
            self._first.observe(now - self._began)
            self._has_begun = True
        if last is not None:
            self._next.observe(now - last)
        self._last[choice] = now


class _EngineCollector(Collector):
    """Reads the queue and the pool when it is asked."""

    def __init__(self, engine: AsyncEngine):
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        return iter(())  # Else it would be asked once, when it is registered.

    def collect(self) -> Iterator[Metric]:
        engine, now = self._engine, stats(self._engine.model)
        yield GaugeMetricFamily("hf_paged_requests_running", "Requests that run.", engine.num_running)
        yield GaugeMetricFamily("hf_paged_requests_waiting", "Requests that wait.", engine.num_waiting)
        blocks = GaugeMetricFamily("hf_paged_pool_blocks", "Blocks of the pool.", labels=["state"])
        for state in ("used", "cached", "free"):
            blocks.add_metric([state], getattr(now, f"{state}_blocks"))
        yield blocks
        share = now.used_blocks / now.total_blocks if now.total_blocks else 0.0
        yield GaugeMetricFamily("hf_paged_pool_usage_ratio", "Share of the blocks that rows use.", share)
        for name, text, value in (
            ("prefix_lookups", "Rows that looked into the prefix cache.", now.prefix_lookups),
            ("prefix_hit_tokens", "Tokens found in the prefix cache.", now.prefix_hit_tokens),
            ("evictions", "Cached blocks given up.", now.evictions),
            ("preemptions", "Times that a row gave its blocks up.", now.preemptions),
            ("packed_calls", "Calls that ran packed.", now.packed_calls),
            ("fallbacks", "Calls that ran transformers' own loop.", sum(now.fallbacks.values())),
        ):
            yield CounterMetricFamily(f"hf_paged_{name}", text, value)
