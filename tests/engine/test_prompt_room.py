"""How many prompt tokens steps compute, on machines that the tests make up, and an engine's answers with that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from engine_fakes import HashModel, Recorder, add, make_engine

from tern.engine import Engine
from tern.engine.prompt_room import ALONE, FIRST_TOKENS, LEAST_TOKENS, PromptRoom


def settle(room: PromptRoom, seconds: Callable[[int], float], decodes: int, steps: int = 20) -> list[float]:
    """The times of steps that compute all that is allowed, on a machine where `tokens` take `seconds(tokens)`."""
    times = []
    for _ in range(steps):
        tokens = room.tokens(decodes)
        times.append(seconds(tokens))
        room.learn(decodes, tokens, times[-1])
    return times


@pytest.mark.parametrize("fixed", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("each", [0.0005, 0.005, 0.02])
def test_steps_come_to_take_the_time_that_they_may(fixed: float, each: float) -> None:
    room = PromptRoom(0.5, 2048)
    times = settle(room, lambda tokens: fixed + each * tokens, decodes=1, steps=40)
    longest = fixed + each * LEAST_TOKENS
    assert times[-1] == pytest.approx(max(0.5, longest), rel=0.05)
    assert max(times[5:]) <= max(0.55, longest)


def test_a_fast_machine_is_not_held_up() -> None:
    room = PromptRoom(0.5, 2048)
    settle(room, lambda tokens: 0.0001 * tokens, decodes=3, steps=6)
    assert room.tokens(3) == 2048
    assert room.tokens(0) == FIRST_TOKENS, "steps without decodes have numbers of their own"


def test_nobody_waits_for_a_step_without_decodes_but_not_for_ever() -> None:
    room = PromptRoom(0.5, 2048)
    times = settle(room, lambda tokens: 0.005 * tokens, decodes=0)
    assert times[-1] == pytest.approx(ALONE * 0.5, rel=0.05)


def test_prompts_get_as_long_as_slow_decodes_beside_them() -> None:
    room = PromptRoom(0.5, 2048)
    for _ in range(5):
        room.learn(8, 0, 0.8)
    times = settle(room, lambda tokens: 0.8 + 0.01 * tokens, decodes=8)
    assert times[-1] == pytest.approx(1.6, rel=0.05)
    times = settle(room, lambda tokens: 0.8 + 0.01 * tokens, decodes=9)
    assert times[-1] == pytest.approx(1.6, rel=0.05), "nine were never alone; eight take no longer"
    times = settle(room, lambda tokens: 0.3 + 0.01 * tokens, decodes=2)
    assert times[-1] == pytest.approx(0.5, rel=0.05), "two may be faster"


def test_the_end_of_a_prompt_says_little() -> None:
    room = PromptRoom(0.5, 2048)
    settle(room, lambda tokens: 0.2 + 0.005 * tokens, decodes=1)
    before = room.tokens(1)
    for _ in range(10):
        room.learn(1, 3, 0.215)
    assert room.tokens(1) == before
    room.learn(1, 30, 0.6)
    assert room.tokens(1) < 30, "but what took too long was too much"


def test_one_slow_step_is_soon_forgotten() -> None:
    room = PromptRoom(0.5, 2048)
    settle(room, lambda tokens: 0.005 * tokens, decodes=1)
    before = room.tokens(1)
    room.learn(1, before, 30.0)
    assert room.tokens(1) >= before // 2
    times = settle(room, lambda tokens: 0.005 * tokens, decodes=1, steps=3)
    assert times[-1] == pytest.approx(0.5, rel=0.05)


def test_a_prompt_advances_on_the_slowest_machine_and_in_the_smallest_budget() -> None:
    room = PromptRoom(0.5, 2048)
    settle(room, lambda _: 100.0, decodes=1)
    settle(room, lambda _: 100.0, decodes=0)
    assert room.tokens(1) == room.tokens(0) == LEAST_TOKENS
    assert PromptRoom(0.5, 3).tokens(1) == 3


class Machine:
    """An engine that is told that its steps took 10 ms for each decode and 2 ms for each prompt token."""

    def __init__(self, engine: Engine) -> None:
        self.times: list[tuple[int, int, float]] = []  # decodes, prompt tokens, seconds
        self._run = engine.runner.run
        engine.runner.run = self.run  # type: ignore[method-assign]

    def run(self, chunks: Any, follows: Any) -> Any:
        decodes = sum(chunk.is_decode for chunk in chunks)
        tokens = sum(chunk.num_tokens for chunk in chunks) - decodes
        self.times.append((decodes, tokens, 0.01 * decodes + 0.002 * tokens))
        return replace(self._run(chunks, follows), seconds=self.times[-1][2])


def serve(**options: Any) -> tuple[list[list[int]], Machine]:
    """The answers to two chats and a long prompt that comes while they are given."""
    model = HashModel(length=1200)
    engine = make_engine(model, num_kv_blocks=1200, max_num_batched_tokens=512, **options)
    machine = Machine(engine)
    sinks: list[Recorder] = [add(engine, f"chat {n}", [5, 6, 7 + n], max_tokens=60, ignore_eos=True) for n in range(2)]
    for _ in range(5):
        engine.step()
    prompt = [3 + n * n % 50 for n in range(1000)]
    sinks.append(add(engine, "long", prompt, max_tokens=5, ignore_eos=True))
    while engine.step():
        engine.check_integrity()
    return [sink.ids for sink in sinks], machine


def test_decodes_beside_a_long_prompt_keep_their_pace_and_all_say_the_same() -> None:
    bounded, machine = serve(target_step_seconds=0.1)
    beside = [seconds for decodes, tokens, seconds in machine.times if decodes and tokens]
    assert len(beside) > 20
    assert max(beside[3:]) <= 0.11
    free, machine = serve(target_step_seconds=None)
    assert max(seconds for decodes, tokens, seconds in machine.times if decodes and tokens) > 1.0
    assert bounded == free
