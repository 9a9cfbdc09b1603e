"""The engine's thread: submission from anywhere, sleep, cancellation, drain, failure, end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine_fakes import HashModel, Recorder, make_engine, make_request

from tern.engine import CONTINUE, EngineService, Finish, FinishReason, GeneratedToken, PromptProgress, Steering
from tern.engine.service import FAILED, IDLE_BEAT_SECONDS, STOPPED
from tern.errors import ContextLengthError, EngineUnavailableError, InvalidRequestError, QueueFullError

PATIENCE = 60.0  # seconds; never reached unless something hangs


class Waiter(Recorder):
    """A sink that other threads can wait for; `gate` holds the engine's thread inside `push`."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        super().__init__()
        self.gate = gate
        self.started = threading.Event()
        self.done = threading.Event()

    def push(self, token: GeneratedToken) -> Steering:
        super().push(token)
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE)
        return CONTINUE

    def finish(self, finish: Finish) -> None:
        super().finish(finish)
        self.done.set()

    def result(self) -> Finish:
        assert self.done.wait(PATIENCE), "the request never ended"
        return self.end


@pytest.fixture
def model() -> HashModel:
    return HashModel()


@pytest.fixture
def service(model: HashModel) -> Iterator[EngineService]:
    made = EngineService(make_engine(model, max_num_seqs=2, max_queue=2, check_integrity_when_idle=True))
    made.start()
    yield made
    made.stop()
    made.engine.check_integrity()
    assert not made.engine.has_work


def submit(service: EngineService, name: str, *, gate: threading.Event | None = None, **fields: Any) -> Waiter:
    sink = Waiter(gate)
    service.submit(make_request(name, fields.pop("prompt", [5, 6, 7]), sink=sink, ignore_eos=True, **fields))
    return sink


