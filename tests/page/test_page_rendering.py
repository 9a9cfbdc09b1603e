"""What the page makes of a model's text, which nobody vouches for, and of a long one; its calculator and its clock."""

from __future__ import annotations

import random
from typing import Any

from playwright.sync_api import expect

from tests.page.conftest import Chat

EVIL = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'>",
    "[link](javascript:window.hit=3)",
    "[link](JaVaScRiPt&colon;window.hit=4)",
    "[link](data:text/html,<script>window.hit=5</script>)",
    "[link](vbscript:x 'title')",
    "![picture](https://example.org/x.png)",
    "![picture](javascript:window.hit=6)",
    "<svg/onload=window.hit=7>",
    '<https://example.org/"onmouseover=window.hit=8>',
    "```<img src=x onerror=window.hit=9>\n<img src=x onerror=window.hit=10>\n```",
    "```python onload=window.hit=11\nx\n```",
    "$\\href{javascript:window.hit=12}{x}$ $\\url{javascript:window.hit=12}$",
    "$\\htmlStyle{color:red}{x} \\includegraphics{https://example.org/x.png}$",
    "$\\pmb{x} \\fcolorbox{red}{blue}{y} \\textcolor{green}{z}$ $\\undefined{x$",
    "| <b>a</b> | b |\n|:-:|--:|\n| <i onclick=window.hit=13>x</i> | y |",
    "<style>body { display: none }</style>",
    "<iframe src=https://example.org></iframe>",
    "&lt;script&gt;window.hit = 14&lt;/script&gt;",
    "[x]: javascript:window.hit=15\n\n[x]",
]

MARKUP = """\
# Heading

A paragraph with *emphasis*, `code`, <b>no markup</b> and https://example.org/a_b.

1. one

2. two
   - inner
   - more

   still two

* * *

```python
def f(x):
    return x
```

| a | b |
|---|--:|
| 1 | 2 |

> quoted
lazily

\\[ a
+ b \\]

Text $x$ and $$y$$ end
===

- last
"""


def run(chat: Chat, name: str, code: str) -> Any:
    """What `code`, a function of the page's module `name`, returns."""
    script = f"""async () => {{
        const address = document.querySelector("script[type=module]").src.replace("main.js", {name!r});
        return ({code})(await import(address));
    }}"""
    return chat.page.evaluate(script)


def answer(text: str) -> str:
    """The model's whole answer with this content."""
    return f"Hm.\n</think>\n\n<response>\n{text}\n</response>\n"


def test_hostile_text_is_only_text(chat: Chat) -> None:
    asked: list[str] = []
    chat.page.on("request", lambda request: asked.append(request.url))
    chat.ask("<img src=x onerror='window.hit = 0'>", answer("\n\n".join(EVIL)).replace("Hm.", EVIL[1]))
    chat.wait()
    expect(chat.answer.locator(".katex").first).to_be_visible()
    chat.answer.locator(".thought summary").click()
    body = chat.answer
    assert chat.page.evaluate("window.hit") is None
    assert (
        body.locator("script, img, iframe, style, object, form, .answer-body svg:not(.icon):not(.katex svg)").count()
        == 0
    )
    links = body.locator(".answer-body a[href]")
    addresses = links.evaluate_all("links => links.map(link => [link.protocol, link.rel, link.target])")
    assert addresses
    assert all(each == ["https:", "noopener noreferrer nofollow", "_blank"] for each in addresses)
    handlers = """nodes => nodes.filter(node => !node.closest(".katex")).flatMap(node => [...node.attributes])
        .filter(attribute => /^on|^style$/.test(attribute.name)).length"""
    assert body.locator("*").evaluate_all(handlers) == 0
    expect(body.locator(".thought-body")).to_have_text(EVIL[1])
    assert all(url.startswith(chat.server.url) for url in asked)


def test_formulas_code_tables_and_links(chat: Chat) -> None:
    chat.ask("Show", answer(MARKUP))
    chat.wait()
    body = chat.answer.locator(".answer-body")
    expect(body.locator(".katex")).to_have_count(3)
    expect(body.locator(".katex-display")).to_have_count(2)
    expect(body.locator(".hljs-keyword")).to_have_text(["def", "return"])
    expect(body.locator("h3").first).to_have_text("Heading")
    expect(body.locator("td.right")).to_have_text("2")
    expect(body.locator("b")).to_have_count(0)
    expect(body.locator("a")).to_have_attribute("href", "https://example.org/a_b")
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    body.get_by_role("button", name="Copy").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return x\n"
    expect(body.get_by_role("button", name="Copied")).to_be_visible()


