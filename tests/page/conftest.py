"""What the tests of the page share: Chromium, a server over a scripted engine, and a page whose complaints are heard.

Chromium is the system's, or the one that TERN_CHROMIUM names; without it these tests are skipped. Nothing here waits
for a time: an engine stops at the token that a test names, and goes on when the test says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from tern.chat import ChatProtocol
from tests.server.server_fakes import Live, Running, ScriptedEngine, serve, write_tokenizer

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
    (event) => window.violations.push(`${event.effectiveDirective}: ${event.blockedURI} ${event.sample}`));
"""

expect.set_options(timeout=20_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs the browser."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, closed with the module: while it is open, Playwright runs an event loop on this thread."""
    named = os.environ.get("TERN_CHROMIUM")
    found = named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium found: install it, or name one in TERN_CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class PausingEngine(ScriptedEngine):
    """A scripted engine that stops after so many tokens of an answer, until its gate is opened."""

    pause_after: int | None = None

    def _turn(self, running: Running) -> None:
        super()._turn(running)
        if running.pushed == self.pause_after:
            self.pause_after = None
            self.gate.clear()


@pytest.fixture(scope="session")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> ChatProtocol:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return ChatProtocol.from_directory(directory)


@pytest.fixture(scope="module")
def module_server(protocol: ChatProtocol) -> Iterator[Live]:
    with serve(PausingEngine(protocol, max_model_len=2**20), protocol) as live:
        yield live


@pytest.fixture
def server(module_server: Live) -> Live:
    """A server whose engine has no script, no gate and no memory of earlier tests."""
    engine = module_server.engine
    engine.answers.clear()
    engine.seen.clear()
    engine.cancelled.clear()
    engine.queue_limit, engine.fail_with, engine.pause_after = 64, None, None
    engine.gate.set()
    return module_server


@dataclass
class Chat:
    """The page in a browser, by what its user sees."""

    page: Page
    server: Live
    complaints: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Load the page and wait until it knows the model."""
        self.page.goto(self.server.url)
        expect(self.page.locator("#model")).to_have_text("tern-test")

    @property
    def box(self) -> Locator:
        return self.page.locator("#prompt")

    @property
    def answer(self) -> Locator:
        """The last answer."""
        return self.page.locator(".message.answer").last

    def ask(self, text: str, *answers: str) -> None:
        """Send a message; the engine says `answers`, one for each request. Returns at once."""
        self.server.engine.answers.extend(answers)
        self.box.fill(text)
        self.box.press("Enter")

    def wait(self) -> None:
        """Until the answer is there, or the page waits for its user."""
        expect(self.page.locator("#stop")).to_be_hidden()
        expect(self.page.locator(".message.answer[aria-busy=true]")).to_have_count(0)

    def hear(self, message: ConsoleMessage) -> None:
        """Note what the browser complains of; an answer other than 200 is the test's own doing."""
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def check(self) -> None:
        """Nothing was refused by the page's policy, nothing failed."""
        self.complaints += self.page.evaluate("window.violations")
        assert self.complaints == []

    def prompt(self, index: int = -1) -> str:
        """What the engine was given to read."""
        tokenizer = self.server.state.protocol.tokenizer
        return str(tokenizer.decode(list(self.server.engine.seen[index].prompt_token_ids), skip_special_tokens=False))


Opened = Callable[..., Chat]


@pytest.fixture
def opened(browser: Browser, server: Live) -> Iterator[Opened]:
    """Opens pages, each in a browser that knows of no other; their complaints fail the test."""
    chats: list[Chat] = []

    def open_page(live: Live = server, **context: object) -> Chat:
        fresh = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1200, "height": 800}, **context})  # type: ignore[arg-type]
        page = fresh.new_page()
        page.add_init_script(WATCH)
        chat = Chat(page, live)
        page.on("console", chat.hear)
        page.on("pageerror", lambda error: chat.complaints.append(str(error)))
        chats.append(chat)
        page.goto(live.url)
        return chat

    yield open_page
    for chat in chats:
        if not chat.page.is_closed():
            chat.check()
        chat.page.context.close()


@pytest.fixture
def chat(opened: Opened) -> Chat:
    """The page, English, on a desk."""
    chat = opened()
    expect(chat.page.locator("#model")).to_have_text("tern-test")
    return chat
