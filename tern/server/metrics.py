"""What Prometheus is told, in the registry of one server.

What means the same as in vLLM has vLLM's whole name, `vllm:` included, and its labels, so that what was built for it
reads it here; everything else is `tern:`. Counters that the engine keeps are read from it at every scrape
(`engine_metrics`); what only the server sees (times between tokens as they are delivered, thinking tokens, requests and
their statuses) is counted here. No label holds anything that a client wrote.
"""

from __future__ import annotations

import asyncio
import platform
import threading
import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from tern import __version__
from tern.engine import Milestones
from tern.server.engine_door import EngineDoor
from tern.server.engine_metrics import LABELS, EngineCollector
from tern.server.request_record import OUTCOMES, RequestRecord
from tern.server.sink import Ending

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_BETWEEN_TOKENS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10)
_REQUEST_BUCKETS = (0.1, 0.3, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 131072)
_CHOICE_BUCKETS = (1, 2, 5, 10, 20, 50, 128)


class Metrics:
    """The metrics of one server; `model` is the name that it serves."""

    def __init__(self, engine: EngineDoor, registry: CollectorRegistry, model: str) -> None:
        self.registry = registry
        self._labels = {"model_name": model, "engine": "0"}
        registry.register(EngineCollector(engine, self._labels))
        registry.register(_LeakCollector())
        ProcessCollector(registry=registry)
        build = {"version": __version__, "python": platform.python_version()}
        Gauge("tern:build_info", "Always 1: what runs here.", [*build], registry=registry).labels(**build).set(1)
        outcomes = Counter(
            "vllm:request_success", "Choices by how they ended.", [*LABELS, "finished_reason"], registry=registry
        )
        self._outcomes = {
            reason: outcomes.labels(**self._labels, finished_reason=word) for reason, word in OUTCOMES.items()
        }
        self._refused = Counter("tern:request_refused", "Requests answered with an error.", ["code"], registry=registry)
        self._thinking = self._counter("tern:reasoning_tokens", "Generated tokens inside thoughts.")
        self._make_http()
        self._make_times()
        self._make_sizes()

    def _make_http(self) -> None:
        self._http = Counter(
            "http_requests",
            "HTTP requests by pattern of the path, method and class of status.",
            ["handler", "method", "status"],
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's headers to the end of its answer.",
            ["handler", "method"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )

    def _make_times(self) -> None:
        first, between, request = _FIRST_TOKEN_BUCKETS, _BETWEEN_TOKENS_BUCKETS, _REQUEST_BUCKETS
        histogram = self._histogram
        self._first_token = histogram("vllm:time_to_first_token_seconds", "From the request to its first token.", first)
        self._between_tokens = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a choice.", between)
        self._each_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between the tokens of a choice.", between
        )
        self._request = histogram("vllm:e2e_request_latency_seconds", "From the request to its last token.", request)
        self._queue = histogram("vllm:request_queue_time_seconds", "Waiting before any of it was computed.", request)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From then to the first token.", request)
        self._decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.", request)
        self._inference = histogram("vllm:request_inference_time_seconds", "Prefill and decode together.", request)

    def _make_sizes(self) -> None:
        tokens, histogram = _TOKEN_BUCKETS, self._histogram
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a choice.", tokens)
        self._computed = histogram(
            "vllm:request_prefill_kv_computed_tokens", "Those of them that no cache had.", tokens
        )
        self._generated = histogram("vllm:request_generation_tokens", "Tokens generated for a choice.", tokens)
        self._thought = histogram("tern:request_reasoning_tokens", "Those of them inside its thought.", tokens)
        self._n = histogram("vllm:request_params_n", "Choices that a request asked for.", _CHOICE_BUCKETS)
        self._max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens of a request that set it.", tokens)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, LABELS, buckets=buckets, registry=self.registry).labels(**self._labels)

    def observe_choice(self, arrived: float, record: RequestRecord | None = None) -> ChoiceObserver:
        """An observer for one choice of a request that arrived then, by `time.monotonic()`, and has this record."""
        return ChoiceObserver(self, arrived, record)

    def asked(self, n: int, max_tokens: int | None) -> None:
        """Note what a request that generates asked for."""
        self._n.observe(n)
        if max_tokens is not None:
            self._max_tokens.observe(max_tokens)

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(str(status)).inc()

    def answered(self, record: RequestRecord) -> None:
        """Count an HTTP request that has ended."""
        handler, status = record.route or "none", f"{record.status // 100}xx" if record.status else "none"
        self._http.labels(handler, record.method, status).inc()
        self._http_seconds.labels(handler, record.method).observe(record.seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self.registry)

    def _ended(self, ending: Ending) -> None:
        finish = ending.finish
        self._outcomes[finish.reason].inc()
        self._thinking.inc(ending.num_reasoning_tokens)
        self._prompt.observe(finish.num_prompt_tokens)
        self._generated.observe(finish.num_generated_tokens)
        self._thought.observe(ending.num_reasoning_tokens)
        if finish.milestones is not None:
            self._spent(finish.milestones, finish.num_generated_tokens)
            if finish.milestones.started is not None:
                self._computed.observe(finish.num_prompt_tokens - finish.num_cached_tokens)

    def _spent(self, times: Milestones, tokens: int) -> None:
        """Where a choice's time went; what it never reached is not counted as no time."""
        self._queue.observe(times.queue_seconds)
        if times.started is not None:
            self._inference.observe(times.ended - times.started)
        if times.prefill_seconds is not None:
            self._prefill.observe(times.prefill_seconds)
        if times.decode_seconds is not None:
            self._decode.observe(times.decode_seconds)
            if tokens > 1:
                self._each_token.observe(times.decode_seconds / (tokens - 1))


class ChoiceObserver:
    """Times one choice, for the metrics and for the record of its request. Used on the engine's thread."""

    def __init__(self, metrics: Metrics, arrived: float, record: RequestRecord | None) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._record = record
        self._last_token: float | None = None

    def token(self) -> None:
        """A token came."""
        now = time.monotonic()
        if self._last_token is None:
            self._metrics._first_token.observe(now - self._arrived)
        else:
            self._metrics._between_tokens.observe(now - self._last_token)
        self._last_token = now
        if self._record is not None:
            self._record.token(now)

    def ended(self, ending: Ending) -> None:
        """The choice ended."""
        self._metrics._ended(ending)
        self._metrics._request.observe(time.monotonic() - self._arrived)
        if self._record is not None:
            self._record.endings.append(ending)


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
