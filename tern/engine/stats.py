"""What an engine tells of itself: queues, cache and counters, and what it is. Knows numbers and names only."""

from __future__ import annotations

from dataclasses import dataclass

from tern.engine.request import FinishReason

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds by which steps are counted; one more count is for those above."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of one engine; everything from `prefix_query_tokens` on only grows, save `last_step_seconds`.

    `waiting_tokens` are those of prompts that wait to be started. `blocks_cached` hold content that a prompt can reuse,
    free or owned. `prefix_hit_tokens` of `prefix_query_tokens` prompt tokens were found in the cache. `prompt_tokens`
    counts requests as they start, `generated_tokens` sampled and forced ones, `computed_tokens` all that went through
    the model, after a preemption once more and drafts too. `drafted_tokens` were verified by steps, `accepted_tokens`
    of them were right. `finished` counts endings by reason. `last_step_seconds` is how long the newest step computed.
    `disk_hit_tokens` of the `prefix_hit_tokens` were read from `kv_cache_dir`; `disk_bytes_read` and
    `disk_bytes_written` passed in and out. `steps_by_tokens[i]` counts the steps that computed at most `STEP_TOKENS[i]`
    tokens, and more than the bound before. `grammar_seconds` went into the masks and the states of grammars.
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
    steps_by_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKENS) + 1)
    waiting_tokens: int = 0

    @property
    def cancelled(self) -> int:
        """Requests taken back by their callers."""
        return self.finished[FinishReason.CANCELLED]


@dataclass(frozen=True)
class PromptProgress:
    """How far a prompt has been read. `seconds_left` is None while it waits in the queue or speeds are not known."""

    read_tokens: int
    prompt_tokens: int
    waiting: bool
    seconds_left: float | None


@dataclass(frozen=True)
class EngineFacts:
    """What stays the same while an engine lives.

    `dtype` is what the network computes in, `kv_cache_dtype` what the cache keeps; `quantization` is what the
    weights are rounded to ("wint4", "wint8", "fp8", "block_wise_fp8"), None for floats. `num_blocks` blocks of
    `block_size` tokens are the cache.
    """

    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    prefix_caching: bool
