"""The response parser: every row of the protocol's table, its framing rules, and stream = whole for any split."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tern.chat import (
    ContentDelta,
    ParsedMessage,
    ParsedToolCall,
    ParserState,
    ReasoningDelta,
    ResponseEvent,
    ResponseParser,
    ToolCallDelta,
    collect_message,
    parse_response,
    state_after_prompt,
)
from tern.chat.json_scanner import JsonScanner
from tests.fuzzing import fuzz

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g", "get_weather")]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Beijing", "unit": "c"}}\n</tool_call>\n'


def stream(pieces: list[str], tools=TOOLS, start=ParserState.REASONING) -> list[ResponseEvent]:
    parser = ResponseParser(tools, start=start)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def message(reasoning=None, content=None, *calls: tuple[str, str]) -> ParsedMessage:
    return ParsedMessage(reasoning, content, [ParsedToolCall(name, arguments) for name, arguments in calls])


CALL_X = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
ROWS = [
    ("abc\n</think>\n\n<response>\ndef\n</response>\n", message("abc", "def")),
    ("abc</think>def", message("abc", "def")),
    ("abc", message("abc")),
    (f"abc\n</think>\n\n{CALL}\n", message("abc", None, ("f", '{"x": 1}'))),
    (
        f"abc\n</think>\n\n<response>\ndef\n</response>\n\n{CALL}\n\n{WEATHER}",
        message("abc", "def", ("f", '{"x": 1}'), ("get_weather", '{"location": "Beijing", "unit": "c"}')),
    ),
    (f"abc\n</think>\n\n{CALL}\n\n<response>\ndef\n</response>\n", message("abc", "def", ("f", '{"x": 1}'))),
    ("<think>\nabc\n</think>\n\n<response>\ndef\n</response>\n", message("abc", "def")),
    ("abc\n</think>\n\n<think>\nmore\n</think>\n\n<response>\ndef\n</response>\n", message("abc\nmore", "def")),
    (
        f"so <response> and\n{CALL}\nand <think> are tags\n</think>def",
        message(f"so <response> and\n{CALL}\nand <think> are tags", "def"),
    ),
    ('abc\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": "a', message("abc", None, ("f", '{"x": "a'))),
    ('abc\n</think>\n\n<tool_call>\n{"na', message("abc")),
    ('abc\n</think>\n\n<tool_call>\n{"name": "f", "argu', message("abc", None, ("f", ""))),
    (
        'a</think><tool_call>\n{"name": "f", "arguments": "{\\"x\\": \\"\\\\u4f60 \\ud83d\\ude00\\"}"}\n</tool_call>\n',
        message("a", None, ("f", '{"x": "\\u4f60 😀"}')),
    ),
]


@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_rows_of_the_protocol(text, expected):
    assert parse_response(text, TOOLS) == expected
    assert collect_message(stream(list(text))) == expected


@pytest.mark.parametrize(
    "inside",
    [
        "\nnot json at all\n",
        "\n[1, 2]\n",
        '\n"f"\n',
        "\n{}\n",
        '\n{"name": }\n',
        '\n{"name": 5, "arguments": {}}\n',
        '\n{"name": "", "arguments": {}}\n',
        '\n{"name": "f\\ud83d", "arguments": {"x": 1}}\n',
        '\n{"arguments": {"x": 1}}\n',
        '\n{name: "f", arguments: {}}\n',
        '\n{"name": "f", "arguments": {x: 1}}\n',
        '\n{"name": "f", "arguments": {\'x\': 1}}\n',
        '\n{"name": "f", "arguments": {"x": }}\n',
        '\n{"name": "f", "arguments": {"x" 1}}\n',
        '\n{"name": "f", "arguments": {"x": True}}\n',
        '\n{"name": "f", "arguments": {"x": \'a\'}}\n',
        '\n{"name": "f", "arguments": "{\\"x\\": }"}\n',
        '\n{"name": "f", "arguments": [1]}\n',
        '\n{"name": "f", "arguments": 7}\n',
        '\n{"name": "f", "arguments": "no object"}\n',
        '\n{"name": "f", "parameters": {"x": 1}}\n',
        '\n{"name": "f" "arguments": {}}\n',
        '\n{"name": "f"\n',
        '\n{"arguments": {"x": 1}, "name": \n',
        "",
        "\n",
    ],
)
def test_wrong_json_is_handed_on_as_text(inside, caplog):
    block = f"<tool_call>{inside}</tool_call>"
    text = f"abc\n</think>\n\n{block}\n"
    assert parse_response(text, TOOLS) == message("abc", block)
    assert collect_message(stream(list(text))) == message("abc", block)
    assert "not valid JSON" in caplog.text


def test_arguments_that_turn_wrong_late_stay_as_far_as_they_are_valid_and_the_block_is_text():
    block = '<tool_call>\n{"name": "f", "arguments": {"x": 1, oops}}\n</tool_call>'
    expected = message("abc", block, ("f", '{"x": 1, '))
    assert parse_response(f"abc</think>{block}\n", TOOLS) == expected
    assert collect_message(stream(list(f"abc</think>{block}\n"))) == expected


@pytest.mark.parametrize("ending", ["\n</tool_call>\n", "}}\n</tool_call>\n", "},\n]\n</tool_call>\n", ""])
def test_whole_arguments_make_a_call_whatever_follows_them(ending):
    text = 'abc</think><tool_call>\n{"name": "f", "arguments": {"x": 1}' + ending
    assert parse_response(text, TOOLS) == message("abc", None, ("f", '{"x": 1}'))
    assert collect_message(stream(list(text))) == message("abc", None, ("f", '{"x": 1}'))


@pytest.mark.parametrize(
    ("next_part", "content"),
    [
        ("<response>\ndef\n</response>", "def"),
        ("", None),
        ("\n\nThe answer is on its way.", "The answer is on its way."),
        (" and so on\n</tool_call>\n", "and so on"),
        ("// why\n</tool_call>\n\n<response>\ndef\n</response>", "// why\n\ndef"),
        ("< 3\n</tool_call>", "< 3"),
    ],
)
def test_what_follows_whole_arguments_is_not_swallowed(next_part, content):
    text = 'abc</think><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n' + next_part
    assert parse_response(text, TOOLS) == message("abc", content, ("f", '{"x": 1}'))
    assert collect_message(stream(list(text))) == parse_response(text, TOOLS)


def test_two_calls_in_one_block_are_two_calls():
    text = (
        'a</think><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n{"name": "f", "arguments": {"x": 2}}\n</tool_call>'
    )
    assert parse_response(text, TOOLS) == message("a", None, ("f", '{"x": 1}'), ("f", '{"x": 2}'))
    wrong = 'a</think><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n{"name": f}\n</tool_call>\n'
    assert parse_response(wrong, TOOLS) == message("a", '{"name": f}\n</tool_call>', ("f", '{"x": 1}'))


def test_a_second_thought_may_follow_a_call_without_an_end():
    text = 'a</think><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n<think>\nhm\n</think>\n\nok'
    assert parse_response(text, TOOLS) == message("a\nhm", "ok", ("f", '{"x": 1}'))


@pytest.mark.parametrize(
    ("inside", "content", "calls"),
    [
        (CALL_X + "\nI called f.\n", "I called f.", [("f", '{"x": 1}')]),
        (CALL_X + "\nIt is\n\n", "It is\n", [("f", '{"x": 1}')]),
        ("<tool_call> is a tag.\n", "<tool_call> is a tag.", []),
        ('<tool_call>\n{"name": f}\n', '<tool_call>\n{"name": f}', []),
        ('<tool_call>\n{"name": f}\n</tool_call>\n', '<tool_call>\n{"name": f}\n</tool_call>', []),
        (
            '<tool_call>\n{"name": f}\n</tool_call>\n' + CALL_X,
            '<tool_call>\n{"name": f}\n</tool_call>',
            [("f", '{"x": 1}')],
        ),
    ],
)
def test_a_response_that_begins_with_a_call_tag_still_ends_at_its_own(inside, content, calls):
    text = f"abc\n</think>\n\n<response>\n{inside}</response>\n"
    assert parse_response(text, TOOLS) == message("abc", content, *calls)
    text += "\n" + CALL_X
    assert parse_response(text, TOOLS) == message("abc", content, *calls, ("f", '{"x": 1}'))
    assert collect_message(stream(list(text))) == parse_response(text, TOOLS)


def test_without_tools_a_call_is_text():
    text = f"abc\n</think>\n\n{CALL}\n"
    assert parse_response(text) == message("abc", CALL)
    assert parse_response(text, []) == message("abc", CALL)
    both = f"abc\n</think>\n\n<response>\ndef\n</response>\n\n{CALL}\n"
    assert parse_response(both) == message("abc", f"def\n\n{CALL}")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ('{"arguments": {"x": 1}, "name": "f"}', ("f", '{"x": 1}')),
        (' {"id": 3, "name" : "f" , "arguments" : { "x" : [1, {}] } , "type": null } ', ("f", '{ "x" : [1, {}] }')),
        ('{"name": "f"}', ("f", "{}")),
        ('{"name": "f", "arguments": null}', ("f", "{}")),
        ('{"name": "f", "arguments": {}}', ("f", "{}")),
        ('{"name": "\\u0066", "arguments": {"x": 1}}', ("f", '{"x": 1}')),
        ('{"name": "unknown", "arguments": {"x": 1}}', ("unknown", '{"x": 1}')),
        ('{"name": "f", "arguments": {"x": "</tool_call>\\n</think>"}}', ("f", '{"x": "</tool_call>\\n</think>"}')),
        ('{"name": "f", "arguments": " { } "}', ("f", "{ }")),
        ('{"name": "f", "arguments": "{\\"x\\": \\"\\ud83d\\"}"}', ("f", '{"x": "\\ud83d"}')),
        ('{"name": "f", "arguments": {"x": -1.5e+3, "y": [true, false, null]}}', None),
    ],
)
def test_forms_of_a_call(block, expected):
    expected = expected or ("f", json.dumps(json.loads(block)["arguments"]).replace("-1500.0", "-1.5e+3"))
    for text in (f"a</think><tool_call>{block}</tool_call>", f"a</think>\n\n<tool_call>\n{block}\n</tool_call>\n"):
        for events in (stream([text]), stream(list(text))):
            got = collect_message(events)
            assert got == message("a", None, expected)
            json.loads(got.tool_calls[0].arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n</think>\n\n\n<response>\n\nb\n\n</response>\n\n\n", message("a\n", "b\n")),
        ("\n\na\n \nb \n</think> c\n\nd\n", message("\n\na\n \nb ", " c\n\nd\n")),
        ("\n</think>\n\n<response>\n\n</response>\n", message()),
        ("</think>", message()),
        ("a</think>```\n\n\nx\n\n```\n", message("a", "```\n\n\nx\n\n```\n")),
        (f"a</think>b\n\n{CALL}\n\nc\n", message("a", "bc\n", ("f", '{"x": 1}'))),
        ("a</think><response>b</response>\n<response>c</response>", message("a", "b\nc")),
        ("a</think><response>\nb\n", message("a", "b\n")),
        ("a\n</thin", message("a\n</thin")),
        ("a</think><respo", message("a", "<respo")),
        ("a</think><response>b </response", message("a", "b </response")),
        ("a</think><response>b\n\n\n", message("a", "b\n\n\n")),
        ("a</think>the <tool_call> tag, then\n" + CALL, message("a", "the <tool_call> tag, then", ("f", '{"x": 1}'))),
        (f"a</think><response>\n{CALL}\n</response>\n", message("a", None, ("f", '{"x": 1}'))),
        (f"a</think><response>\nlike this:\n{CALL}\n</response>\n", message("a", f"like this:\n{CALL}")),
    ],
)
def test_framing(text, expected):
    assert parse_response(text, TOOLS) == expected
    assert collect_message(stream(list(text))) == expected


@pytest.mark.parametrize("tools", [TOOLS, None])
@pytest.mark.parametrize("part", ["x</tool_call>", "<response>a</response>", "<think>a</think>", f"{CALL}\n"])
def test_a_long_text_of_many_parts_takes_linear_time(part, tools):
    """Quadratic work would take minutes here, which the suite's patience ends."""
    got = parse_response("a</think>" + part * 30_000, tools)
    assert len(got.tool_calls) == (30_000 if tools and part.startswith(CALL) else 0)
    assert (got.reasoning_content or "").count("a") == (30_001 if "<think>" in part else 1)


