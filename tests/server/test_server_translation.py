"""What both newer families are made of: parts of an answer, names of a request's places, volatile lines, arguments."""

from __future__ import annotations

import json
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tern.chat import ChatProtocol, ContentDelta, ReasoningDelta, ResponseParser, TextStream, ToolCallDelta
from tern.engine import Finish, FinishReason, GeneratedToken
from tern.errors import ContextLengthError, InvalidRequestError
from tern.server.logprobs import token_bytes
from tern.server.message_answers import arguments_of
from tern.server.message_input import as_chat as messages_as_chat
from tern.server.parts import Closed, Grown, Opened, Part, PartKind, PartReader, Step
from tern.server.response_input import as_chat as responses_as_chat
from tern.server.schemas.fields import read_fields
from tern.server.schemas.messages import MessagesRequest
from tern.server.schemas.responses import ResponsesRequest
from tern.server.sink import Ending, Update
from tern.server.translation import Conversation, Translation
from tern.server.volatile_lines import without_volatile_lines
from tests.fuzzing import fuzz

EVENTS = [
    ReasoningDelta("a"),
    ReasoningDelta("b"),
    ContentDelta("c"),
    ContentDelta(""),
    ToolCallDelta(0, "id0", "f", ""),
    ToolCallDelta(0, None, None, "{"),
    ToolCallDelta(0, None, None, "}"),
    ToolCallDelta(1, "id1", "g", "{}"),
    ReasoningDelta("d"),
    ContentDelta("e"),
]
PARTS = [("thought", "ab"), ("text", "c"), ("call", "{}"), ("call", "{}"), ("thought", "d"), ("text", "e")]


def told(steps: list[Step]) -> list[tuple[str, str]]:
    """The parts that steps tell of, their order checked: each is opened, grown and closed before the next one."""
    found: list[tuple[str, str]] = []
    is_open = False
    for step in steps:
        match step:
            case Opened(part):
                assert (is_open, part.index) == (False, len(found))
                found.append((part.kind.value, ""))
                is_open = True
            case Grown(part, text):
                assert is_open
                assert text
                found[-1] = (found[-1][0], found[-1][1] + text)
            case Closed(part):
                assert is_open
                is_open = False
                assert part.text == found[-1][1]
    assert not is_open
    return found


@fuzz(100)
@given(st.lists(st.integers(1, 4), min_size=10, max_size=10))
def test_steps_add_up_to_the_parts_however_they_come(sizes: list[int]) -> None:
    reader, rest, steps = PartReader(), [Update(0, [event]) for event in EVENTS], []
    for size in sizes:
        steps += reader.take(rest[:size])
        rest = rest[size:]
    steps += reader.close() + reader.close()
    assert told(steps) == PARTS == [(part.kind.value, part.text) for part in reader.parts]
    assert [(part.call_id, part.name) for part in reader.parts[2:4]] == [("id0", "f"), ("id1", "g")]


def test_what_came_at_once_is_one_piece() -> None:
    steps = PartReader().take([Update(0, EVENTS)])
    assert sum(isinstance(step, Grown) for step in steps) == len(PARTS)


def test_around_a_hidden_part_what_is_alike_joins() -> None:
    reader = PartReader(frozenset({PartKind.THOUGHT}))
    updates = [Update(0, [ReasoningDelta("x"), ContentDelta("a"), ReasoningDelta("y"), ContentDelta("b")])]
    assert told(reader.take(updates) + reader.close()) == [("text", "ab")]


@pytest.mark.parametrize(
    ("kind", "reason", "inside_call", "cut"),
    [
        (PartKind.TEXT, FinishReason.STOP, False, False),
        (PartKind.TEXT, FinishReason.LENGTH, False, True),
        (PartKind.CALL, FinishReason.LENGTH, False, False),
        (PartKind.CALL, FinishReason.LENGTH, True, True),
        (PartKind.CALL, FinishReason.STOP, True, True),
    ],
)
def test_which_part_is_cut(kind: PartKind, reason: FinishReason, inside_call: bool, cut: bool) -> None:
    ending = Ending(Finish(reason, 1, 1, 0), 0, None, inside_call)
    assert Part(kind, 0).cut_by(ending) is cut
    assert Part(kind, 0).cut_by(None) is True


@fuzz(100)
@example("i0")  # letters of </think>
@example("a > b")
@given(st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1).filter(str.strip))
def test_a_text_s_tokens_spell_it(protocol: ChatProtocol, text: str) -> None:
    """Except at its ends, where a token may hold a tag's end or framing too."""
    tokenizer = protocol.tokenizer
    written = f"Hm.\n</think>\n\n<response>\n{text}\n</response>\n"
    stream, parser = TextStream(tokenizer), ResponseParser()
    reader = PartReader(token_bytes=partial(token_bytes, tokenizer))
    for token_id in tokenizer.encode(written):
        reader.take([Update(0, parser.feed(stream.push(token_id).text), GeneratedToken(token_id))])
    reader.take([Update(0, [*parser.feed(stream.finish()), *parser.finish()])])
    (said,) = [part for part in reader.parts if part.kind is PartKind.TEXT]
    spelt = b"".join(tokenizer.token_bytes(token.token_id) for token in said.tokens).decode()
    assert said.text.strip("\n") in spelt
    assert len(spelt) <= len(said.text) + 16
    assert "</think>" not in spelt