FORMULAS = [
    ("It costs $5 and $6.", 0),
    ("$a$ and $b$", 2),
    ("\\(a\\) and \\[b\\]", 2),
    ("`$a$` and \\$a$", 0),
    ("$ a $ or $", 0),
    ("$$\na\n\nb\n$$", 1),
    ("- item\n\n  $$x$$\n", 1),
    ("$$a$$ and text", 1),
    ("\\[ never closed", 1),
    ("$\\frac{1}{2$", 1),
]


def test_what_is_a_formula(chat: Chat) -> None:
    texts = [text for text, _ in FORMULAS]
    drawn = run(chat, "markdown.js", f"({{ md }}) => {texts!r}.map((text) => md.render(text))")
    assert [html.count('class="math') for html in drawn] == [formulas for _, formulas in FORMULAS], drawn


def test_streamed_text_looks_like_whole_text(chat: Chat) -> None:
    """However the text is cut, and whenever it is drawn, the elements are those of the whole text."""
    rng = random.Random(7)
    cuts = [sorted(rng.sample(range(1, len(MARKUP)), 30)) for _ in range(4)] + [list(range(1, len(MARKUP)))]
    code = f"""async ({{ GrowingMarkdown }}) => {{
        const text = {MARKUP!r}, drawn = [];
        const frame = window.requestAnimationFrame;
        for (const cuts of [[], ...{cuts}]) {{
            const element = document.createElement("div");
            const growing = new GrowingMarkdown(element);
            let tick;
            window.requestAnimationFrame = (callback) => (tick = callback, 1);
            for (const cut of cuts) {{
                growing.show(text.slice(0, cut));
                tick?.(Infinity);
            }}
            growing.finish(text);
            window.requestAnimationFrame = frame;
            drawn.push(element);
        }}
        const quiet = async () => {{
            const plain = (each) => each.querySelectorAll(".hljs-keyword").length < 2;
            const busy = () => drawn.some((each) => each.querySelector(".math:not(:has(.katex))") || plain(each));
            while (busy()) await new Promise(frame);
        }};
        await quiet();
        return drawn.map((each) => each.innerHTML.replace(/ tabindex="0"/g, ""));
    }}"""
    whole, *streamed = run(chat, "growing.js", code)
    assert "<ol>" in whole
    assert whole.count("<ol") == 1
    for cut, each in zip(cuts, streamed, strict=True):
        assert each == whole, cut


def test_a_long_answer_is_drawn_block_by_block(chat: Chat) -> None:
    """What has been drawn is left alone: the same elements stand there when 20 000 tokens have come."""
    engine = chat.server.engine
    paragraphs = "\n\n".join(f"Paragraph {n} of many words in a row." for n in range(1200))
    text = answer(paragraphs)
    assert len(chat.server.state.protocol.tokenizer.encode(text)) > 20_000
    engine.pause_after = 2000
    chat.ask("Write", text)
    first = chat.answer.locator(".answer-body p").first
    expect(chat.answer.locator(".answer-body p").nth(20)).to_be_visible()
    first.evaluate("node => node.marked = true")
    engine.gate.set()
    expect(chat.answer.locator(".answer-body p")).to_have_count(1200, timeout=60_000)
    chat.wait()
    assert first.evaluate("node => node.marked") is True
    expect(chat.answer.locator(".answer-body p").last).to_have_text("Paragraph 1199 of many words in a row.")
    assert (
        chat.page.evaluate(
            "(box => box.scrollHeight - box.scrollTop - box.clientHeight)(document.querySelector('#messages'))"
        )
        < 60
    )


SUMS = [
    ("1+2*3", 7),
    ("(1+2)*3", 9),
    ("2^3^2", 512),
    ("-2^2", -4),
    ("2^-1", 0.5),
    ("0.1+0.2", 0.3),
    ("10 % 4", 2),
    ("7 × 6 ÷ 3 − 1", 13),
    ("2**10", 1024),
    ("sqrt(16) + abs(-3)", 7),
    ("ln(e) + log(1000)", 4),
    ("--1", 1),
    (".5 + 1.e2", 100.5),
    ("1e3", 1000),
    ("9007199254740991", 9007199254740990),
    ("（1+2）×3", 9),
]


def test_the_calculator(chat: Chat) -> None:
    expressions = [expression for expression, _ in SUMS]
    values = run(chat, "calculator.js", f"({{ calculate }}) => {expressions!r}.map(calculate)")
    assert dict(zip(expressions, values, strict=True)) == dict(SUMS)


