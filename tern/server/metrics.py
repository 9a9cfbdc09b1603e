"""What Prometheus is told: vLLM's metric names under the prefix `tern:`, in the registry of one server.

Counters that the engine keeps are read from it at every scrape; what only the server sees (times between tokens as they
are delivered, thinking tokens, refused requests) is counted here.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tern.engine import FinishReason
from tern.server.engine_door import EngineDoor
from tern.server.sink import Ending

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_BETWEEN_TOKENS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10)
_REQUEST_BUCKETS = (0.1, 0.3, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

_OUTCOMES = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}
"""`finished_reason` in vLLM's words."""


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: EngineDoor, registry: CollectorRegistry) -> None:
        self.registry = registry
        registry.register(_EngineCollector(engine))
        registry.register(_LeakCollector())
        ProcessCollector(registry=registry)
        self._outcomes = Counter(
            "tern:request_success", "Choices by how they ended.", ["finished_reason"], registry=registry
        )
        for outcome in _OUTCOMES.values():
            self._outcomes.labels(outcome)
        self._refused = Counter("tern:request_refused", "Requests answered with an error.", ["code"], registry=registry)
        self._thinking = Counter("tern:reasoning_tokens", "Generated tokens inside thoughts.", registry=registry)
        self._first_token = Histogram(
            "tern:time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._between_tokens = Histogram(
            "tern:inter_token_latency_seconds",
            "Between two tokens of a choice.",
            buckets=_BETWEEN_TOKENS_BUCKETS,
            registry=registry,
        )
        self._request = Histogram(
            "tern:e2e_request_latency_seconds",
            "From the request to its last token.",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )

    def observe_choice(self, arrived: float) -> ChoiceObserver:
        """An observer for one choice of a request that arrived then, by `time.monotonic()`."""
        return ChoiceObserver(self, arrived)

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(str(status)).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self.registry)


class ChoiceObserver:
    """Times one choice. Used on the engine's thread."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last_token: float | None = None

    def token(self) -> None:
        """A token came."""
        now = time.monotonic()
        if self._last_token is None:
            self._metrics._first_token.observe(now - self._arrived)
        else:
            self._metrics._between_tokens.observe(now - self._last_token)
        self._last_token = now

    def ended(self, ending: Ending) -> None:
        """The choice ended."""
        self._metrics._outcomes.labels(_OUTCOMES[ending.finish.reason]).inc()
        self._metrics._thinking.inc(ending.num_reasoning_tokens)
        self._metrics._request.observe(time.monotonic() - self._arrived)


class _EngineCollector:
    """Reads the engine's own numbers when Prometheus asks."""

    def __init__(self, engine: EngineDoor) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Gauges of now, counters since the start."""
        stats = self._engine.stats()
        used = 1.0 - stats.blocks_free / stats.blocks_total if stats.blocks_total else 0.0
        yield GaugeMetricFamily("tern:num_requests_running", "Choices being computed.", value=stats.running)
        yield GaugeMetricFamily("tern:num_requests_waiting", "Choices in the queue.", value=stats.waiting)
        yield GaugeMetricFamily(
            "tern:num_tokens_waiting", "Tokens of prompts in the queue.", value=stats.waiting_tokens
        )
        yield GaugeMetricFamily("tern:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", value=used)
        counters = (
            ("tern:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("tern:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("tern:disk_cache_hits", "Of these, tokens read from --kv-cache-dir.", stats.disk_hit_tokens),
            ("tern:disk_cache_read_bytes", "Bytes read from --kv-cache-dir.", stats.disk_bytes_read),
            ("tern:disk_cache_written_bytes", "Bytes written to --kv-cache-dir.", stats.disk_bytes_written),
            ("tern:prompt_tokens", "Prompt tokens read.", stats.prompt_tokens),
            ("tern:generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("tern:spec_decode_num_draft_tokens", "Drafted tokens that steps verified.", stats.drafted_tokens),
            ("tern:spec_decode_num_accepted_tokens", "Drafted tokens that were right.", stats.accepted_tokens),
            ("tern:num_preemptions", "Times a sequence lost its blocks.", stats.preemptions),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(name, text, value=value)


class _LeakCollector:
    """What grows when something is not given back, beside memory and file descriptors, which `ProcessCollector` has."""

    def collect(self) -> Iterable[Metric]:
        """Threads, and the tasks of the event loop where it is that which asks."""
        yield GaugeMetricFamily("tern:threads", "Threads of the process.", value=threading.active_count())
        try:
            tasks = asyncio.all_tasks()
        except RuntimeError:  # --metrics-port is served by a thread without a loop
            return
        yield GaugeMetricFamily("tern:asyncio_tasks", "Tasks of the event loop.", value=len(tasks))