def test_requests_from_many_threads_are_all_answered() -> None:
    service = EngineService(make_engine(max_queue=None))
    service.start()
    sinks: list[Waiter] = []

    def client(number: int) -> None:
        for turn in range(5):
            sinks.append(submit(service, f"{number} {turn}", prompt=[5 + number, 6, 7 + turn], max_tokens=4))
            if turn == 3:
                service.cancel(f"{number} {turn}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    reasons = [sink.result().reason for sink in sinks]
    assert len(reasons) == 30
    assert set(reasons) <= {FinishReason.LENGTH, FinishReason.CANCELLED}
    assert reasons.count(FinishReason.LENGTH) >= 24
    assert service.drain(PATIENCE)
    service.stop()
    service.engine.check_integrity()


def test_a_wrong_request_raises_at_once_and_is_not_queued(service: EngineService) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        submit(service, "empty", prompt=[])
    with pytest.raises(ContextLengthError):
        submit(service, "long", prompt=[5] * 90, max_tokens=20)
    assert not service.engine.has_work
    assert submit(service, "good").result().reason is FinishReason.LENGTH


def test_queue_and_ids_are_checked_while_the_engine_is_busy(service: EngineService) -> None:
    gate = threading.Event()
    first = submit(service, "first", gate=gate)
    assert first.started.wait(PATIENCE)
    with pytest.raises(InvalidRequestError, match="'first' is already being served"):
        submit(service, "first")
    others = [submit(service, name) for name in ("a", "b", "c")]
    with pytest.raises(InvalidRequestError, match="'b' is already being served"):
        submit(service, "b")
    with pytest.raises(QueueFullError, match="max_queue is 2"):
        submit(service, "d")
    gate.set()
    assert [sink.result().reason for sink in (first, *others)] == [FinishReason.LENGTH] * 4


@pytest.mark.parametrize("target", ["running", "queued", "submitted just now"])
def test_cancelling_ends_a_request_within_one_step(service: EngineService, target: str) -> None:
    gate = threading.Event()
    running = submit(service, "running", gate=gate, max_tokens=50)
    assert running.started.wait(PATIENCE)
    sinks = {"running": running, "queued": submit(service, "queued"), "other": submit(service, "other")}
    sinks["submitted just now"] = submit(service, "submitted just now")
    assert service.cancel(target)
    gate.set()
    assert sinks[target].result().reason is FinishReason.CANCELLED
    if target == "running":
        assert len(running.ids) == 1
        assert service.stats().generated_tokens >= 1
    else:
        assert sinks[target].ids == []
        service.cancel("running")
    assert not service.cancel(target)
    assert not service.cancel("never seen")


def test_a_cancellation_that_comes_too_late_spares_the_next_request_of_that_id(service: EngineService) -> None:
    again = Waiter()

    class LastToken(Waiter):
        """Is cancelled within its last step, and sends a request of the same id as soon as it has ended."""

        def push(self, token: GeneratedToken) -> Steering:
            assert service.cancel("same")
            return super().push(token)

        def finish(self, finish: Finish) -> None:
            super().finish(finish)
            service.submit(make_request("same", [8, 9], sink=again, ignore_eos=True))

    service.submit(make_request("same", [5, 6, 7], sink=LastToken(), max_tokens=1, ignore_eos=True))
    assert again.result().reason is FinishReason.LENGTH


def test_an_idle_engine_sleeps_and_its_heart_beats(service: EngineService, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps until it is woken or a beat is due, and then gives a sign of life."""
    slept: list[float | None] = []
    beats = threading.Semaphore(0)

    def wait(timeout: float | None = None) -> bool:
        slept.append(timeout)
        beats.release()
        return sleep(0.01)

    sleep = service._changed.wait
    monkeypatch.setattr(service._changed, "wait", wait)
    submit(service, "only").result()
    steps = service.stats().steps
    for _ in range(3):
        before = service._beat
        assert beats.acquire(timeout=PATIENCE)
        while service._beat == before:
            time.sleep(0.001)
    assert set(slept) == {IDLE_BEAT_SECONDS}
    assert 0.1 <= IDLE_BEAT_SECONDS <= 5, "neither a busy loop nor a heart that seems to have stopped"
    assert service.stats().steps == steps
    assert service.state == "ready"


def test_a_hanging_step_shows_in_the_heartbeat(service: EngineService) -> None:
    gate = threading.Event()
    sink = submit(service, "hanging", gate=gate)
    assert sink.started.wait(PATIENCE)
    ages = [service.heartbeat_age()]
    for _ in range(3):
        threading.Event().wait(0.02)
        ages.append(service.heartbeat_age())
    assert ages == sorted(ages)
    assert ages[-1] >= 0.06
    gate.set()
    sink.result()


def test_draining_refuses_the_new_and_finishes_the_old(service: EngineService) -> None:
    gate = threading.Event()
    running, queued = submit(service, "running", gate=gate), submit(service, "queued")
    assert running.started.wait(PATIENCE)
    assert not service.drain(0.01)
    assert service.state == "draining"
    with pytest.raises(EngineUnavailableError, match="draining"):
        submit(service, "late")
    gate.set()
    assert service.drain(PATIENCE)
    assert (running.end.reason, queued.end.reason) == (FinishReason.LENGTH, FinishReason.LENGTH)


def test_stopping_answers_what_is_open(service: EngineService) -> None:
    gate = threading.Event()
    running, queued = submit(service, "running", gate=gate), submit(service, "queued")
    assert running.started.wait(PATIENCE)
    stopper = threading.Thread(target=service.stop)
    stopper.start()
    gate.set()
    stopper.join(PATIENCE)
    for sink in (running, queued):
        assert (sink.result().reason, sink.end.message) == (FinishReason.CANCELLED, STOPPED)
    assert service.state == "stopped"
    with pytest.raises(EngineUnavailableError, match="stopped"):
        submit(service, "late")
    with pytest.raises(RuntimeError, match="once"):
        service.start()
    service.stop()


def test_before_the_start_nothing_is_accepted() -> None:
    service = EngineService(make_engine())
    assert service.state == "starting"
    with pytest.raises(EngineUnavailableError, match="starting"):
        submit(service, "early")
    service.stop()
    assert service.state == "stopped"


def test_single_failures_are_survived(service: EngineService, model: HashModel) -> None:
    for number in range(5):
        model.fail_next = 2 if number == 3 else 1
        for _ in range(model.fail_next):
            assert submit(service, "bad").result().reason is FinishReason.ERROR
        assert submit(service, "good").result().reason is FinishReason.LENGTH
    assert service.state == "ready"


def test_repeated_failures_end_the_service_and_every_request(service: EngineService, model: HashModel) -> None:
    gate = threading.Event()
    first = submit(service, "first", gate=gate)
    assert first.started.wait(PATIENCE)
    others = [submit(service, name) for name in ("a", "b", "c")]
    model.fail_next = 100
    gate.set()
    for sink in (first, *others):
        assert sink.result().reason is FinishReason.ERROR
    last = None
    for _ in range(3):
        try:
            last = submit(service, "one more")
        except EngineUnavailableError:
            break
        assert last.result().reason is FinishReason.ERROR
    service._thread.join(PATIENCE)
    assert service.state == "failed"
    with pytest.raises(EngineUnavailableError, match="failed"):
        submit(service, "late")
    assert service.drain(PATIENCE)


def test_broken_books_end_the_service(service: EngineService) -> None:
    gate = threading.Event()
    sink = submit(service, "victim", gate=gate)
    assert sink.started.wait(PATIENCE)
    queued = submit(service, "queued")
    service.engine.scheduler.schedule = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    gate.set()
    for ended in (sink, queued):
        assert (ended.result().reason, ended.end.message) == (FinishReason.ERROR, FAILED)
    service._thread.join(PATIENCE)
    assert service.state == "failed"


def test_every_request_is_answered_even_if_the_queues_have_lost_some(service: EngineService) -> None:
    gate = threading.Event()
    sink = submit(service, "lost", gate=gate)
    assert sink.started.wait(PATIENCE)
    queued = [submit(service, name) for name in ("b", "c")]
    service.engine.scheduler.running.clear()
    gate.set()
    assert all(ended.result() for ended in queued)
    assert (sink.result().reason, sink.end.message) == (FinishReason.ERROR, FAILED)
    assert service.drain(PATIENCE)
    assert service.state == "failed"


def test_a_prompt_s_progress() -> None:
    engine = make_engine(HashModel(), max_num_seqs=1, max_num_batched_tokens=8)
    service = EngineService(engine)  # whose thread stands still, so that steps are taken here
    for name in ("first", "second"):
        engine.add(make_request(name, [5] * 20, max_tokens=2))
    assert service.progress("first") == PromptProgress(0, 20, waiting=True, seconds_left=None)
    engine.step()
    found = service.progress("first")
    assert found is not None
    assert (found.read_tokens, found.prompt_tokens, found.waiting) == (8, 20, False)
    assert found.seconds_left == engine.admission.reading_seconds(12)
    second = service.progress("second")
    assert second is not None
    assert second.waiting
    while engine.sequences["first"].num_generated_tokens == 0:
        engine.step()
    assert service.progress("first") is None
    assert service.progress("unknown") is None
