"""What the page keeps and how it looks: conversations, export, language, theme, phones, keyboard, accessibility."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.page.conftest import Chat, Opened

ANSWER = "A thought.\n</think>\n\n<response>\nThe answer is **{}**.\n\n```python\nprint({!r})\n```\n</response>\n"
CALL = 'I ask.\n</think>\n\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>\n'
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def say(chat: Chat, text: str, answer: str) -> None:
    """One message and its whole answer."""
    chat.ask(text, ANSWER.format(answer, answer))
    chat.wait()
    expect(chat.answer.locator("strong")).to_have_text(answer)


def test_conversations_survive_a_reload(chat: Chat) -> None:
    say(chat, "One?", "first")
    chat.page.locator("#new").click()
    say(chat, "Two?", "second")
    rows = chat.page.locator("#conversations .open")
    expect(rows).to_have_text(["Two?", "One?"])
    chat.open()
    expect(rows).to_have_text(["Two?", "One?"])
    rows.last.click()
    expect(chat.answer.locator("strong")).to_have_text("first")
    expect(chat.answer.locator(".counts")).to_contain_text("first token")
    say(chat, "More?", "third")
    assert "One?" in chat.prompt()
    assert "A thought." in chat.prompt()
    assert "More?" in chat.prompt()


def test_an_answer_that_a_reload_cut_off_can_be_continued(chat: Chat) -> None:
    engine = chat.server.engine
    engine.gate.clear()
    chat.ask("One?", ANSWER.format("first", "first"))
    expect(chat.page.locator("#conversations .open")).to_have_text("One?")
    engine.wait_until(lambda: len(engine.seen) == 1)
    chat.open()
    engine.wait_until(lambda: len(engine.cancelled) == 1)
    engine.gate.set()
    chat.page.locator("#conversations .open").click()
    engine.answers.append(ANSWER.format("again", "again"))
    chat.page.get_by_role("button", name=re.compile("Continue|Answer again")).last.click()
    expect(chat.answer.locator("strong")).to_have_text("again")


def test_rename_search_delete_and_undo(chat: Chat) -> None:
    say(chat, "One?", "apple")
    chat.page.locator("#new").click()
    say(chat, "Two?", "pear")
    rows = chat.page.locator("#conversations .open")
    rows.first.dblclick()
    chat.page.get_by_label("Title").fill(EVIL)
    chat.page.get_by_label("Title").press("Enter")
    expect(rows).to_have_text([EVIL, "One?"])
    expect(chat.page.locator("#title")).to_have_text(EVIL)
    for words, found in (("apple", ["One?"]), ("ONERROR", [EVIL]), ("a thought", [EVIL, "One?"]), ("nowhere", [])):
        chat.page.locator("#search").fill(words)
        expect(rows).to_have_text(found)
    expect(chat.page.locator("#conversations")).to_have_text("Nothing found")
    chat.page.locator("#search").fill("")
    chat.page.get_by_role("button", name="Delete “One?”").click(force=True)
    expect(rows).to_have_text([EVIL])
    chat.page.get_by_role("button", name="Undo").click()
    expect(rows).to_have_count(2)
    chat.open()
    expect(rows).to_have_count(2)
    assert chat.page.locator("#conversations img, #conversations script, #bar img").count() == 0


def test_export_as_markdown_and_json_and_import(chat: Chat, opened: Opened, tmp_path: Path) -> None:
    chat.page.locator("#tools-chip").click()
    chat.page.get_by_role("checkbox", name="calculator").check()
    chat.ask("Six times seven?", CALL, ANSWER.format("42", "42"))
    expect(chat.answer.locator("strong")).to_have_text("42")
    chat.wait()

    def download(name: str) -> Path:
        chat.page.locator("#more").click()
        with chat.page.expect_download() as found:
            chat.page.get_by_role("button", name=name).click()
        path = tmp_path / found.value.suggested_filename
        found.value.save_as(path)
        return path

    markdown = download("Export as Markdown").read_text(encoding="utf-8")
    assert markdown.startswith("# Six times seven?\n\n## You\n\nSix times seven?\n\n## tern-test\n\n<details>")
    assert '**Call** `calculator`\n\n```json\n{"expression": "6*7"}\n```' in markdown
    assert '**Result** `calculator`\n\n```\n{"result": 42}\n```' in markdown
    exported = download("Export as JSON")
    assert exported.name == "Six-times-seven.json"
    (kept,) = json.loads(exported.read_text(encoding="utf-8"))["conversations"]
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant", "tool", "assistant"]

    other = opened()
    expect(other.page.locator("#model")).to_have_text("tern-test")  # or its script may not listen yet
    other.page.locator("#import-file").set_input_files(exported)
    expect(other.page.locator("#conversations .open")).to_have_text("Six times seven?")
    expect(other.page.locator(".call-result")).to_contain_text("42")
    expect(other.answer.locator("strong")).to_have_text("42")
    say(other, "More?", "yes")
    assert '<tool_response>\n{"result": 42}' in other.prompt()


def test_another_file_is_not_imported(chat: Chat) -> None:
    for number, text in enumerate(
        ("no json", "{}", '{"format": "tern-conversations", "conversations": [{}]}', "[1]", "null")
    ):
        file = {"name": f"{number}.json", "mimeType": "application/json", "buffer": text.encode()}
        chat.page.locator("#import-file").set_input_files(file)  # type: ignore[arg-type]
        expect(chat.page.locator(".notice").last).to_contain_text(
            f"{number}.json is no file of exported conversations."
        )
    expect(chat.page.locator("#conversations .open")).to_have_count(0)


def test_language_is_the_browser_s_and_can_be_switched(opened: Opened) -> None:
    chat = opened(locale="zh-CN")
    expect(chat.page.locator("html")).to_have_attribute("lang", "zh-Hans")
    expect(chat.page.locator("#new")).to_have_text("新对话")
    chat.page.locator("#open-settings").click()
    chat.page.get_by_label("语言").select_option("English")
    expect(chat.page.locator("#new")).to_have_text("New conversation")
    expect(chat.page.locator("#language")).to_be_focused()
    chat.page.reload()
    expect(chat.page.locator("#new")).to_have_text("New conversation")
    expect(chat.page.locator("html")).to_have_attribute("lang", "en")


def test_both_languages_say_everything(chat: Chat) -> None:
    names = """async () => {
        const main = document.querySelector("script[type=module]").src;
        const { LANGUAGES } = await import(main.replace("main.js", "texts.js"));
        return Object.values(LANGUAGES).map(([, texts]) => Object.entries(texts).map(
            ([name, text]) => [name, [...text.matchAll(/\\{\\w+\\}/g)].map(String).sort().join("")]).sort());
    }"""
    english, chinese = chat.page.evaluate(names)
    assert english == chinese


def test_theme_is_the_system_s_and_can_be_switched(opened: Opened) -> None:
    chat = opened(color_scheme="dark")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = chat.page.evaluate(ground)
    assert dark == "rgb(20, 24, 27)"
    chat.page.locator("#open-settings").click()
    chat.page.get_by_label("Theme").select_option("light")
    assert chat.page.evaluate(ground) == "rgb(251, 251, 249)"
    chat.page.reload()
    assert chat.page.evaluate(ground) == "rgb(251, 251, 249)"


def test_a_phone_needs_no_sideways_scrolling(opened: Opened) -> None:
    chat = opened(viewport={"width": 360, "height": 640}, has_touch=True)
    wide = "x" * 300
    table = "| a | b |\n|---|---|\n| " + "word " * 60 + f"| {wide} |\n"
    formula = "$$" + " + ".join(f"x_{{{n}}}^2" for n in range(60)) + "$$"
    text = f"t {wide}\n</think>\n\n<response>\n{wide}\n\n{table}\n```\n{wide}\n```\n\n{formula}\n</response>\n"
    chat.ask(f"Long {wide}", text)
    chat.wait()
    expect(chat.answer.locator(".katex-display")).to_be_visible()
    overflow = (
        "[document.documentElement, document.querySelector('#messages')].some(each => each.scrollWidth > innerWidth)"
    )
    assert not chat.page.evaluate(overflow)
    chat.page.locator("#open-sidebar").click()
    expect(chat.page.locator("#search")).to_be_focused()
    expect(chat.page.locator("#main")).to_have_attribute("inert", "")
    assert not chat.page.evaluate(overflow)
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#sidebar")).to_be_hidden()
    chat.page.locator("#open-settings").click()
    expect(chat.page.locator("#settings")).to_be_visible()
    assert not chat.page.evaluate(overflow)
    box = chat.page.locator("#settings").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_everything_can_be_done_from_the_keyboard(chat: Chat) -> None:
    keyboard, page = chat.page.keyboard, chat.page
    focused = "document.activeElement.id"
    chat.server.engine.answers.extend([ANSWER.format("one", 1), ANSWER.format("two", 2)])
    keyboard.type("First line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    keyboard.press("Enter")
    chat.wait()
    assert "First line\nsecond line" in chat.prompt()
    keyboard.press("ArrowUp")
    expect(page.locator(".editor textarea")).to_be_focused()
    keyboard.press("Escape")
    keyboard.press("/")
    assert page.evaluate(focused) == "prompt"
    keyboard.press("Control+k")
    assert page.evaluate(focused) == "search"
    keyboard.press("Alt+s")
    expect(page.locator("#settings")).to_be_visible()
    keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    keyboard.press("Alt+n")
    expect(page.locator(".welcome")).to_be_visible()
    assert page.evaluate(focused) == "prompt"
    page.locator("#open-settings").focus()
    keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    page.locator("#conversations .open").focus()
    keyboard.press("Enter")
    expect(chat.answer.locator("strong")).to_have_text("one")


def test_enter_that_chooses_a_word_sends_nothing(chat: Chat) -> None:
    chat.box.fill("ni")
    chat.box.evaluate(
        """box => box.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true}))"""
    )
    expect(chat.box).to_have_value("ni")
    expect(chat.page.locator(".message")).to_have_count(0)


def test_tab_goes_through_the_page_in_the_order_it_is_read(chat: Chat) -> None:
    say(chat, "One?", "first")
    chat.page.evaluate("document.activeElement.blur(), getSelection().removeAllRanges()")
    chat.page.locator(".skip").focus()
    order = ["skip"]
    for _ in range(40):
        chat.page.keyboard.press("Tab")
        order.append(str(chat.page.evaluate("document.activeElement.id || document.activeElement.className")))
        if order[-1] == "send":
            break
    wanted = [
        "skip",
        "new",
        "search",
        "open",
        "more",
        "open-settings",
        "messages",
        "prompt",
        "thinking",
        "tools-chip",
        "send",
    ]
    assert [name for name in order if name in wanted] == wanted


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_of_accessibility(opened: Opened, scheme: str) -> None:
    chat = opened(color_scheme=scheme, reduced_motion="reduce")
    axe = Axe()

    def check(place: str) -> None:
        violations = axe.run(chat.page).response["violations"]
        serious = [
            (rule["id"], [node["html"][:200] + str(node["any"][:1]) for node in rule["nodes"]])
            for rule in violations
            if rule["impact"] in ("serious", "critical")
        ]
        assert serious == [], place

    expect(chat.page.locator(".welcome")).to_be_visible()
    check("first page")
    chat.page.locator("#tools-chip").click()
    chat.page.get_by_role("checkbox", name="calculator").check()
    chat.page.locator("#new-tool").click()
    check("settings")
    chat.ask(
        "Six times seven?",
        CALL,
        ANSWER.format("42", "42").replace("The", "A $x^2$ [link](https://example.org).\n\nThe"),
    )
    expect(chat.answer.locator("strong")).to_have_text("42")
    expect(chat.answer.locator(".hljs-built_in, .hljs-string").first).to_be_visible()
    expect(chat.answer.locator(".katex").first).to_be_visible()
    chat.page.locator(".thought summary").first.click()
    chat.wait()
    check("conversation")
