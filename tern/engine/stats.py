"""What an engine tells of itself: queues, cache and counters. Knows numbers only."""

from __future__ import annotations

from dataclasses import dataclass

from tern.engine.request import FinishReason


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of one engine; everything from `prefix_query_tokens` on only grows, save `last_step_seconds`.

    `blocks_cached` hold content that a prompt can reuse, free or owned. `prefix_hit_tokens` of `prefix_query_tokens`
    prompt tokens were found in the cache. `prompt_tokens` counts requests as they start, `generated_tokens` sampled and
    forced ones, `computed_tokens` all that went through the model, after a preemption once more and drafts too.
    `drafted_tokens` were verified by steps, `accepted_tokens` of them were right. `finished` counts endings by reason.
    `last_step_seconds` is how long the newest step computed. `disk_hit_tokens` of the `prefix_hit_tokens` were read
    from `kv_cache_dir`; `disk_bytes_read` and `disk_bytes_written` passed in and out. `grammar_seconds` went into
    the masks and the states of grammars.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: int
    computed_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    steps: int
    failed_steps: int
    finished: dict[FinishReason, int]
    last_step_seconds: float
    disk_hit_tokens: int = 0
    disk_bytes_read: int = 0
    disk_bytes_written: int = 0
    grammar_seconds: float = 0.0

    @property
    def cancelled(self) -> int:
        """Requests taken back by their callers."""
        return self.finished[FinishReason.CANCELLED]
