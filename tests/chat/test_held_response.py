"""Responses that a grammar held: tags in their content are content, in any split of the text."""

from __future__ import annotations

import pytest

from tern.chat import HeldResponseParser, ParserState, collect_message, parse_held_response

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</response>"}}\n</tool_call>\n'


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        ('a > b\n</think>\n\n<response>\n{"a": "</response>\\n<tool_call>"}\n</response>\n', "a > b",
         '{"a": "</response>\\n<tool_call>"}', 0),
        ("<response>\n</think>\n\n<response>\n\n\nx\n</response>\n\n</response>\n", "<response>",
         "\n\nx\n</response>\n", 0),
        ("t\n</think>\n\n<response>\n<tool_call>\n</response>\n", "t", "<tool_call>", 0),
        ("t\n</think>\n\n<response>\nabc\n</resp", "t", "abc\n</resp", 0),
        ("t\n</think>\n\n<response>\n\n</response>\n", "t", None, 0),
        ("t\n</think>\n\n<resp", "t", "<resp", 0),
        (f"t\n</think>\n\n{CALL}\n{CALL}", "t", None, 2),
        ("t", "t", None, 0),
    ],
)  # fmt: skip
def test_whole_and_in_any_split(text: str, reasoning: str, content: str | None, calls: int) -> None:
    whole = parse_held_response(text, [TOOL])
    assert (whole.reasoning_content, whole.content, len(whole.tool_calls)) == (reasoning, content, calls)
    for size in (1, 2, 3, 5, 7, 11):
        parser = HeldResponseParser([TOOL])
        events = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
        assert collect_message([*events, *parser.finish()]) == whole
        assert parser.finish() == []


def test_a_prompt_may_have_opened_the_response() -> None:
    message = parse_held_response("\na</response>\n</response>\n", start=ParserState.RESPONSE)
    assert message.content == "\na</response>"
