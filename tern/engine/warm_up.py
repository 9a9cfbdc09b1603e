"""Steps computed before the first request, so that a GPU's kernels are compiled by then. Knows numbers of rows.

A kernel takes seconds to compile, and there is one for each kind of tile that a number of rows asks for. Every kind
serves some number and all up to twice as many, so powers of two meet them all.
"""

from __future__ import annotations

import numpy as np
import torch

from tern import ops
from tern.checkpoint.progress import item_progress
from tern.engine.device import current
from tern.engine.options import EngineOptions
from tern.engine.runner import SCORED_ROWS, Runner
from tern.engine.trial_steps import trial_step

MANY = 32
"""A chunk that attention computes by other kernels than those of a few queries, which may stand beside it."""

SPLIT_TOKENS = 256
"""The most tokens of a step where the processor has the experts, over which it takes long: what it leaves to the GPU
meets in larger steps no kinds but those of the largest, which has been computed when memory was measured."""


def warm_up_steps(max_num_seqs: int, max_num_batched_tokens: int, max_length: int) -> list[list[int]]:
    """Steps by the lengths of their prompts: powers of two of tokens to the most, and a few beside many."""
    steps = []
    for size in powers_of_two(max_num_batched_tokens):
        whole, rest = divmod(size, max_length)
        steps.append([max_length] * whole + [rest] * (rest > 0))
    many = min(MANY, max_length)
    steps += [[many, few] for few in (1, 2, 4, 8) if few < many]
    return [step for step in steps if len(step) <= max_num_seqs and sum(step) <= max_num_batched_tokens]


def powers_of_two(most: int) -> list[int]:
    """From 1 on, and `most` as the last."""
    return [2**power for power in range((most - 1).bit_length())] + [most]


@torch.inference_mode()
def warm_up(runner: Runner, options: EngineOptions, max_model_len: int, *, predicts: bool, progress: bool) -> None:
    """Compute steps in the cache's first blocks, which no sequence has yet; with `predicts` the predictor follows."""
    model = runner.model
    vocab = model.config.vocab_size
    most = min(options.max_num_batched_tokens, SPLIT_TOKENS) if model.is_split else options.max_num_batched_tokens
    steps = warm_up_steps(options.max_num_seqs, most, max_model_len - 1)
    with current(model.device), item_progress("Kernels", len(steps), enabled=progress) as advance:
        for lengths in steps:
            chunks, _ = trial_step(
                lengths,
                vocab_size=vocab,
                block_size=options.block_size,
                max_model_len=max_model_len,
                own_blocks=False,
            )
            runner.run(chunks, lambda _: predicts)
            advance(1)
        for rows in powers_of_two(SCORED_ROWS):  # whose next tokens are wanted: of a step any number
            logits = model.logits(torch.zeros(rows, model.config.hidden_size, dtype=model.dtype, device=model.device))
        ops.keep_allowed(logits, [0], np.zeros((1, -(-vocab // 32)), np.uint32))
