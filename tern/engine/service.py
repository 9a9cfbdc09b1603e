"""An engine on a thread of its own: the door for servers. Knows threads and the engine's life; computes nothing.

Callers on any thread leave requests and cancellations; the engine's thread takes them up between two steps, so the
engine itself needs no locks and a cancelled request stops within one step. Without work the thread sleeps until it is
woken. Sinks are called without a lock held, so they may take locks of their own.

    starting --start()--> ready --drain()--> draining --stop()--> stopped
                             \\------ engine broken ------> failed
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from enum import StrEnum

from tern.engine.engine import Engine
from tern.engine.request import FinishReason, Request
from tern.engine.sequence import Sequence, SequenceStatus
from tern.engine.stats import EngineFacts, EngineStats, PromptProgress
from tern.errors import EngineFailedError, EngineUnavailableError, InvalidRequestError

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 3
IDLE_BEAT_SECONDS = 1.0

FAILED = "The engine has failed and serves no more requests; its log says why. Restart it."
STOPPED = "The engine was stopped before the request was done."


class ServiceState(StrEnum):
    """The life of a service."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class EngineService:
    """Runs one engine; every method may be called from any thread.

    `submit` checks a request at once, on the caller's thread, against what never changes; the sinks of accepted
    requests are called on the engine's thread.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()  # guards what follows
        self._submitted: dict[str, Sequence] = {}  # not yet with the engine
        self._cancelled: list[Sequence] = []
        self._idle = True
        self._state = ServiceState.STARTING
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="tern-engine", daemon=True)

    @property
    def engine(self) -> Engine:
        """The engine that is served; only its unchanging properties may be read from other threads."""
        return self._engine

    @property
    def state(self) -> ServiceState:
        """starting, ready, draining, failed or stopped."""
        return self._state

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return self._engine.max_model_len

    @property
    def capacity(self) -> int | None:
        """Most requests, running and waiting, that are taken at once; None has no limit."""
        options = self._engine.options
        return None if options.max_queue is None else options.max_num_seqs + options.max_queue

    @property
    def token_capacity(self) -> int | None:
        """Most prompt tokens that may wait at once, if they are several prompts'; None has no limit."""
        return self._engine.options.max_queue_tokens

    def start(self) -> None:
        """Begin to serve."""
        with self._changed:
            if self._state is not ServiceState.STARTING:
                raise RuntimeError(f"the service is {self._state}: it can be started once")
            self._state = ServiceState.READY
            self._beat = time.monotonic()
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises `InvalidRequestError`, `ContextLengthError`, `QueueFullError` or `EngineUnavailableError`; its sink is
        not called then.
        """
        sequence = self._engine.prepare(request)  # hashes the prompt too, off the engine's thread
        with self._changed:
            if self._state is not ServiceState.READY:
                raise EngineUnavailableError(f"The engine is {self._state} and takes no new requests: try again later.")
            if self._is_open(request.request_id):
                raise InvalidRequestError(
                    f"A request {request.request_id!r} is already being served: choose another id.", param="request_id"
                )
            self._check_queue(sequence)
            self._submitted[request.request_id] = sequence
            self._changed.notify_all()

    def cancel(self, request_id: str) -> bool:
        """Take a request back; its work stops within one step. False if it is not known (any more)."""
        with self._changed:
            sequence = self._submitted.get(request_id) or self._engine.sequences.get(request_id)
            if sequence is None:
                return False
            self._cancelled.append(sequence)
            self._changed.notify_all()
            return True

    def stats(self) -> EngineStats:
        """The engine's counters, at most one step old."""
        return self._engine.stats()

    def facts(self) -> EngineFacts:
        """What stays the same while the engine lives."""
        engine = self._engine
        return EngineFacts(
            dtype=str(engine.dtype).removeprefix("torch."),
            quantization=engine.runner.model.quantization,
            kv_cache_dtype=str(engine.runner.kv.keys.dtype).removeprefix("torch."),
            device=str(engine.device),
            max_num_seqs=engine.options.max_num_seqs,
            max_num_batched_tokens=engine.options.max_num_batched_tokens,
            block_size=engine.options.block_size,
            num_blocks=engine.pool.num_blocks,
            prefix_caching=engine.pool.caching,
        )

    def progress(self, request_id: str) -> PromptProgress | None:
        """How far a request's prompt has been read, at most one step ago; None once it has been, or if unknown."""
        sequence = self._engine.sequences.get(request_id)
        if sequence is None or sequence.num_generated_tokens:
            return None
        read, total = sequence.num_computed_tokens, sequence.num_prompt_tokens
        waiting = sequence.status is SequenceStatus.WAITING
        left = None if waiting else self._engine.admission.reading_seconds(total - read)
        return PromptProgress(read, total, waiting, left)

    def heartbeat_age(self) -> float:
        """Seconds since the engine's thread last began a step, or woke for nothing: large when it hangs or is dead."""
        return time.monotonic() - self._beat

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait until the open ones are done; False if `timeout` seconds did not suffice."""
        with self._changed:
            if self._state is ServiceState.READY:
                self._state = ServiceState.DRAINING
            return self._changed.wait_for(lambda: self._idle and not self._submitted, timeout)

    def stop(self) -> None:
        """End the thread after its present step; requests still open are finished as cancelled."""
        with self._changed:
            started = self._thread.ident is not None
            if self._state is not ServiceState.FAILED:
                self._state = ServiceState.STOPPED
            self._changed.notify_all()
        if started and self._thread is not threading.current_thread():
            self._thread.join()

    def _is_open(self, request_id: str) -> bool:
        return request_id in self._submitted or request_id in self._engine.sequences

    def _check_queue(self, sequence: Sequence) -> None:
        submitted = sum(other.num_queue_tokens for other in self._submitted.values())
        self._engine.admission.check(
            len(self._submitted) + len(self._engine.sequences),
            submitted + self._engine.scheduler.waiting_tokens,
            sequence.num_queue_tokens,
        )

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._engine.end_all(FinishReason.CANCELLED, STOPPED)
        except BaseException as error:  # whatever it is: nobody else would notice that the thread is gone
            logger.exception("The engine has failed")
            self._fail(str(error) if isinstance(error, EngineFailedError) else FAILED)
        finally:
            with self._changed:
                self._idle = True
                self._changed.notify_all()
            self._engine.close()

    def _fail(self, message: str) -> None:
        """Take no more requests, and end all there are with that message."""
        with self._changed:
            self._state = ServiceState.FAILED
            submitted, self._submitted = list(self._submitted.values()), {}
        for sequence in submitted:
            with suppress(Exception):  # the queues may be what is broken; known to the engine it ends all the same
                self._engine.enqueue(sequence)
        self._engine.end_all(FinishReason.ERROR, message)

    def _turn(self) -> bool:
        """Take up what callers left, then do one step, or sleep until there is one to do; False to end the thread."""
        with self._changed:
            self._beat = time.monotonic()
            self._take_submitted()
            cancelled, self._cancelled = self._cancelled, []
            if self._state is ServiceState.STOPPED:
                return False
            self._idle = not self._engine.has_work
            if self._idle:
                self._rest()
                return True
        for sequence in cancelled:
            if self._engine.sequences.get(sequence.request_id) is sequence:  # else it ended, and its id may be reused
                self._engine.cancel(sequence.request_id)
        self._engine.step()
        if self._engine.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            raise RuntimeError(f"{self._engine.consecutive_failures} steps in a row failed")
        return True

    def _take_submitted(self) -> None:
        for sequence in self._submitted.values():
            self._engine.enqueue(sequence)
        self._submitted.clear()

    def _rest(self) -> None:
        """Sleep until something changes or the next beat is due."""
        if self._engine.options.check_integrity_when_idle:
            self._engine.check_integrity()
        self._changed.notify_all()  # to those who wait for the drain
        self._changed.wait(IDLE_BEAT_SECONDS)
