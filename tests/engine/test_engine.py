"""The engine's promises, one scenario each, on a model that is a pure function of its context."""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from engine_fakes import EOS, LENGTH, VOCAB, HashModel, Recorder, add, hash_context, make_engine, make_request, run

from tern.engine import CONTINUE, Engine, FinishReason, GeneratedToken, Steering
from tern.engine.delivery import SINK_FAILED
from tern.engine.sampler import NOT_FINITE
from tern.engine.step_failures import OUT_OF_MEMORY, STEP_FAILED
from tern.errors import ContextLengthError, InvalidRequestError, QueueFullError

PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13], list(range(3, 40)), [9], [5, 6, 7, 8, 9, 10, 11, 12, 20, 21]]


def greedy(prompt: list[int], count: int, stop: tuple[int, ...] = (EOS,)) -> list[int]:
    """What the fake model says, without any engine."""
    table, tokens = HashModel().table, list(prompt)
    for _ in range(count):
        tokens.append(int(table[hash_context(tokens)].argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


SAMPLED = {"temperature": 1.0, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2}
TIGHT = {"num_kv_blocks": 24}


@lru_cache
def answer_alone(number: int, sampled: bool) -> list[int]:
    """What one prompt gives with an engine of its own."""
    engine = make_engine()
    sink = add(engine, "alone", PROMPTS[number], max_tokens=40, ignore_eos=True, **(SAMPLED if sampled else {}))
    run(engine)
    assert sampled or sink.ids == greedy(PROMPTS[number], 40, stop=())
    return sink.ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 8},
        {"max_num_seqs": 2, "max_num_batched_tokens": 2},
        {"max_num_batched_tokens": 13, "block_size": 3},
        {"block_size": 1},
        {"block_size": 64},
        {"enable_prefix_caching": False},
        TIGHT,
        {**TIGHT, "max_num_batched_tokens": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("fields", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_output_is_the_same_alone_batched_chunked_cached_and_preempted(
    options: dict[str, Any], fields: dict[str, Any]
) -> None:
    alone = [answer_alone(number, bool(fields)) for number in range(len(PROMPTS))]
    engine = make_engine(**options)
    for _ in ("cold", "warm"):
        sinks = [add(engine, str(i), p, max_tokens=40, ignore_eos=True, **fields) for i, p in enumerate(PROMPTS)]
        run(engine)
        assert [sink.ids for sink in sinks] == alone
        assert all(sink.end.reason is FinishReason.LENGTH for sink in sinks)
    assert (engine.stats().preemptions > 0) == (TIGHT.items() <= options.items() or options == {"block_size": 1})
    assert (engine.stats().prefix_hit_tokens > 0) == (
        options not in ({"enable_prefix_caching": False}, {"block_size": 64})
    )


def test_the_next_turn_of_a_chat_finds_the_generated_tokens_cached() -> None:
    engine = make_engine()
    first = add(engine, "turn 1", list(range(3, 13)), max_tokens=20, ignore_eos=True)
    run(engine)
    second = add(engine, "turn 2", [*range(3, 13), *first.ids, 40, 41], max_tokens=1)
    run(engine)
    assert first.end.num_cached_tokens == 0
    assert second.end.num_cached_tokens == 28  # of 32, without the last generated token, in whole blocks of 4
    assert engine.stats().prefix_hit_tokens == 28
    assert engine.stats().prefix_query_tokens == 42


def test_salted_prompts_share_nothing() -> None:
    engine = make_engine()
    sinks = [add(engine, salt, list(range(3, 30)), cache_salt=salt.encode()) for salt in ("a", "b")]
    run(engine)
    assert [sink.end.num_cached_tokens for sink in sinks] == [0, 0]


def test_an_end_token_is_pushed_and_named() -> None:
    prompt = next([start] for start in range(3, VOCAB) if EOS in greedy([start], 60))
    expected = greedy(prompt, 60)
    engine = make_engine()
    stopped = add(engine, "stopped", prompt, max_tokens=60)
    ignoring = add(engine, "ignoring", prompt, max_tokens=60, ignore_eos=True)
    own = add(engine, "own", prompt, max_tokens=60, ignore_eos=True, stop_token_ids=[expected[3]])
    run(engine)
    assert stopped.ids == expected
    assert (stopped.end.reason, stopped.end.stop_token_id) == (FinishReason.STOP, EOS)
    assert ignoring.end.reason is FinishReason.LENGTH
    assert len(ignoring.ids) == 60
    assert own.ids == expected[: expected.index(expected[3]) + 1]
    assert own.end.stop_token_id == expected[3]


def test_min_tokens_forbids_ends_until_they_are_there() -> None:
    expected = greedy([5], 8, stop=())
    engine = make_engine()
    early = add(engine, "early", [5], stop_token_ids=expected[:1])
    late = add(engine, "late", [5], stop_token_ids=list(range(3, VOCAB)), min_tokens=4)
    run(engine)
    assert early.ids == expected[:1]
    assert len(late.ids) == 5
    assert set(late.ids[:4]) <= {0, 1}


def test_bad_words_and_bias_change_the_choice() -> None:
    plain = greedy([5], 6, stop=())
    engine = make_engine()
    banned = add(engine, "banned", [5], ignore_eos=True, bad_token_sequences=((plain[0],), (7, 7)))
    after = add(engine, "after", [5], ignore_eos=True, bad_token_sequences=((plain[0], plain[1]),))
    biased = add(engine, "biased", [5], ignore_eos=True, logit_bias={9: 100.0}, max_tokens=3)
    run(engine)
    assert plain[0] not in banned.ids
    assert after.ids[0] == plain[0]
    assert after.ids[1] != plain[1]
    assert biased.ids == [9, 9, 9]


def test_forced_tokens_follow_the_sinks_answer() -> None:
    prompt = [5, 6, 7]
    sink = Recorder(script={2: Steering(force=(30, 31, 32)), 4: Steering(force=(33,))})
    engine = make_engine()
    add(engine, "forced", prompt, sink=sink, ignore_eos=True, max_tokens=10)
    run(engine)
    before = greedy(prompt, 2, stop=())
    forced = [30, 31, 32, 33]
    assert sink.ids == before + forced + greedy(prompt + before + forced, 4, stop=())
    assert [token.forced for token in sink.tokens] == [False] * 2 + [True] * 4 + [False] * 4
    assert sink.end.num_generated_tokens == 10


def test_forced_tokens_are_computed_in_one_step() -> None:
    engine = make_engine()
    sink = Recorder(script={1: Steering(force=tuple(range(30, 42)))})
    add(engine, "forced", [5, 6, 7], sink=sink, ignore_eos=True, max_tokens=14)
    assert run(engine) == 2
    assert len(sink.ids) == 14


def test_a_forced_end_token_does_not_end_but_the_length_does() -> None:
    sink = Recorder(script={1: Steering(force=(EOS, 30)), 3: Steering(force=(31,) * 50)})
    engine = make_engine()
    add(engine, "forced", [5], sink=sink, max_tokens=9)
    run(engine)
    assert sink.ids[1:] == [EOS, 30] + [31] * 6
    assert sink.end.reason is FinishReason.LENGTH


@pytest.mark.parametrize("where", [1, 4])
def test_a_sink_stops_its_sequence(where: int) -> None:
    sink = Recorder(script={1: Steering(force=(30,) * 6), where: Steering(stop=True, force=(1, 1))})
    engine = make_engine()
    if where == 4:
        sink.script[1] = Steering(force=(30,) * 6)
    add(engine, "stopped", [5], sink=sink, ignore_eos=True)
    run(engine)
    assert len(sink.ids) == where
    assert sink.end.reason is FinishReason.STOP
    assert sink.end.stop_token_id is None


@pytest.mark.parametrize("force", [(VOCAB,), (-1,), ("x",)])
def test_a_sink_that_fails_ends_its_own_request(force: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine()
    bad = [
        Recorder(raise_at=2),
        Recorder(script={2: Steering(force=force)}),
        Recorder(script={2: None}),  # type: ignore[dict-item]
        Recorder(raise_at_end=True),
    ]
    for number, sink in enumerate(bad):
        add(engine, f"bad {number}", [5], sink=sink, ignore_eos=True)
    good = add(engine, "good", [5], ignore_eos=True)
    with caplog.at_level(logging.ERROR):
        run(engine)
    assert [sink.end.reason for sink in bad] == [FinishReason.ERROR] * 3 + [FinishReason.LENGTH]
    assert [sink.end.message for sink in bad] == [SINK_FAILED] * 3 + [None]
    assert good.ids == greedy([5], 8, stop=())
    assert sum(record.exc_info is not None for record in caplog.records) == 4
    assert engine.stats().failed_steps == 0


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_cancelling_stops_the_work_at_once(steps: int) -> None:
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=2)
    target = add(engine, "target", list(range(3, 23)), max_tokens=30, ignore_eos=True)
    other = add(engine, "other", [9, 8, 7], ignore_eos=True)
    for _ in range(steps):
        engine.step()
    before = len(target.ids)
    assert engine.cancel("target")
    engine.check_integrity()
    assert target.end.reason is FinishReason.CANCELLED
    assert target.end.num_generated_tokens == before
    assert not engine.cancel("target")
    assert not engine.cancel("never seen")
    run(engine)
    assert len(target.ids) == before
    assert other.ids == greedy([9, 8, 7], 8, stop=())
    assert engine.stats().cancelled == 1
    assert engine.stats().blocks_free == engine.stats().blocks_total


class Canceller(Recorder):
    """A sink that cancels a request of its own engine from inside `push`, and starts another from `finish`."""

    engine: Engine
    victim: str
    then: Any = None

    def push(self, token: GeneratedToken) -> Steering:
        super().push(token)
        if len(self.tokens) == 2:
            self.engine.cancel(self.victim)
        return CONTINUE

    def finish(self, finish: Any) -> None:
        super().finish(finish)
        if self.then is not None:
            self.engine.add(self.then)


@pytest.mark.parametrize("victim", ["self", "earlier", "later"])
def test_a_sink_may_cancel_and_add_during_a_step(victim: str) -> None:
    engine = make_engine()
    sinks = {"earlier": Recorder(), "self": Canceller(), "later": Recorder()}
    sinks["self"].engine, sinks["self"].victim = engine, victim
    follower = Recorder()
    sinks["self"].then = make_request("follower", [5], sink=follower)
    for name, sink in sinks.items():
        add(engine, name, [5, 6], sink=sink, ignore_eos=True)
    run(engine)
    for name, sink in sinks.items():
        assert sink.end.reason is (FinishReason.CANCELLED if name == victim else FinishReason.LENGTH)
    assert follower.end.reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_a_step_that_fails_once_is_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    model = HashModel()
    engine = make_engine(model, max_num_seqs=2, max_num_batched_tokens=8)
    prompts = {"a": [5, 6, 7, 8, 9], "b": [5, 6, 7, 8, 9], "c": [5, 6, 7, 8, 9, 10]}
    sinks = [add(engine, name, prompt, ignore_eos=True) for name, prompt in prompts.items()]
    for at in range(6):
        model.fail_next = int(at % 2)
        with caplog.at_level(logging.ERROR):
            engine.step()
        engine.check_integrity()
    assert "fails as asked" in caplog.text
    run(engine)
    assert [sink.ids for sink in sinks] == [greedy(prompt, 8, stop=()) for prompt in prompts.values()]
    assert engine.consecutive_failures == 0
    assert engine.stats().failed_steps == 3


def test_a_request_that_cannot_be_computed_takes_no_other_with_it() -> None:
    model = HashModel()
    model.poison_token = 50
    engine = make_engine(model, max_num_seqs=4)
    good = [add(engine, f"good {n}", [5, 6, 7 + n], ignore_eos=True) for n in range(2)]
    bad = add(engine, "bad", [5, 50, 7], ignore_eos=True)
    engine.step()
    assert (bad.end.reason, bad.end.message) == (FinishReason.ERROR, STEP_FAILED)
    run(engine)
    assert [sink.ids for sink in good] == [greedy([5, 6, 7 + n], 8, stop=()) for n in range(2)]
    assert engine.consecutive_failures == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1e12 bytes."),
    ],
)
def test_memory_that_ran_out_is_called_that(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    run_chunks = engine.runner.run

    def run_short_of_memory(chunks: Any, follows: Any) -> Any:
        if sum(chunk.num_tokens for chunk in chunks) > 9:
            raise error
        return run_chunks(chunks, follows)

    monkeypatch.setattr(engine.runner, "run", run_short_of_memory)
    sinks = [add(engine, str(n), [n] * count, ignore_eos=True) for n, count in ((5, 6), (6, 8), (7, 12))]
    run(engine)
    assert [sink.end.reason for sink in sinks] == [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.ERROR]
    assert sinks[2].end.message == OUT_OF_MEMORY
    assert sinks[0].ids == greedy([5] * 6, 8, stop=())


def test_who_is_cancelled_while_others_fail_is_let_go() -> None:
    """A sink may take back any request at any time, the survivors and victims of a failed step included."""
    model = HashModel()
    model.poison_token = 50
    engine = make_engine(model, max_num_seqs=4)

    class Canceller(Recorder):
        def push(self, token: Any) -> Steering:
            engine.cancel("bad")
            return super().push(token)

        def finish(self, finish: Any) -> None:
            engine.cancel("good")
            super().finish(finish)

    canceller = add(engine, "canceller", [5, 6], sink=Canceller(), max_tokens=1)
    bad, good = add(engine, "bad", [50]), add(engine, "good", [7, 8], ignore_eos=True)
    run(engine)
    assert canceller.end.reason is FinishReason.LENGTH
    assert [bad.end.reason, good.end.reason] == [FinishReason.CANCELLED, FinishReason.CANCELLED]


def test_logits_that_are_not_finite_end_one_request() -> None:
    model = HashModel()
    model.spoil_token = 60
    engine = make_engine(model)
    spoiled = add(engine, "spoiled", [5, 60])
    sound = add(engine, "sound", [5, 6], ignore_eos=True)
    run(engine)
    assert (spoiled.end.reason, spoiled.end.message) == (FinishReason.ERROR, NOT_FINITE)
    assert spoiled.ids == []
    assert len(sound.ids) == 8


def test_what_gave_no_finite_logits_is_not_found_again() -> None:
    model = HashModel()
    engine = make_engine(model)
    prompt = [60, *range(5, 40)]
    for spoilt in (True, False):
        model.spoil_token = 60 if spoilt else None
        sink = add(engine, f"spoilt {spoilt}", prompt)
        run(engine)
        assert sink.end.num_cached_tokens == 0
        assert (sink.end.reason is FinishReason.ERROR) == spoilt
    again = add(engine, "sound", prompt)
    run(engine)
    assert again.end.num_cached_tokens > 0


@pytest.mark.parametrize(
    ("prompt", "fields", "error", "words"),
    [
        ([], {}, InvalidRequestError, "empty"),
        ([VOCAB], {}, InvalidRequestError, f"token id {VOCAB}: the model knows ids 0 to {VOCAB - 1}"),
        ([-1], {}, InvalidRequestError, "token id -1"),
        (["a"], {}, InvalidRequestError, "no token id"),
        ([2**70], {}, InvalidRequestError, "no token id"),
        ([5], {"stop_token_ids": [VOCAB]}, InvalidRequestError, "stop_token_ids"),
        ([5], {"logit_bias": {VOCAB: 1.0}}, InvalidRequestError, "logit_bias"),
        ([5], {"bad_token_sequences": ((VOCAB,),)}, InvalidRequestError, "bad_words"),
        ([5], {"bad_token_sequences": ((),)}, InvalidRequestError, "bad_words"),
        ([5] * LENGTH, {"max_tokens": None}, ContextLengthError, f"length is {LENGTH} tokens.*prompt has {LENGTH}"),
        ([5] * 90, {"max_tokens": 7}, ContextLengthError, f"{LENGTH} tokens.*has 90.*is 7, which makes 97.*at most 6"),
        (
            [5],
            {"stop_token_ids": list(range(VOCAB)), "min_tokens": 1},
            InvalidRequestError,
            f"all {VOCAB} tokens there are",
        ),
        (
            [5],
            {"bad_token_sequences": tuple((token,) for token in range(VOCAB))},
            InvalidRequestError,
            f"all {VOCAB} tokens there are",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_and_not_queued(
    prompt: list[Any], fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    engine = make_engine()
    sink = Recorder()
    with pytest.raises(error, match=words):
        add(engine, "wrong", prompt, sink=sink, **fields)
    assert not engine.has_work
    assert sink.finishes == []
    add(engine, "wrong", [5])
    run(engine)


def test_a_request_without_max_tokens_runs_to_the_models_length() -> None:
    engine = make_engine(max_model_len=30, num_kv_blocks=8)
    sinks = [
        add(engine, "open", [5] * 10, max_tokens=None, ignore_eos=True),
        add(engine, "exact", [5] * 10, max_tokens=20, ignore_eos=True),
        add(engine, "nearly full", [5] * 29, max_tokens=None, ignore_eos=True),
    ]
    run(engine)
    assert [len(sink.ids) for sink in sinks] == [20, 20, 1]
    assert {sink.end.reason for sink in sinks} == {FinishReason.LENGTH}


def test_a_full_queue_refuses_and_recovers() -> None:
    engine = make_engine(max_num_seqs=2, max_queue=1)
    for name in "abc":
        add(engine, name, [5])
    with pytest.raises(QueueFullError, match="1 requests are waiting and max_queue is 1") as caught:
        add(engine, "d", [5])
    assert caught.value.retry_after > 0
    run(engine)
    add(engine, "d", [5])
    run(engine)


def test_an_id_in_use_is_refused() -> None:
    engine = make_engine()
    first = add(engine, "twin", [5])
    with pytest.raises(InvalidRequestError, match="'twin' is already being served"):
        add(engine, "twin", [6])
    run(engine)
    assert first.end
    add(engine, "twin", [6])
    run(engine)


def test_logprobs_come_with_sampled_tokens_only() -> None:
    sink = Recorder(script={1: Steering(force=(30,))})
    engine = make_engine()
    add(engine, "scored", [5], sink=sink, ignore_eos=True, logprobs=2, max_tokens=3)
    run(engine)
    sampled, forced, last = sink.tokens
    assert forced.logprob is None
    assert forced.top_logprobs == ()
    for token in (sampled, last):
        assert token.logprob is not None
        assert token.logprob.rank == 1
        assert token.top_logprobs[0] == token.logprob
        assert math.exp(token.logprob.logprob) < 1


def test_seeds_repeat_and_differ() -> None:
    engine = make_engine()
    sinks = [
        add(engine, str(number), [5, 6], seed=seed, choice_index=choice, temperature=1.0, ignore_eos=True)
        for number, (seed, choice) in enumerate([(1, 0), (1, 1), (2, 0), (None, 0), (None, 0)])
    ]
    again = add(engine, "again", [5, 6], seed=1, temperature=1.0, ignore_eos=True)
    run(engine)
    assert again.ids == sinks[0].ids
    assert len({tuple(sink.ids) for sink in sinks}) == 5


def test_counters_only_grow_and_add_up() -> None:
    engine = make_engine()
    before = engine.stats()
    for number in range(6):
        add(engine, str(number), [5, 6, 7, number], ignore_eos=True)
        engine.step()
        stats = engine.stats()
        for name in ("prefix_query_tokens", "prefix_hit_tokens", "prompt_tokens", "computed_tokens", "steps"):
            assert getattr(stats, name) >= getattr(before, name)
        before = stats
    run(engine)
    stats = engine.stats()
    assert stats.prompt_tokens == 24
    assert stats.generated_tokens == 48
    assert stats.computed_tokens == 24 + 48 - 6 - stats.prefix_hit_tokens
    assert sum(stats.finished.values()) == 6
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)
    assert stats.last_step_seconds > 0