NAMES = {"messages": "input", "messages[1]": "input[3]", "messages[1].content[0]": "input[4].text", "stop": "ends"}


@pytest.mark.parametrize(
    ("place", "sent"),
    [
        ("messages", "input"),
        ("messages[0].role", "input[0].role"),
        ("messages[1].role", "input[3].role"),
        ("messages[1].content[0].type", "input[4].text.type"),
        ("messages[1].content[1].type", "input[3].content[1].type"),
        ("messages[11].role", "input[11].role"),
        ("messages_of_another", "messages_of_another"),
        ("stop", "ends"),
        ("stop_token_ids", "stop_token_ids"),
        ("seed", "seed"),
    ],
)
def test_a_complaint_names_the_place_that_was_sent(place: str, sent: str) -> None:
    chat = Translation({}, NAMES)
    error = chat.named(InvalidRequestError(f"{place} is wrong: mend messages.", param=place, code="c"))
    assert (str(error), error.param, error.code) == (f"{sent} is wrong: mend messages.", sent, "c")


def test_limits_go_by_their_sent_name_wherever_they_stand() -> None:
    chat = Translation({}, {"messages": "input", "max_tokens": "max_output_tokens"})
    error = chat.named(ContextLengthError("Too long, set max_tokens to at most 5."))
    assert isinstance(error, ContextLengthError)
    assert (str(error), error.param) == ("Too long, set max_output_tokens to at most 5.", "input")
    assert chat.named(InvalidRequestError("Nothing to name.")).param is None


def test_an_assistant_s_pieces_are_one_message() -> None:
    talk = Conversation()
    talk.think("a", "p0")
    talk.answer({"type": "text", "text": "b"}, "p1")
    talk.call("c1", "f", "{}", "p2", "call_id")
    talk.think("c", "p3")
    talk.answer({"type": "text", "text": "d"}, "p4", apart=True)
    talk.result("c1", "e", "p5", "call_id")
    talk.answer({"type": "text", "text": "f"}, "p6", apart=True)
    first, result, second = talk.messages
    assert first["reasoning_content"] == "a\nc"
    assert "".join(part["text"] for part in first["content"]) == "b\n\nd"
    assert (result["role"], second["content"]) == ("tool", [{"type": "text", "text": "f"}])
    assert talk.names["messages[0].content[2]"] == "p4"
    assert talk.names["messages[0].tool_calls[0].id"] == "p2.call_id"
    assert talk.names["messages[1].tool_call_id"] == "p5.call_id"


LINE = "x-anthropic-billing-header: cc_version=1; cch=fa690;"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        (LINE, ""),
        (f"{LINE}\n", ""),
        (f"{LINE}\nBe brief.", "Be brief."),
        (f"{LINE}\n\n{LINE}\nBe brief.", "Be brief."),
        (f"Be brief.\n{LINE}", f"Be brief.\n{LINE}"),
        (f" {LINE}", f" {LINE}"),
        ("x-anthropic-billing is a word.", "x-anthropic-billing is a word."),
    ],
)
def test_volatile_lines_are_those_at_the_beginning(text: str, kept: str) -> None:
    assert without_volatile_lines(text) == kept


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, {"b": "c"}]}', {"a": [1, {"b": "c"}]}),
        ('{"a": 1, "b": "cut o', {"a": 1}),
        ("{", {}),
        ("", {}),
        ('{"a": 1e999}', {}),
        ('{"a": ' + "9" * 5000 + "}", {}),
        ("[1]", {}),
        ('{"a": ' * 100 + "1" + "}" * 100, json.loads('{"a": ' * 100 + "1" + "}" * 100)),
    ],
)
def test_arguments_as_an_object(text: str, value: object) -> None:
    assert arguments_of(text) == value


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_forms_and_forced_calls_become_the_chat_s() -> None:
    tool = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}

    def responses(**fields: object) -> dict[str, object]:
        return responses_as_chat(read_fields(ResponsesRequest, {"input": "x", "tools": [tool], **fields})).fields

    def messages(**fields: object) -> dict[str, object]:
        tools = [{"name": "f", "input_schema": SCHEMA, "strict": True}]
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "tools": tools, **fields}
        return messages_as_chat(read_fields(MessagesRequest, body), drop_volatile_lines=True).fields

    named = {"type": "function", "function": {"name": "f"}}
    assert responses(tool_choice="required")["tool_choice"] == "required"
    assert responses(tool_choice={"type": "function", "name": "f"})["tool_choice"] == named
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    assert responses(tool_choice=allowed)["tool_choice"] == "required"
    assert messages(tool_choice={"type": "any"})["tool_choice"] == "required"
    assert messages(tool_choice={"type": "tool", "name": "f"})["tool_choice"] == named
    assert responses()["tools"] == messages()["tools"]
    asked = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    assert responses(text={"format": asked})["response_format"] == form
    assert responses(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    asked = {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert messages(output_config=asked)["response_format"] == form
