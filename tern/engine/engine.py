"""Requests in, tokens out: the step loop and everything that can happen to a request between two steps.

Knows sequences, the scheduler and the runner; knows no text, no HTTP and nothing of the network inside the model. One
thread at a time may use an `Engine`; `tern.engine.service` puts one on a thread of its own.
"""

from __future__ import annotations

import logging
import time
import traceback
import weakref
from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING

import torch

from tern import ops
from tern.checkpoint import ModelSource, load_model, weights_identity
from tern.engine.admission import Admission
from tern.engine.block_files import open_directory
from tern.engine.block_pool import BlockPool, IntegrityError
from tern.engine.cache_size import (
    cache_dtype,
    check_cache_dtype,
    narrow_cache,
    resolve_max_model_len,
    resolve_num_blocks,
)
from tern.engine.delivery import Delivery
from tern.engine.device import current, free_unused_memory, is_device_lost, is_out_of_memory, resolve_device
from tern.engine.disk_cache import DiskCache
from tern.engine.drafts import Drafter
from tern.engine.fits import does_not_fit, dtype_of
from tern.engine.graphs import capture_for
from tern.engine.memory_profile import memory_for_cache
from tern.engine.options import EngineOptions
from tern.engine.pipeline import Pipeline
from tern.engine.prompt_room import PromptRoom
from tern.engine.request import FinishReason, Request
from tern.engine.request_checks import check_request
from tern.engine.residence import resolve_residence
from tern.engine.runner import Runner, StepResult
from tern.engine.sampling_state import SamplingState
from tern.engine.scheduler import Chunk, Scheduler
from tern.engine.sequence import Sequence
from tern.engine.stats import STEP_TOKENS, EngineStats
from tern.engine.step_failures import DEVICE_LOST, Outcome, compute_what_can_be, explain
from tern.engine.warm_up import warm_up
from tern.errors import EngineFailedError, InvalidRequestError, OptionError

