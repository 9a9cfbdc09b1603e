"""What memory a cache can have beside the weights and the steps. Runs one step on a GPU to find out; keeps nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tern import ops
from tern.engine.cache_size import GpuMemory, free_memory
from tern.engine.device import CONTEXT_BYTES, GpuFacts, current
from tern.engine.graphs import Compute
from tern.engine.options import EngineOptions
from tern.engine.runner import Runner
from tern.engine.scheduler import Chunk
from tern.engine.trial_steps import trial_step

if TYPE_CHECKING:
    from tern.model import ErnieModel


def memory_for_cache(
    model: ErnieModel,
    options: EngineOptions,
    kv_dtype: torch.dtype,
    max_model_len: int,
    predicted_drafts: int,
    max_drafts: int = 0,
    attention: ops.AttentionLibrary | None = None,
) -> int | GpuMemory:
    """What `resolve_num_blocks` reads: the free bytes of the processor, or the memory of the model's GPU.

    `attention` attends chunks, in what is run here as later.
    """
    layers = model.config.num_hidden_layers + 1 if predicted_drafts else 0  # the predictor's cache has a layer too
    if model.device.type != "cuda":
        free = free_memory(model.device)
        return free - free // layers if layers else free
    with current(model.device):
        step = _step_bytes(model, options, kv_dtype, max_model_len, predicted_drafts, max_drafts, attention)
        torch.cuda.empty_cache()
        facts = GpuFacts.of(model.device)
        others = facts.total - facts.free - torch.cuda.memory_reserved(model.device) - CONTEXT_BYTES
    memory = GpuMemory(facts.total, facts.free, step, max(0, others))
    if layers:
        memory = replace(memory, step=step + memory.room(options.gpu_memory_utilization) // layers)
    return memory


def _step_bytes(
    model: ErnieModel,
    options: EngineOptions,
    kv_dtype: torch.dtype,
    max_model_len: int,
    predicted_drafts: int,
    max_drafts: int,
    attention: ops.AttentionLibrary | None,
) -> int:
    """Bytes that steps take beside weights and cache, at their peak.

    The largest step, and beside it the decode of the most and longest sequences: graphs keep theirs for themselves, and
    a step may be of both kinds.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    chunks, num_blocks = largest_step(options, model.config.vocab_size, max_model_len, max_drafts)
    runner = Runner(
        model,
        num_blocks=num_blocks,
        block_size=options.block_size,
        kv_dtype=kv_dtype,
        max_num_seqs=options.max_num_seqs,
        max_model_len=max_model_len,
        max_drafts=max_drafts,
        predicted_drafts=predicted_drafts,
        capture=_run_once,
        attention=attention,
    )
    standing = torch.cuda.memory_allocated(model.device)
    decode = torch.cuda.max_memory_allocated(model.device) - standing
    torch.cuda.reset_peak_memory_stats(model.device)
    runner.run(chunks, lambda _: bool(predicted_drafts))
    torch.cuda.synchronize(model.device)
    return int(decode + torch.cuda.max_memory_allocated(model.device) - standing)


def _run_once(compute: Compute) -> Compute:
    compute()
    return compute


def largest_step(
    options: EngineOptions, vocab_size: int, max_model_len: int, max_drafts: int = 0
) -> tuple[list[Chunk], int]:
    """A step of `max_num_batched_tokens` random tokens and as many sequences as may run, all of which draw a token.

    With as many drafts as each may have, behind each of which a token is drawn too. Returned with the number of blocks
    that they own.
    """
    count = options.max_num_seqs
    each, longer = divmod(options.max_num_batched_tokens, count)
    lengths = [min(each + (place < longer), max_model_len - 1) for place in range(count)]
    return trial_step(
        lengths,
        vocab_size=vocab_size,
        block_size=options.block_size,
        max_model_len=max_model_len,
        own_blocks=True,
        max_drafts=max_drafts,
    )