def test_ids_are_unique_and_only_in_the_first_delta():
    events = stream(list(f"a</think>{CALL}\n{WEATHER}"))
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    for index in (0, 1):
        first, *rest = [delta for delta in deltas if delta.index == index]
        assert first.id
        assert first.name
        assert all(delta.id is None and delta.name is None for delta in rest)
    assert len({delta.id for delta in deltas if delta.id}) == 2


def test_a_call_is_streamed_while_it_is_written():
    parser = ResponseParser(TOOLS)
    parser.feed('abc</think><tool_call>\n{"name": "get_weather", "arguments": {"location": ')
    (first,) = parser.feed('"Bei')
    assert (first.name, first.arguments) == ("get_weather", '{"location": "Bei')
    assert parser.feed('jing"}') == [ToolCallDelta(0, None, None, 'jing"}')]
    assert parser.feed("}\n</tool_call>\n") == []
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("start", "text", "expected"),
    [
        (ParserState.BETWEEN, "hello", message(None, "hello")),
        (ParserState.BETWEEN, "<think>\nabc\n</think>\n\n<response>\ndef\n</response>", message("abc", "def")),
        (ParserState.BETWEEN, CALL, message(None, None, ("f", '{"x": 1}'))),
        (ParserState.RESPONSE, "def\n</response>\n", message(None, "def")),
        (ParserState.RESPONSE, f"{CALL}\n", message(None, None, ("f", '{"x": 1}'))),
        (
            ParserState.CALL,
            '{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
            message(None, None, ("f", '{"x": 1}')),
        ),
    ],
)
def test_start_states(start, text, expected):
    assert parse_response(text, TOOLS, start=start) == expected
    assert collect_message(stream(list(text), start=start)) == expected


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        ("<|im_start|>assistant\n<think>\n", ParserState.REASONING),
        ("<think>\n\n</think>\n\n<response>\n", ParserState.RESPONSE),
        ("<think>\n\n</think>\n\n", ParserState.BETWEEN),
        ("<think>\n\n</think>\n\n<tool_call>\n", ParserState.CALL),
        ("User: hi\nAssistant: ", ParserState.BETWEEN),
        ("", ParserState.BETWEEN),
    ],
)
def test_state_after_prompt(prompt, state):
    assert state_after_prompt(prompt) is state


