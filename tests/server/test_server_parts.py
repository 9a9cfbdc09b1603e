"""The parts by themselves: mailbox, sink, grouping of updates, body, fields, and the list in docs/api.md."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tern.chat import (
    ChatProtocol,
    ContentDelta,
    ReasoningDelta,
    ResponseParser,
    ToolCallDelta,
    collect_message,
)
from tern.engine import Finish, FinishReason, GeneratedToken, SamplingParams, TokenLogprob
from tern.errors import InvalidRequestError
from tern.server.body import parse_json_object
from tern.server.generation import Generation
from tern.server.logprobs import LOWEST, chat_logprobs
from tern.server.offload import LARGE, Offload
from tern.server.progress import by_choice
from tern.server.schemas.chat import ChatRequest
from tern.server.schemas.completion import CompletionRequest
from tern.server.schemas.fields import IGNORED, INSTEAD, NEUTRAL, read_fields
from tern.server.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from tern.server.sink import ChoiceSink, Ending, Mailbox, PlainText, Update
from tests.fuzzing import fuzz

DOCS = Path(__file__).parents[2] / "docs" / "api.md"


class Observer:
    def __init__(self) -> None:
        self.tokens = 0
        self.endings: list[Ending] = []

    def token(self) -> None:
        self.tokens += 1

    def ended(self, ending: Ending) -> None:
        self.endings.append(ending)


def end(reason: FinishReason = FinishReason.STOP, **fields: Any) -> Finish:
    return Finish(reason, 3, 5, 0, **fields)


def test_a_mailbox_hands_over_in_order_from_many_wake_ups() -> None:
    async def read() -> list[int]:
        mailbox = Mailbox()

        def write() -> None:
            for index in range(1000):
                mailbox.post(Update(index))

        thread = threading.Thread(target=write)
        thread.start()
        seen: list[int] = []
        while len(seen) < 1000:
            seen += [update.index for update in await mailbox.take(30)]
        thread.join()
        assert await mailbox.take(0.001) == []
        mailbox.close()
        mailbox.post(Update(0))
        assert await mailbox.take(0.001) == []
        return seen

    assert asyncio.run(read()) == list(range(1000))


def test_a_mailbox_whose_loop_is_gone_swallows_the_rest() -> None:
    async def make() -> Mailbox:
        return Mailbox()

    mailbox = asyncio.run(make())
    for index in range(3):
        mailbox.post(Update(index))


def sink_for(protocol: ChatProtocol, updates: list[Update], **fields: Any) -> ChoiceSink:
    params = SamplingParams(**fields.pop("params", {}))
    return ChoiceSink(0, protocol.text_stream(params), PlainText(), updates.append, Observer(), **fields)


def push_text(sink: ChoiceSink, protocol: ChatProtocol, text: str) -> list[bool]:
    return [sink.push(GeneratedToken(token_id)).stop for token_id in protocol.tokenizer.encode(text)]


def text_of(updates: list[Update]) -> str:
    events = [event for update in updates for event in update.events]
    return collect_message(events).content or ""


def test_a_sink_passes_on_text_tokens_and_the_ending(protocol: ChatProtocol) -> None:
    updates: list[Update] = []
    sink = sink_for(protocol, updates)
    push_text(sink, protocol, "北京 today")
    sink.finish(end(FinishReason.LENGTH))
    assert text_of(updates) == "北京 today"
    assert updates[-1].ending == Ending(end(FinishReason.LENGTH), 0, None)
    assert [update.token is None for update in updates] == [False] * (len(updates) - 1) + [True]


def test_a_sink_stops_at_a_stop_string(protocol: ChatProtocol) -> None:
    updates: list[Update] = []
    sink = sink_for(protocol, updates, params={"stop": ["yz"]})
    stops = push_text(sink, protocol, "wxyz")
    assert stops == [False, False, False, True]
    sink.finish(end())
    assert text_of(updates) == "wx"
    assert updates[-1].ending is not None
    assert updates[-1].ending.stop_reason == "yz"


def test_a_hidden_token_is_counted_and_not_shown_unless_it_was_forced(protocol: ChatProtocol) -> None:
    (token_id,) = protocol.tokenizer.encode("!")
    for forced in (False, True):
        updates: list[Update] = []
        sink = sink_for(protocol, updates, stop_token_ids=frozenset({token_id}), hidden_token_ids=frozenset({token_id}))
        sink.push(GeneratedToken(token_id, forced=forced))
        sink.finish(end(stop_token_id=None if forced else token_id))
        assert text_of(updates) == ("!" if forced else "")
        assert updates[0].token is not None
        assert updates[-1].ending is not None
        assert updates[-1].ending.stop_reason == (None if forced else token_id)


def test_one_call_only(protocol: ChatProtocol) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    tools = [{"type": "function", "function": {"name": "f"}}]
    updates: list[Update] = []
    parser = ResponseParser(tools=tools)
    sink = ChoiceSink(0, protocol.text_stream(SamplingParams()), parser, updates.append, Observer(), single_call=True)
    stops = push_text(sink, protocol, "t\n</think>\n\n" + call + call)
    assert stops.index(True) > len(protocol.tokenizer.encode("t\n</think>\n\n" + call))
    sink.finish(end())
    message = collect_message([event for update in updates for event in update.events])
    assert [(found.name, found.arguments) for found in message.tool_calls] == [("f", '{"x": 1}')]


EVENTS = st.one_of(
    st.builds(ReasoningDelta, st.text(max_size=3)),
    st.builds(ContentDelta, st.text(max_size=3)),
)


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(EVENTS, max_size=3)), max_size=12))
@fuzz(100)
def test_grouping_loses_and_reorders_nothing(batches: list[tuple[int, list[Any]]]) -> None:
    grouped = by_choice(Update(index, events) for index, events in batches)
    for index in range(3):
        events = [event for each, events in batches if each == index for event in events]
        joined = list(grouped[index].joined_events()) if index in grouped else []
        assert collect_message(joined) == collect_message(events)
        assert all(type(a) is not type(b) for a, b in itertools.pairwise(joined))


def test_grouping_keeps_calls_apart() -> None:
    events = [
        ToolCallDelta(0, "a", "f", ""),
        ToolCallDelta(0, None, None, '{"x"'),
        ToolCallDelta(0, None, None, ": 1}"),
        ToolCallDelta(1, "b", "f", "{"),
        ToolCallDelta(1, None, None, "}"),
    ]
    joined = by_choice(Update(0, [event]) for event in events)[0].joined_events()
    assert list(joined) == [ToolCallDelta(0, "a", "f", '{"x": 1}'), ToolCallDelta(1, "b", "f", "{}")]


class RefusingEngine:
    """Takes some requests, refuses the next, and notes what is taken back."""

    def __init__(self, taken: int) -> None:
        self.left = taken
        self.cancelled: list[str] = []

    def submit(self, _request: Any) -> None:
        if not self.left:
            raise InvalidRequestError("no more")
        self.left -= 1

    def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return True


class Named:
    def __init__(self, name: str, length: int) -> None:
        self.request_id = name
        self.prompt_token_ids = (1,) * length


@pytest.mark.parametrize("length", [1, LARGE])
def test_a_refused_choice_takes_back_the_others(length: int) -> None:
    async def submit() -> list[str]:
        engine: Any = RefusingEngine(1)
        requests: Any = [Named("a", length), Named("b", length)]
        generation = Generation(engine, Mailbox(), requests)
        offload = Offload()
        with pytest.raises(InvalidRequestError):
            await generation.submit(offload)
        offload.close()
        return sorted(set(engine.cancelled))

    assert "a" in asyncio.run(submit())


def test_abandoned_while_submitting_leaves_nothing() -> None:
    """The loop gives up while a thread is still submitting: what the thread submits afterwards is taken back too."""
    inside, go_on = threading.Event(), threading.Event()

    class SlowEngine(RefusingEngine):
        def submit(self, request: Any) -> None:
            inside.set()
            assert go_on.wait(30)
            super().submit(request)

    async def submit() -> list[str]:
        engine: Any = SlowEngine(2)
        requests: Any = [Named("a", LARGE), Named("b", LARGE)]
        generation = Generation(engine, Mailbox(), requests)
        offload = Offload()
        task = asyncio.ensure_future(generation.submit(offload))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait({task})
        engine.cancelled.clear()
        go_on.set()
        while len(engine.cancelled) < 2:
            await asyncio.sleep(0.001)
        offload.close()
        return sorted(engine.cancelled)

    assert asyncio.run(submit()) == ["a", "b"]


def test_impossible_log_probabilities_are_still_json(protocol: ChatProtocol) -> None:
    token = GeneratedToken(5, TokenLogprob(5, float("-inf"), 9))
    forced = GeneratedToken(6, forced=True)
    content = chat_logprobs(protocol.tokenizer, [token, forced], 0)["content"]
    assert [entry["logprob"] for entry in content] == [LOWEST]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=60))
@fuzz(100)
def test_any_bytes_are_an_object_or_a_named_refusal(raw: bytes) -> None:
    with contextlib.suppress(InvalidRequestError):
        assert isinstance(parse_json_object(raw), dict)


@given(st.dictionaries(st.sampled_from([*ChatRequest.model_fields, *NEUTRAL, *IGNORED]) | st.text(max_size=5), JSON))
@fuzz(100)
def test_any_fields_are_a_request_or_a_named_refusal(body: dict[str, Any]) -> None:
    for schema in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        with contextlib.suppress(InvalidRequestError):
            request = read_fields(schema, body)
            if not isinstance(request, DetokenizeRequest):
                request.check()
            if isinstance(request, ChatRequest | CompletionRequest):
                request.sampling_params({}, max_tokens=1, logprobs=None)


def test_the_entry_point_of_fastdeploy_is_tern_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    import tern.cli
    from tern.entrypoints.openai.api_server import main

    seen: list[list[str]] = []
    monkeypatch.setattr(tern.cli, "main", seen.append)
    main(["--model", "M", "--load_choices", "default_v1"])
    assert seen == [["serve", "--model", "M", "--load_choices", "default_v1"]]


def test_no_field_is_both_served_and_refused() -> None:
    assert not IGNORED.keys() & NEUTRAL.keys()
    assert not ChatRequest.model_fields.keys() & IGNORED.keys()
    assert not CompletionRequest.model_fields.keys() & IGNORED.keys()
    assert INSTEAD.keys() - NEUTRAL.keys() == {"enable_thinking"}