NO_SUMS = [
    "",
    "1+",
    "1 2",
    "(1",
    "1)",
    "1/0",
    "1%0",
    "alert(1)",
    "x",
    "sqrt",
    "1;2",
    "this",
    "constructor",
    "[]",
    "2^10000",
    "sqrt(-1)",
    "1..2",
]


def test_what_the_calculator_refuses(chat: Chat) -> None:
    code = f"""({{ calculate }}) => {NO_SUMS!r}.map((text) => {{
        try {{ return calculate(text); }} catch (error) {{ return error.message; }} }})"""
    for expression, said in zip(NO_SUMS, run(chat, "calculator.js", code), strict=True):
        assert str(said).startswith(("The expression", "The result")), expression


def test_the_calculator_has_limits(chat: Chat) -> None:
    texts = ["(" * 400, "-" * 400 + "1", "1^" * 200 + "1", "1+" * 300 + "1"]
    code = f"""({{ calculate }}) => {texts!r}.map((text) => {{
        try {{ return calculate(text); }} catch (error) {{ return error.message; }} }})"""
    deep, signs, powers, long = run(chat, "calculator.js", code)
    assert all("nested too deeply" in each for each in (deep, signs, powers))
    assert long == "The expression has 601 characters: at most 500 are read."


def test_the_clock(chat: Chat) -> None:
    code = """({ timeAt }) => ["Tokyo", "北京", "San Francisco, CA", "new york", "Europe/Oslo", "UTC"].map(
        (place) => timeAt(place, new Date("2026-01-15T18:05:00Z")))"""
    times = [(each["date"], each["hour"], each["minute"]) for each in run(chat, "clock.js", code)]
    assert times == [
        ("2026-01-16", 3, 5),
        ("2026-01-16", 2, 5),
        ("2026-01-15", 10, 5),
        ("2026-01-15", 13, 5),
        ("2026-01-15", 19, 5),
        ("2026-01-15", 18, 5),
    ]
    refused = run(
        chat, "clock.js", "({ timeAt }) => { try { timeAt('Atlantis', new Date()) } catch (e) { return e.message } }"
    )
    assert refused == "The clock does not know the place atlantis."


def test_the_counters(chat: Chat) -> None:
    code = """({ AnswerWriter, emptyAnswer, speed }) => {
        const answer = emptyAnswer(), writer = new AnswerWriter(answer, 1000);
        const take = (now, delta, completion_tokens, finish_reason = null) => {
            const usage = { prompt_tokens: 9, completion_tokens };
            writer.take({ choices: [{ delta, finish_reason }], usage }, now);
        };
        take(1000, { role: "assistant", content: "" }, 0);
        take(1500, { reasoning_content: "a" }, 1);
        const early = speed(answer.stats) ?? null;
        take(2500, { reasoning_content: "b" }, 6);
        take(3000, { content: "c" }, 8);
        take(3500, { content: "d" }, 11, "stop");
        const usage = { prompt_tokens: 9, completion_tokens: 12, prompt_tokens_details: { cached_tokens: 4 } };
        writer.take({ choices: [], usage: { ...usage, completion_tokens_details: { reasoning_tokens: 7 } } }, 3600);
        writer.end(4000);
        return [answer, speed({ ...answer.stats, completion: 11 }), early];
    }"""
    answer, speed, early = run(chat, "answer.js", code)
    assert (answer["reasoning"], answer["content"], answer["finish"]) == ("ab", "cd", "stop")
    times = {"start": 1000, "first": 1500, "last": 3500, "thoughtStart": 1500, "thoughtEnd": 3000}
    assert answer["stats"] == {**times, "prompt": 9, "cached": 4, "completion": 12, "thought": 7}
    assert (speed, early) == (5, None)


def test_events_may_be_cut_anywhere(chat: Chat) -> None:
    text = ': keep-alive\n\ndata: {"a": "北京"}\n\ndata: two\r\n\r\ndata: [DONE]\n\n'
    code = f"""async ({{ eventData }}) => {{
        const bytes = new TextEncoder().encode({text!r}), all = [];
        for (let size = 1; size <= bytes.length; size++) {{
            const pieces = [];
            for (let at = 0; at < bytes.length; at += size) pieces.push(bytes.slice(at, at + size));
            const found = [];
            const start = (to) => (pieces.forEach((piece) => to.enqueue(piece)), to.close());
            for await (const data of eventData(new ReadableStream({{ start }}))) found.push(data);
            all.push(found);
        }}
        return all;
    }}"""
    for found in run(chat, "api.js", code):
        assert found == ['{"a": "北京"}', "two", "[DONE]"]
