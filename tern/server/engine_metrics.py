"""The engine's own numbers for Prometheus, read when it asks. Knows `EngineStats` and `EngineFacts`; counts nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tern.server.engine_door import EngineDoor

if TYPE_CHECKING:
    from tern.engine import EngineStats

LABELS = ("model_name", "engine")
"""vLLM's labels: the name that is served, and the number of the engine, of which there is one."""


class EngineCollector:
    """Gauges of now and counters since the start, each with the values of `labels`."""

    def __init__(self, engine: EngineDoor, labels: Mapping[str, str]) -> None:
        self._engine = engine
        self._labels = dict(labels)

    def collect(self) -> Iterable[Metric]:
        """All metrics, of one snapshot."""
        stats = self._engine.stats()
        for name, text, value in _gauges(stats, self._engine.heartbeat_age()):
            gauge = GaugeMetricFamily(name, text, labels=[*self._labels])
            gauge.add_metric([*self._labels.values()], value)
            yield gauge
        for name, text, value in _counters(stats):
            counter = CounterMetricFamily(name, text, labels=[*self._labels])
            counter.add_metric([*self._labels.values()], value)
            yield counter
        yield self._steps(stats)
        yield self._cache()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask an engine that may not have started."""
        return ()

    def _steps(self, stats: EngineStats) -> Metric:
        from tern.engine.stats import STEP_TOKENS

        bounds = [*map(str, map(float, STEP_TOKENS)), "+Inf"]
        below = list(zip(bounds, map(float, accumulate(stats.steps_by_tokens)), strict=True))
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=[*self._labels])
        steps.add_metric([*self._labels.values()], below, stats.computed_tokens)
        return steps

    def _cache(self) -> Metric:
        facts = self._engine.facts()
        values = {
            **self._labels,
            "block_size": str(facts.block_size),
            "cache_dtype": facts.kv_cache_dtype,
            "enable_prefix_caching": str(facts.prefix_caching),
            "num_gpu_blocks": str(facts.num_blocks),
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "Always 1: what the KV cache is.", labels=[*values])
        info.add_metric([*values.values()], 1)
        return info


def _gauges(stats: EngineStats, heartbeat_age: float) -> Iterator[tuple[str, str, float]]:
    used = 1.0 - stats.blocks_free / stats.blocks_total if stats.blocks_total else 0.0
    yield "vllm:num_requests_running", "Choices being computed.", stats.running
    yield "vllm:num_requests_waiting", "Choices in the queue.", stats.waiting
    yield "tern:num_tokens_waiting", "Tokens of prompts in the queue.", stats.waiting_tokens
    yield "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used
    yield "tern:engine_heartbeat_age_seconds", "Since the engine's thread last began a step or a rest.", heartbeat_age
    yield "tern:last_step_seconds", "How long the newest step computed.", stats.last_step_seconds


def _counters(stats: EngineStats) -> Iterator[tuple[str, str, float]]:
    yield "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens
    yield "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens
    yield "tern:disk_cache_hits", "Of these, tokens read from --kv-cache-dir.", stats.disk_hit_tokens
    yield "tern:disk_cache_read_bytes", "Bytes read from --kv-cache-dir.", stats.disk_bytes_read
    yield "tern:disk_cache_written_bytes", "Bytes written to --kv-cache-dir.", stats.disk_bytes_written
    yield "vllm:prompt_tokens", "Prompt tokens read.", stats.prompt_tokens
    yield "vllm:generation_tokens", "Tokens generated.", stats.generated_tokens
    yield "vllm:spec_decode_num_draft_tokens", "Drafted tokens that steps verified.", stats.drafted_tokens
    yield "vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were right.", stats.accepted_tokens
    yield "vllm:num_preemptions", "Times a sequence lost its blocks.", stats.preemptions
    yield "tern:grammar_seconds", "Seconds in the masks and states of grammars.", stats.grammar_seconds
    yield "tern:engine_steps", "Steps computed.", stats.steps
    yield "tern:engine_failed_steps", "Steps that failed.", stats.failed_steps