def test_feeding_a_finished_parser_is_a_mistake():
    parser = ResponseParser()
    parser.feed("a")
    parser.finish()
    assert parser.finish() == []
    with pytest.raises(RuntimeError, match="finish"):
        parser.feed("b")


FRAGMENTS = [
    *("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"),
    *(
        "<",
        "</",
        "<t",
        "<tool_",
        "call>",
        "</thi",
        "nk>",
        "<resp",
        ">",
        "\n",
        "\n\n",
        " ",
        "\t",
        "a",
        "你好",
        "😀",
        "é",
    ),
    *('{"name": "f", ', '"arguments": ', '{"x": 1}', '{"name": "f", "arguments": {"x": "', '"}}', "}", "{", '"', "\\"),
    *("[1, 2", "]", ",", ":", "1.5", "-", "e", "true", "null", "\\u12", "ab", '\\"', '"{\\"x\\": ', "\\ud83d\\ude00"),
    *('"{\\"x\\": 1}"', '"name": "g"', '"arguments"', '"other": [{}]', CALL, "\n</tool_call>\n", "\n</response>\n"),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
calls = st.lists(st.sampled_from(FRAGMENTS[19:]), max_size=12).map(
    lambda parts: "a</think><tool_call>" + "".join(parts)
)
states = st.sampled_from([state for state in ParserState if state is not ParserState.AFTER_CALL])


def split_at(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@fuzz(400)
@given(
    text=texts | calls,
    cuts=st.lists(st.integers(0, 120), max_size=12),
    tools=st.sampled_from([TOOLS, None]),
    start=states,
)
def test_any_split_gives_the_whole_text_result(text, cuts, tools, start):
    whole = parse_response(text, tools, start=start)
    assert collect_message(stream(split_at(text, cuts), tools, start)) == whole
    assert collect_message(stream(list(text), tools, start)) == whole


@pytest.mark.parametrize("text", [text for text, _ in ROWS])
def test_every_single_split_of_every_row(text):
    whole = parse_response(text, TOOLS)
    for cut in range(len(text) + 1):
        assert collect_message(stream([text[:cut], text[cut:]])) == whole


@fuzz(300)
@given(text=texts)
def test_thoughts_are_released_but_for_what_could_be_the_closing_tag(text):
    text = text.replace("</think>", "")
    if not text.lstrip().startswith("<"):
        parser = ResponseParser(TOOLS)
        said = "".join(event.text for char in text for event in parser.feed(char))
        held = text[len(said) :]
        assert text.startswith(said)
        assert held == "" or "\n</think>".startswith(held) or "</think>".startswith(held)


@fuzz(300)
@given(text=texts)
def test_content_is_released_but_for_what_could_be_the_closing_tag(text):
    text = "x" + text.replace("</response>", "")
    parser = ResponseParser(TOOLS, start=ParserState.RESPONSE)
    said = "".join(event.text for char in text for event in parser.feed(char))
    held = text[len(said) :]
    assert held == "" or "\n</response>".startswith(held) or "</response>".startswith(held)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@fuzz(200)
@given(
    arguments=st.dictionaries(st.text(max_size=5), json_values, max_size=4),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    encoded=st.booleans(),
)
def test_arguments_come_out_as_they_went_in_and_every_prefix_is_one_of_the_whole(
    arguments, ascii_only, indent, encoded
):
    plain = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    call = {"name": "f", "arguments": plain if encoded else arguments}
    text = "a</think>\n<tool_call>\n" + json.dumps(call, ensure_ascii=ascii_only, indent=indent) + "\n</tool_call>\n"
    got = collect_message(stream(list(text)))
    assert got.content is None
    assert json.loads(got.tool_calls[0].arguments) == arguments
    assert parse_response(text, TOOLS) == got


@fuzz(300)
@given(text=calls)
def test_streamed_arguments_are_always_the_beginning_of_one_object(text):
    parser = ResponseParser(TOOLS)
    scanners: dict[int, JsonScanner] = {}
    for event in [event for char in text for event in parser.feed(char)] + parser.finish():
        if isinstance(event, ToolCallDelta) and event.arguments:
            scanner = scanners.setdefault(event.index, JsonScanner())
            assert scanner.scan(event.arguments) == len(event.arguments)
            assert not scanner.failed
    whole = parse_response(text, TOOLS)
    assert all(call.arguments[:1] in ("", "{") for call in whole.tool_calls)


@fuzz(300)
@given(text=texts)
def test_bare_text_is_released_but_for_newlines_and_what_could_be_a_tag(text):
    text = "x" + text.replace("<tool_call>", "").replace("</tool_call>", "")
    parser = ResponseParser(TOOLS, start=ParserState.BARE)
    said = "".join(event.text for char in text for event in parser.feed(char))
    held = text[len(said) :].lstrip("\n")
    assert text.startswith(said)
    assert held == "" or any(tag.startswith(held) for tag in ("<tool_call>", "</tool_call>"))


@fuzz(200)
@given(parts=st.lists(st.sampled_from(FRAGMENTS[19:]), max_size=14))
def test_a_call_that_is_accepted_whole_is_what_json_reads(parts):
    block = "".join(parts)
    got = parse_response(f"a</think><tool_call>{block}</tool_call>", TOOLS)
    try:
        read = json.loads(block)
    except ValueError:
        read = None
    if isinstance(read, dict) and isinstance(read.get("name"), str) and isinstance(read.get("arguments"), dict):
        pairs = json.loads(block, object_pairs_hook=list)
        if len({key for key, _ in pairs}) == len(pairs):
            assert [(call.name, json.loads(call.arguments)) for call in got.tool_calls] == [
                (read["name"], read["arguments"])
            ]
            assert got.content is None
    for call in got.tool_calls:
        assert call.arguments == "" or call.arguments.lstrip().startswith("{")


def test_a_long_text_character_by_character():
    """What is looked at again at the next feed stays smaller than a tag, however much was fed: linear work."""
    rng = random.Random(5)
    long = "".join(rng.choice(["word ", "\n", "<b>", "</", "你", "\n\n"]) for _ in range(20_000))
    body = json.dumps({"name": "f", "arguments": {"text": long, "list": list(range(5_000))}}, ensure_ascii=False)
    text = f"{long}\n</think>\n\n<response>\n{long}.\n</response>\n\n<tool_call>\n{body}\n</tool_call>\n"
    whole = parse_response(text, TOOLS)
    assert whole.content == long.lstrip("\n") + "."
    assert json.loads(whole.tool_calls[0].arguments)["text"] == long
    parser = ResponseParser(TOOLS)
    events = []
    for char in text:
        events += parser.feed(char)
        assert len(parser._pending) < len("\n</tool_call>")
    assert collect_message(events + parser.finish()) == whole


def test_events_of_other_kinds_keep_their_order():
    kinds = [type(event) for event in stream([f"a</think><response>b</response>{CALL}<response>c</response>"])]
    assert kinds == [ReasoningDelta, ContentDelta, ToolCallDelta, ContentDelta]
