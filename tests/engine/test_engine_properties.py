"""Random lives of an engine: arrivals, cancellations, priorities, forced tokens, tiny pools, any budget.

Whatever happens, the books balance after every step, every request ends exactly once, and what it was given is a
beginning of (or all of) what the model says to its prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from engine_fakes import (
    EOS,
    HashModel,
    MemoryStore,
    Recorder,
    StandInGraphs,
    add,
    hash_context,
    make_engine,
    make_request,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tern.engine import FinishReason, ScoredToken, Steering

MAX_LEN = 24
MODEL = HashModel(length=MAX_LEN)
ALONE = HashModel(length=MAX_LEN)

prompts = st.tuples(  # few beginnings and few tokens, so that prompts share blocks
    st.sampled_from([(), (5, 6, 7), (5, 6, 7, 8, 9, 10, 11, 12), (5, 6, 7, 8, 30, 31)]),
    st.lists(st.integers(3, 6), min_size=1, max_size=10).map(tuple),
).map(lambda parts: (parts[0] + parts[1])[: MAX_LEN - 1])

scripts = st.dictionaries(
    st.integers(1, 6), st.lists(st.integers(3, 60), min_size=1, max_size=7).map(tuple), max_size=2
)

requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_tokens": st.one_of(st.none(), st.integers(1, 12)),
        "priority": st.integers(-1, 1),
        "seed": st.one_of(st.none(), st.integers(0, 3)),  # None: greedy
        "script": scripts,
        "raise_at": st.one_of(st.none(), st.none(), st.integers(1, 8)),
        "scored": st.booleans(),
    }
)

events = st.lists(
    st.one_of(
        requests.map(lambda fields: ("add", fields)),
        st.integers(0, 12).map(lambda number: ("cancel", number)),
        st.integers(1, 4).map(lambda count: ("step", count)),
    ),
    min_size=1,
    max_size=24,
)

sizes = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 6),
        "spare": st.integers(0, 12),
        "max_num_seqs": st.integers(1, 4),
        "budget": st.integers(0, 20),
        "caching": st.sampled_from(["none", "memory", "store"]),
        "drafts": st.sampled_from([None, "right", "wrong", "half right"]),
        "ahead": st.booleans(),
        "graphs": st.booleans(),
    }
)


class KnowingDrafts:
    """Drafts of someone who has read the answers, and tells the truth, lies, or lies now and then."""

    def __init__(self, manner: str, sinks: list[tuple[dict[str, Any], Recorder]]) -> None:
        self.manner = manner
        self.sinks = sinks
        self.drafted = 0

    def draft(self, sequences: Sequence[Any], room: int) -> list[tuple[int, ...]]:
        drafts = []
        for sequence in sequences:
            done = sequence.num_generated_tokens
            answer = answer_to(self.sinks[int(sequence.request_id)][0])[done:]
            count = max(0, min(room, sequence.num_draftable_tokens, 1 + done % 5))
            drafts.append(tuple(self.told(token, done + place) for place, token in enumerate(answer[:count])))
            room -= len(drafts[-1])
            self.drafted += len(drafts[-1])
        return drafts

    def told(self, token: int, place: int) -> int:
        lies = self.manner == "wrong" or (self.manner == "half right" and place % 3 == 2)
        return (token + 1) % 60 if lies else token


@lru_cache(maxsize=4096)
def expected(prompt: tuple[int, ...], limit: int, script: tuple[tuple[int, tuple[int, ...]], ...]) -> tuple[int, ...]:
    """The greedy answer by definition: no engine, no cache, no batch."""
    forced, tokens, pending = dict(script), list(prompt), []
    while len(tokens) < limit:
        sampled = not pending
        tokens.append(int(MODEL.table[hash_context(tokens)].argmax()) if sampled else pending.pop(0))
        if sampled and tokens[-1] == EOS:
            break
        pending += forced.get(len(tokens) - len(prompt), ())
    return tuple(tokens[len(prompt) :])


@lru_cache(maxsize=4096)
def expected_draws(prompt: tuple[int, ...], limit: int, seed: int, script: Any) -> tuple[int, ...]:
    """The seeded answer of an engine that serves nothing else and keeps nothing."""
    engine = make_engine(ALONE, num_kv_blocks=8, max_num_seqs=1, enable_prefix_caching=False)
    sink = Recorder(script={count: Steering(force=force) for count, force in script})
    add(engine, "alone", list(prompt), sink=sink, max_tokens=limit - len(prompt), temperature=1.0, seed=seed)
    while engine.step():
        pass
    return tuple(sink.ids)


@lru_cache(maxsize=4096)
def prompt_scores(prompt: tuple[int, ...]) -> list[tuple[int, int]]:
    """Every token of the prompt but the first, and its rank behind those before it: no engine, no cache, no batch."""
    ranks = []
    for place in range(1, len(prompt)):
        row = MODEL.table[hash_context(list(prompt[:place]))]
        ranks.append((prompt[place], int((row > row[prompt[place]]).sum()) + 1))
    return ranks


def answer_to(fields: dict[str, Any]) -> tuple[int, ...]:
    prompt, script = fields["prompt"], tuple(sorted(fields["script"].items()))
    limit = MAX_LEN if fields["max_tokens"] is None else len(prompt) + fields["max_tokens"]
    if fields["seed"] is None:
        return expected(prompt, limit, script)
    return expected_draws(prompt, limit, fields["seed"], script)


def fit(fields: dict[str, Any]) -> dict[str, Any]:
    """The same request with an answer that fits the model."""
    room = MAX_LEN - len(fields["prompt"])
    return {**fields, "max_tokens": fields["max_tokens"] and min(fields["max_tokens"], room)}


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(size=sizes, plan=events)
@example(  # two that grow in a pool for one
    size={
        "block_size": 2,
        "spare": 0,
        "max_num_seqs": 4,
        "budget": 9,
        "caching": "memory",
        "drafts": "half right",
        "ahead": False,
        "graphs": False,
    },
    plan=[
        (
            "add",
            {
                "prompt": (5, 6, 7),
                "max_tokens": None,
                "priority": p,
                "seed": 1,
                "script": {},
                "raise_at": None,
                "scored": p == 1,
            },
        )
        for p in (1, 0, 1, -1)
    ],
)
def test_any_life_keeps_the_books_and_the_answers(size: dict[str, Any], plan: list[tuple[str, Any]]) -> None:
    engine = make_engine(
        MODEL,
        block_size=size["block_size"],
        num_kv_blocks=-(-MAX_LEN // size["block_size"]) + size["spare"],
        max_num_seqs=size["max_num_seqs"],
        max_num_batched_tokens=size["max_num_seqs"] + size["budget"],
        enable_prefix_caching=size["caching"] != "none",
        async_scheduling=size["ahead"],
        graphs=StandInGraphs() if size["graphs"] else None,
    )
    if size["caching"] == "store":
        engine.pool.store = MemoryStore(engine.runner.kv)
    MODEL.batches.clear()
    sinks: list[tuple[dict[str, Any], Recorder]] = []
    if size["drafts"]:
        engine.scheduler.drafter = KnowingDrafts(size["drafts"], sinks)
    cancelled: set[int] = set()
    scores: list[list[ScoredToken]] = []
    for kind, value in [*plan, ("step", 600)]:
        if kind == "add":
            fields = fit(value)
            script = {count: Steering(force=force) for count, force in fields["script"].items()}
            sink = Recorder(script=script, raise_at=fields["raise_at"])
            drawn = {} if fields["seed"] is None else {"temperature": 1.0, "seed": fields["seed"]}
            scores.append([])
            request = make_request(
                str(len(sinks)),
                list(fields["prompt"]),
                sink=sink,
                max_tokens=fields["max_tokens"],
                priority=fields["priority"],
                prompt_logprobs=0 if fields["scored"] else None,
                **drawn,
            )
            engine.add(replace(request, prompt_sink=scores[-1].extend))
            sinks.append((fields, sink))
        elif kind == "cancel":
            if engine.cancel(str(value)):
                cancelled.add(value)
        else:
            for _ in range(value):
                if not engine.step():
                    break
                engine.check_integrity()
        engine.check_integrity()

    assert not engine.has_work, "600 steps were not enough"
    assert engine.stats().blocks_free == engine.stats().blocks_total
    assert all(len(batch.token_ids) <= engine.options.max_num_batched_tokens for batch in MODEL.batches)
    assert all(len(batch.context_lens) <= engine.options.max_num_seqs for batch in MODEL.batches)
    for number, (fields, sink) in enumerate(sinks):
        answer = answer_to(fields)
        wanted = prompt_scores(fields["prompt"]) if fields["scored"] else []
        given = [(token.token_id, token.logprob and token.logprob.rank) for token in scores[number]]
        assert given == (wanted[: len(given)] if number in cancelled and not sink.ids else wanted)
        assert tuple(sink.ids) == answer[: len(sink.ids)]
        assert sink.end.num_generated_tokens == len(sink.ids)
        if number in cancelled:
            assert sink.end.reason is FinishReason.CANCELLED
        elif fields["raise_at"] is not None and fields["raise_at"] <= len(answer):
            assert sink.end.reason is FinishReason.ERROR
            assert len(sink.ids) == fields["raise_at"]
        else:
            assert sink.end.reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert tuple(sink.ids) == answer
    assert sum(engine.stats().finished.values()) == len(sinks)
