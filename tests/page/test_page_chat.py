"""Chatting on the page: thoughts, tool calls, stopping, answering again, settings, and what goes wrong."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import expect

from tern.chat import ChatProtocol
from tests.page.conftest import Chat, Opened, PausingEngine
from tests.server.server_fakes import serve

THOUGHT = "They want to know.\nI look it up.\n</think>\n\n<response>\nIt is *so*.\n</response>\n"
DONE = "The tool has answered.\n</think>\n\n<response>\nThere you are.\n</response>\n"


def call(name: str, **arguments: object) -> str:
    """An answer that calls a tool."""
    return (
        f"I need {name}.\n</think>\n\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>\n"
    )


def enable(chat: Chat, *names: str) -> None:
    """Offer these tools."""
    chat.page.locator("#tools-chip").click()
    for name in names:
        chat.page.locator("#tools").get_by_role("checkbox", name=name).check()
    chat.page.locator("#settings").get_by_role("button", name="Close").click()


def test_an_answer_streams_and_its_thought_is_folded_when_it_is_done(chat: Chat) -> None:
    chat.server.engine.pause_after = 12
    chat.ask("Is it so?", THOUGHT)
    thought = chat.answer.locator(".thought")
    expect(thought).to_have_attribute("open", "")
    expect(thought.locator(".thought-body")).to_contain_text("They w")
    expect(thought.locator("summary")).to_have_text(re.compile(r"Thinking\d+\.\d s · \d+ tokens"))
    expect(chat.answer).to_have_attribute("aria-busy", "true")
    chat.server.engine.gate.set()
    chat.wait()
    expect(thought).not_to_have_attribute("open", "")
    expect(thought.locator("summary")).to_have_text(re.compile(r"Thought for \d+(\.\d)? s\d+ tokens"))
    expect(chat.answer.locator(".answer-body em")).to_have_text("so")
    expect(chat.answer.locator(".counts")).to_have_text(
        re.compile(r"^\d+ tokens · (\S+ tokens/s · )?first token \d+\.\d\d s · prompt \d+ \(4 cached\)$")
    )
    expect(chat.page.locator("#said")).to_have_text("Answered: It is *so*.")
    expect(chat.page.locator("#context")).to_have_text(re.compile(r"^\d+ / 1,048,576$"))
    thought.locator("summary").click()
    expect(thought.locator(".thought-body")).to_be_visible()
    expect(thought.locator(".thought-body")).to_have_text("They want to know.\nI look it up.")


@pytest.mark.parametrize(
    ("tool", "arguments", "result"),
    [
        ("calculator", {"expression": "12*(3+4)"}, '"result": 84'),
        ("clock", {"location": "Tokyo"}, '"minute": '),
    ],
)
def test_tools_of_the_page_answer_by_themselves(chat: Chat, tool: str, arguments: dict[str, str], result: str) -> None:
    enable(chat, tool)
    chat.ask("Tell me", call(tool, **arguments), DONE)
    expect(chat.answer.locator(".answer-body")).to_have_text("There you are.")
    card = chat.page.locator(".call")
    expect(card.locator(".call-name")).to_have_text(tool)
    expect(card.locator(".call-state")).to_have_text("ran in this page")
    expect(card.locator(".call-arguments")).to_have_text(json.dumps(arguments).replace("{", "{ ").replace("}", " }"))
    expect(card.locator(".call-result")).to_contain_text(result)
    assert f'"name": "{tool}"' in chat.prompt(0)
    assert "<tool_response>" in chat.prompt(1)


def test_what_a_tool_of_the_page_cannot_do_is_told_to_the_model(chat: Chat) -> None:
    enable(chat, "calculator")
    chat.ask("Tell me", call("calculator", expression="alert(1)"), DONE)
    expect(chat.answer.locator(".answer-body")).to_have_text("There you are.")
    assert '{"error": "The expression has \'alert\' where a number must be."}' in chat.prompt(1)


def test_the_user_s_own_tool_asks_the_user(chat: Chat) -> None:
    chat.page.locator("#tools-chip").click()
    chat.page.locator("#new-tool").click()
    definition = chat.page.locator("#tool-definition")
    definition.fill("{no json")
    chat.page.locator("#save-tool").click()
    expect(chat.page.locator("#tools .wrong")).to_contain_text("The definition is not JSON")
    definition.fill('{"name": "clock"}')
    chat.page.locator("#save-tool").click()
    expect(chat.page.locator("#tools .wrong")).to_contain_text("There is a tool named clock already")
    definition.fill('{"name": "get_tide", "description": "Get the tide", "parameters": {"type": "object"}}')
    chat.page.locator("#save-tool").click()
    expect(chat.page.locator("#tools").get_by_role("checkbox", name="get_tide")).to_be_checked()

    chat.ask("The tide?", call("get_tide", place="Brest"), DONE)
    box = chat.page.get_by_label("Result of get_tide")
    expect(box).to_be_focused()
    chat.wait()
    assert len(chat.server.engine.seen) == 1
    box.fill('{"height": 4.2}')
    box.press("Enter")
    expect(chat.answer.locator(".answer-body")).to_have_text("There you are.")
    expect(chat.page.locator(".call-state")).to_have_text("typed by you")
    assert '<tool_response>\n{"height": 4.2}\n</tool_response>' in chat.prompt(1)
    assert '"name": "get_tide"' in chat.prompt(1)


def test_a_mocked_result_needs_nobody(chat: Chat) -> None:
    chat.page.locator("#tools-chip").click()
    chat.page.locator("#new-tool").click()
    chat.page.locator("#tool-mock").fill("sunny, 26 degrees")
    chat.page.locator("#save-tool").click()
    chat.ask("The weather?", call("get_weather", location="Paris"), DONE)
    expect(chat.answer.locator(".answer-body")).to_have_text("There you are.")
    assert "sunny, 26 degrees" in chat.prompt(1)


def test_two_calls_wait_for_both_results(chat: Chat) -> None:
    both = call("left") + "\n" + call("right").split("</think>\n\n")[1]
    chat.page.locator("#tools-chip").click()
    for name in ("left", "right"):
        chat.page.locator("#new-tool").click()
        chat.page.locator("#tool-definition").fill(json.dumps({"name": name, "parameters": {"type": "object"}}))
        chat.page.locator("#save-tool").click()
    chat.ask("Both?", both, DONE)
    chat.page.get_by_label("Result of left").fill("L1")
    chat.page.get_by_label("Result of left").press("Enter")
    chat.page.get_by_label("Result of right").fill("R2")
    assert len(chat.server.engine.seen) == 1
    chat.page.get_by_label("Result of right").press("Enter")
    expect(chat.answer.locator(".answer-body")).to_have_text("There you are.")
    assert chat.prompt(1).index("L1") < chat.prompt(1).index("R2")


def test_escape_stops_and_the_server_is_told(chat: Chat) -> None:
    engine = chat.server.engine
    engine.pause_after = 12
    chat.ask("Is it so?", THOUGHT)
    expect(chat.answer.locator(".thought-body")).to_contain_text("They w")
    chat.page.keyboard.press("Escape")
    chat.wait()
    expect(chat.answer.locator(".note")).to_have_text("Stopped.")
    engine.wait_until(lambda: len(engine.cancelled) == 1)
    engine.gate.set()
    chat.ask("And now?", THOUGHT)
    expect(chat.answer.locator(".answer-body")).to_have_text("It is so.")
    assert "They w" in chat.prompt(1)


def test_answering_again_replaces_the_answer_and_can_be_undone(chat: Chat) -> None:
    chat.ask("Is it so?", THOUGHT, DONE)
    chat.wait()
    chat.answer.get_by_role("button", name="Answer again").click()
    expect(chat.answer.locator(".answer-body")).to_have_text("There you are.")
    expect(chat.page.locator(".message.answer")).to_have_count(1)
    assert chat.prompt(0) == chat.prompt(1)
    chat.page.get_by_role("button", name="Undo").click()
    expect(chat.page.locator(".answer-body")).to_have_text("It is so.")


def test_an_edited_message_is_sent_anew(chat: Chat) -> None:
    chat.ask("First", THOUGHT, DONE, DONE)
    chat.wait()
    chat.ask("Second")
    chat.wait()
    chat.page.locator(".message.user").first.hover()
    chat.page.get_by_role("button", name="Edit message").first.click()
    editor = chat.page.locator(".editor textarea")
    expect(editor).to_be_focused()
    editor.fill("Another")
    editor.press("Enter")
    chat.wait()
    expect(chat.page.locator(".user-text")).to_have_text("Another")
    expect(chat.page.locator(".message")).to_have_count(2)
    assert "Another" in chat.prompt()
    assert "First" not in chat.prompt()
    assert "Second" not in chat.prompt()


def test_settings_reach_the_request(chat: Chat) -> None:
    values = {"temperature": "0.5", "top_p": "0.75", "top_k": "7", "max_tokens": "500", "seed": "42"}
    chat.page.locator("#open-settings").click()
    for name, value in values.items():
        chat.page.locator(f"#set-{name}").fill(value)
    chat.page.locator("#set-thinking_budget").fill("3")
    chat.page.locator("#system").fill("Be brief.")
    chat.ask("Is it so?", THOUGHT)
    chat.wait()
    params = chat.server.engine.seen[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens, params.seed) == (0.5, 0.75, 7, 500, 42)
    expect(chat.answer.locator(".answer-body")).to_have_text("forced answer")
    assert "<system_setting>\nBe brief.\n</system_setting>" in chat.prompt()


def test_thinking_can_be_switched_off(chat: Chat) -> None:
    chat.page.locator("#thinking").click()
    expect(chat.page.locator("#thinking")).to_have_attribute("aria-pressed", "false")
    chat.ask("Is it so?", "Yes.\n</response>\n")
    chat.wait()
    assert chat.prompt().endswith("<response>\n")
    expect(chat.answer.locator(".answer-body")).to_have_text("Yes.")
    expect(chat.answer.locator(".thought")).to_have_count(0)


def test_a_wrong_setting_is_said_and_not_sent(chat: Chat) -> None:
    chat.page.locator("#open-settings").click()
    for name, value, sentence in (
        ("temperature", "11", "Temperature is 11: it must be a number from 0 to 10."),
        ("temperature", "hot", "Temperature is hot: it must be a number from 0 to 10."),
        ("top_p", "0", "Top p is 0: it must be a number above 0 and up to 1."),
        ("top_k", "1.5", "Top k is 1.5: it must be a whole number from -1 to 2147483647."),
        ("max_tokens", "0", "Max tokens is 0: it must be a whole number from 1 to 2147483647."),
    ):
        chat.page.locator(f"#set-{name}").fill(value)
        expect(chat.page.locator(f"#wrong-{name}")).to_have_text(sentence)
        expect(chat.page.locator(f"#set-{name}")).to_have_attribute("aria-invalid", "true")
    chat.ask("Is it so?", THOUGHT)
    chat.wait()
    expect(chat.answer.locator(".answer-body")).to_have_text("It is so.")
    assert chat.server.engine.seen[0].params.top_k != 1.5


def test_a_refusal_and_a_failure_are_sentences_with_a_way_on(chat: Chat) -> None:
    engine = chat.server.engine
    engine.queue_limit = 0
    chat.ask("Is it so?")
    expect(chat.page.locator(".trouble p")).to_have_text("0 requests are waiting. Try again in 2 s.")
    engine.queue_limit, engine.fail_with = 64, "The engine failed on this."
    chat.page.get_by_role("button", name="Try again").click()
    expect(chat.page.locator(".trouble p")).to_contain_text("The engine failed on this.")
    engine.fail_with = None
    engine.answers.clear()
    engine.answers.append(THOUGHT)
    chat.page.get_by_role("button", name="Try again").click()
    expect(chat.answer.locator(".answer-body")).to_have_text("It is so.")
    expect(chat.page.locator(".message")).to_have_count(2)


def test_an_answer_cut_by_the_limit_says_so(chat: Chat) -> None:
    chat.page.locator("#open-settings").click()
    chat.page.locator("#set-max_tokens").fill("5")
    chat.ask("Is it so?", THOUGHT)
    chat.wait()
    expect(chat.answer.locator(".note")).to_have_text(re.compile("^The tokens ran out before the answer began"))


def test_a_server_with_a_key_asks_for_it(protocol: ChatProtocol, opened: Opened) -> None:
    with serve(PausingEngine(protocol), protocol, api_keys=("schlüssel",)) as locked:
        chat = opened(locked)
        field = chat.page.locator(".notice input[type=password]")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(field).to_be_focused()
        expect(field).to_have_value("")
        field.fill("schlüssel")
        field.press("Enter")
        expect(chat.page.locator("#model")).to_have_text("tern-test")
        chat.ask("Is it so?", THOUGHT)
        expect(chat.answer.locator(".answer-body")).to_have_text("It is so.")
        chat.page.reload()
        expect(chat.page.locator("#model")).to_have_text("tern-test")
        chat.check()
        chat.page.close()