if TYPE_CHECKING:
    from tern.model import ErnieModel

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching of many requests over one model.

    `add` queues a request, each `step` computes one batch and hands its tokens to the requests' sinks, `cancel` takes a
    request back at any moment. Every added request is finished exactly once. `weights_identity` tells the model's
    weights from all others (`tern.checkpoint.weights_identity`); only `kv_cache_dir` needs it. `close` ends what that
    has in the background; it happens by itself when the engine goes, or the process.
    """

    def __init__(
        self,
        model: ErnieModel,
        eos_token_ids: Iterable[int],
        options: EngineOptions | None = None,
        *,
        weights_identity: str | None = None,
        progress: bool = False,
    ) -> None:
        options = options or EngineOptions()
        self.options = options
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = model.config.vocab_size
        self.device, self.dtype = model.device, model.dtype
        self.max_model_len = resolve_max_model_len(options, model.config)
        self.drafter = Drafter(options, predicts=_has_predictor(model, options))
        check_cache_dtype(options.kv_cache_dtype, model.device)
        kv_dtype, narrow = cache_dtype(options.kv_cache_dtype, model.dtype), narrow_cache(model.device)
        attention = _attention(model, options, kv_dtype)
        drafts = {"max_drafts": self.drafter.max_drafts, "predicted_drafts": self.drafter.predicted_drafts}
        memory = memory_for_cache(model, options, kv_dtype, self.max_model_len, **drafts, attention=attention)
        num_blocks = resolve_num_blocks(options, model.config, kv_dtype, memory, self.max_model_len, narrow)
        self.runner = Runner(
            model,
            num_blocks=num_blocks,
            block_size=options.block_size,
            kv_dtype=kv_dtype,
            max_num_seqs=options.max_num_seqs,
            max_model_len=self.max_model_len,
            **drafts,
            capture=capture_for(model.device, enforce_eager=options.enforce_eager or model.is_split),
            attention=attention,
            progress=progress,
        )
        if model.device.type == "cuda":
            predicts = bool(self.drafter.predicted_drafts)
            warm_up(self.runner, options, self.max_model_len, predicts=predicts, progress=progress)
        if self.runner.graphs is not None:
            sizes = (self.runner.graphs.sizes, self.runner.graphs.drafted_sizes)
            logger.info("decode steps of %s rows, and with drafts of %s, replay CUDA graphs", *sizes)
        self.disk_cache = DiskCache.open(options, model, self.runner.kv, weights_identity)
        if self.disk_cache is not None:
            weakref.finalize(self, self.disk_cache.close)
        self.pool = BlockPool(
            num_blocks, options.block_size, caching=options.enable_prefix_caching, store=self.disk_cache
        )
        self.prompt_room: PromptRoom | None = None
        if options.target_step_seconds is not None:
            self.prompt_room = PromptRoom(options.target_step_seconds, options.max_num_batched_tokens)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            drafter=self.drafter,
            prompt_bounds=self.prompt_room,
        )
        ahead = options.async_scheduling if options.async_scheduling is not None else model.device.type == "cuda"
        self.pipeline = Pipeline(self.scheduler, self.runner, self.drafter.follows, ahead=ahead)
        self.admission = Admission(options)
        self.sequences: dict[str, Sequence] = {}  # every request that is not finished
        self.consecutive_failures = 0
        self.delivery = Delivery(self.sequences, self.scheduler, self.admission, self.vocab_size)
        self._computed_tokens = self._steps = self._failed_steps = 0
        self._last_step_seconds = 0.0
        self._steps_by_tokens = [0] * (len(STEP_TOKENS) + 1)

    @classmethod
    def open(cls, source: ModelSource, options: EngineOptions | None = None, *, progress: bool = True) -> Engine:
        """Load a resolved model and build an engine on it.

        Raises `CheckpointError` for a model that cannot be loaded, `OptionError` for options that do not fit it and for
        a device that is not there, too old or too small.
        """
        options = options or EngineOptions()
        resolve_max_model_len(options, source.config)  # what cannot be is known before the weights are read
        if options.kv_cache_dir is not None:
            open_directory(options.kv_cache_dir)
        dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        device = resolve_device(options.device, fp8=options.wants_fp8)
        device, split = resolve_residence(options, source, device)
        check_cache_dtype(options.kv_cache_dtype, device)
        ops.check_attention_backend(options.attention_backend, device)
        with current(device):
            try:
                return cls._load(source, options, device, dtype, split, progress)
            except torch.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # else what was loaded stays, and little seems to be there
                free_unused_memory(device)
                raise does_not_fit(source, options, dtype_of(source, options), device, split) from error

    @classmethod
    def _load(
        cls,
        source: ModelSource,
        options: EngineOptions,
        device: torch.device,
        dtype: torch.dtype | None,
        split: str | None,
        progress: bool,
    ) -> Engine:
        began = time.perf_counter()
        model = load_model(
            source, dtype=dtype, device=device, quantization=options.quantization, split=split, progress=progress
        )
        logger.info("weights and kernels: %.1f s", time.perf_counter() - began)
        identity = weights_identity(source) if options.kv_cache_dir is not None else None
        began = time.perf_counter()
        eos = source.generation.eos_token_ids
        engine = cls(model, eos, options, weights_identity=identity, progress=progress)
        tokens = engine.pool.num_blocks * options.block_size
        logger.info("KV cache for %d tokens: %.1f s", tokens, time.perf_counter() - began)
        return engine

    def close(self) -> None:
        """Write to `kv_cache_dir` what waits for that, within a bound, and nothing more from then on."""
        if self.disk_cache is not None:
            self.disk_cache.close()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.sequences)

    def step(self) -> bool:
        """Compute one batch and deliver its tokens; False when there is nothing to do."""
        chunks = self.pipeline.compose()
        if not chunks:
            return self._idle()
        outcome = self._compute(chunks)
        for part in outcome.computed:
            self.scheduler.commit(part.chunks)
        for part in outcome.computed:
            self.delivery.deliver(part.chunks, part.result)
        self._give_up(outcome.failed)
        return True

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises `InvalidRequestError`, `ContextLengthError` or `QueueFullError`; nothing is queued then.
        """
        sequence = self.prepare(request)
        self.admission.check(len(self.sequences), self.scheduler.waiting_tokens, sequence.num_queue_tokens)
        self.enqueue(sequence)

    def prepare(self, request: Request) -> Sequence:
        """Check a request against this engine and build its sequence; reads nothing that a step changes."""
        params = request.params
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        check_request(request, stop_ids, vocab_size=self.vocab_size, max_model_len=self.max_model_len)
        num_prompt = len(request.prompt_token_ids)
        wanted = self.max_model_len if params.max_tokens is None else num_prompt + params.max_tokens
        sampling = SamplingState(request, stop_ids, self.eos_token_ids - stop_ids)
        sequence = Sequence(request, max_length=wanted, stop_ids=stop_ids, sampling=sampling)
        self.pool.extend_digests(sequence)
        return sequence

    def enqueue(self, sequence: Sequence) -> None:
        """Queue a prepared sequence. Raises `InvalidRequestError` if its id is in use."""
        if sequence.request_id in self.sequences:
            raise InvalidRequestError(
                f"A request {sequence.request_id!r} is already being served: choose another id.", param="request_id"
            )
        self.sequences[sequence.request_id] = sequence
        self.scheduler.add(sequence)

    def cancel(self, request_id: str) -> bool:
        """Take a request back, wherever it stands; False if it is not known (any more)."""
        sequence = self.sequences.get(request_id)
        if sequence is None:
            return False
        self.delivery.finish(sequence, FinishReason.CANCELLED)
        return True

    def end_all(self, reason: FinishReason, message: str | None = None) -> None:
        """Finish every request, because the engine stops: even if its books are wrong, each gets its ending."""
        self.delivery.end_all(reason, message)

    def stats(self) -> EngineStats:
        """A snapshot of queues, cache and counters."""
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            waiting_tokens=self.scheduler.waiting_tokens,
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.num_free_blocks,
            blocks_cached=self.pool.num_cached_blocks,
            prefix_query_tokens=self.scheduler.prompt_tokens if self.pool.caching else 0,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            prompt_tokens=self.scheduler.prompt_tokens,
            computed_tokens=self._computed_tokens,
            generated_tokens=self.delivery.generated_tokens,
            drafted_tokens=self.drafter.drafted_tokens,
            accepted_tokens=self.drafter.accepted_tokens,
            preemptions=self.scheduler.num_preemptions,
            steps=self._steps,
            failed_steps=self._failed_steps,
            finished=dict(self.delivery.finished),
            last_step_seconds=self._last_step_seconds,
            grammar_seconds=self.delivery.grammar_seconds + self.runner.grammar_seconds,
            disk_hit_tokens=self.scheduler.restored_hit_tokens,
            disk_bytes_read=self.disk_cache.bytes_read if self.disk_cache else 0,
            disk_bytes_written=self.disk_cache.bytes_written if self.disk_cache else 0,
            steps_by_tokens=tuple(self._steps_by_tokens),
        )

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if any block or request leaked."""
        self.scheduler.check_integrity()
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        if len(queued) != len(self.sequences) or any(self.sequences.get(s.request_id) is not s for s in queued):
            raise IntegrityError(f"{len(self.sequences)} requests are open but {len(queued)} are queued")

    def _idle(self) -> bool:
        if self.has_work:  # or callers that step while there is work would spin for ever
            raise IntegrityError(f"{len(self.sequences)} requests are open but none can be scheduled")
        return False

    def _compute(self, chunks: Ordered[Chunk]) -> Outcome:
        """Run the chunks, and count how often in a row none of them could be computed."""
        outcome = compute_what_can_be(chunks, self._attempt)
        self._failed_steps += outcome.repeated or bool(outcome.failed)
        self.consecutive_failures = 0 if outcome.computed else self.consecutive_failures + 1
        return outcome

    def _attempt(self, chunks: Ordered[Chunk]) -> StepResult | str:
        """Run the chunks -> what they gave, or the sentence for those whose requests cannot be computed.

        Raises `EngineFailedError` if the device computes nothing more.
        """
        try:
            result = self.pipeline.run(chunks)
        except Exception as error:
            if is_device_lost(error):
                raise EngineFailedError(DEVICE_LOST) from error
            logger.exception("A step of %d sequences failed", len(chunks))
            said, memory_ran_out = explain(error, self.device), is_out_of_memory(error)
        else:
            self._note(chunks, result)
            return result
        if memory_ran_out:  # what the step held is free only here, behind the error's traceback
            free_unused_memory(self.device)
        return said

    def _note(self, chunks: Ordered[Chunk], result: StepResult) -> None:
        """Count a computed step, and learn from it."""
        self._steps += 1
        computed = sum(chunk.num_tokens + len(chunk.drafts) for chunk in chunks)
        self._computed_tokens += computed
        self._steps_by_tokens[bisect_left(STEP_TOKENS, computed)] += 1
        self._last_step_seconds = result.seconds + result.predictor_seconds
        self._learn_speed(chunks, self._last_step_seconds)
        self.drafter.learn(chunks, result.sampled, result.seconds, result.predictor_seconds)

    def _give_up(self, failed: Ordered[tuple[Sequence, str]]) -> None:
        """End the requests that could not be computed; the others lose nothing."""
        for sequence, message in failed:
            self.delivery.finish(sequence, FinishReason.ERROR, message=message)
        if failed:
            self.check_integrity()

    def _learn_speed(self, chunks: Ordered[Chunk], seconds: float) -> None:
        decodes = sum(chunk.is_decode for chunk in chunks)
        prompt_tokens = sum(chunk.num_tokens for chunk in chunks) - decodes
        self.admission.learn(prompt_tokens, seconds)
        if self.prompt_room is not None:
            self.prompt_room.learn(decodes, prompt_tokens, seconds)


def _has_predictor(model: ErnieModel, options: EngineOptions) -> bool:
    """Whether the model can draft by itself. Raises `OptionError` if the options ask for that and it cannot."""
    if model.mtp is None and options.speculation == "mtp":
        raise OptionError("speculation is 'mtp' but the model has no multi-token predictor: choose ngram, auto or off.")
    return model.mtp is not None


def _attention(model: ErnieModel, options: EngineOptions, kv_dtype: torch.dtype) -> ops.AttentionLibrary | None:
    """What attends chunks of prompts in place of Tern's kernels. Raises `OptionError` if it is asked for and cannot."""
    ops.check_attention_backend(options.attention_backend, model.device)
    if not ops.uses_gpu(model.device):
        return None
    work = ops.AttentionWork(
        device=model.device,
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        head_dim=model.config.head_dim,
        dtype=model.dtype,
        cache_dtype=kv_dtype,
        block_size=options.block_size,
    )
    return ops.choose_attention(options.attention_backend, work)
