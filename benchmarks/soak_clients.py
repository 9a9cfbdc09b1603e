"""What the clients of a soak do: ask and compare, ask nonsense, read nothing, leave. Knows HTTP, and right answers.

Each errand is an async function of a `Crowd`; it raises `WrongAnswerError` if the server did what it must not.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOO_MANY = 429


class WrongAnswerError(Exception):
    """The server answered what it must not, in words for the report."""


@dataclass(frozen=True)
class Question:
    """A request whose answer is always the same, and that answer: what the server said to it alone."""

    path: str
    body: dict[str, Any]
    answer: str = ""


@dataclass
class Crowd:
    """The server at `url` as its clients see it, the questions they ask, and a count of what they did."""

    url: str
    http: httpx.AsyncClient
    questions: list[Question]
    most_tokens: int
    draw: random.Random
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def live(self, until: float) -> None:
        """One client: errand after errand until that moment of the event loop's clock."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            errand = self.draw.choices(list(ERRANDS), list(ERRANDS.values()))[0]
            name = errand.__name__
            try:
                async with asyncio.timeout(600):
                    outcome = await errand(self)
                self.done[f"{name}: {outcome}"] += 1
                if outcome == "refused":
                    await asyncio.sleep(self.draw.random())
            except WrongAnswerError as error:
                self.wrong.append(f"{name}: {error}")
            except (httpx.HTTPError, OSError, TimeoutError) as error:
                self.wrong.append(f"{name}: {type(error).__name__} {error}")


async def text_of(http: httpx.AsyncClient, question: Question, *, stream: bool) -> str | None:
    """All that is said in the answer, thought and answer apart; None if the queue was full."""
    body = {**question.body, "stream": stream}
    if not stream:
        response = await http.post(question.path, json=body)
        return _checked(response, question.path)
    parts = ["", ""]
    async with http.stream("POST", question.path, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return _checked(response, question.path)
        last = ""
        async for line in response.aiter_lines():
            last = line or last
            if line.startswith("data: {"):
                _add_chunk(json.loads(line.removeprefix("data: ")), parts)
    if last != "data: [DONE]":
        raise WrongAnswerError(f"a stream ended with {last[:80]!r}")
    return "|".join(parts)


def _add_chunk(chunk: dict[str, Any], parts: list[str]) -> None:
    if "error" in chunk:
        raise WrongAnswerError(f"a stream ended with the error {chunk['error'].get('message')!r}")
    for choice in chunk["choices"]:
        said = choice.get("delta", {"content": choice.get("text")})
        parts[0] += said.get("reasoning_content") or ""
        parts[1] += said.get("content") or ""


def _checked(response: httpx.Response, path: str) -> str | None:
    if response.status_code == TOO_MANY and int(response.headers["retry-after"]) > 0:
        return None
    if response.status_code != 200:
        raise WrongAnswerError(f"{path} answered {response.status_code}: {response.text[:200]}")
    choice = response.json()["choices"][0]
    said = choice.get("message") or {"content": choice["text"]}
    return "|".join([said.get("reasoning_content") or "", said.get("content") or ""])


async def ask(crowd: Crowd) -> str:
    """Ask a question, whole or streamed, and compare the answer with what it was alone."""
    question = crowd.draw.choice(crowd.questions)
    answer = await text_of(crowd.http, question, stream=crowd.draw.random() < 0.5)
    if answer is None:
        return "refused"
    if answer != question.answer:
        raise WrongAnswerError(f"alone {question.answer[:80]!r}, in the crowd {answer[:80]!r}")
    return "the same answer"


async def leave(crowd: Crowd) -> str:
    """Ask for a long stream and leave within it, or before it begins."""
    body = {**crowd.draw.choice(crowd.questions).body, "max_tokens": crowd.most_tokens, "stream": True}
    chunks = crowd.draw.randrange(12)
    async with crowd.http.stream("POST", COMPLETIONS if "prompt" in body else CHAT, json=body) as response:
        async for _ in response.aiter_lines():
            chunks -= 1
            if chunks < 0:
                break
    return "left"


async def talk_nonsense(crowd: Crowd) -> str:
    """Send what cannot be served; it must be a 400 that names it."""
    bodies: list[bytes] = [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"messages": [{"role": "user", "content": "x"}], "temperature": "warm"}).encode(),
        json.dumps({"messages": [{"role": "wizard"}], "prompt": 5}).encode(),
        json.dumps(
            {"prompt": "long " * 200_000, "messages": [{"role": "user", "content": "long " * 200_000}]}
        ).encode(),
        json.dumps({"prompt": "x", "n": 10**9, "messages": []}).encode(),
    ]
    path = crowd.draw.choice([COMPLETIONS, CHAT])
    response = await crowd.http.post(path, content=crowd.draw.choice(bodies))
    if response.status_code != 400 or not response.json()["error"]["message"]:
        raise WrongAnswerError(f"nonsense got {response.status_code}: {response.text[:200]}")
    return "refused by name"


async def read_nothing(crowd: Crowd) -> str:
    """Ask for a long stream over a bare connection, read nothing of it for a while, and hang up."""
    body = {"prompt": "x", "max_tokens": crowd.most_tokens, "ignore_eos": True, "stream": True, "logprobs": 5}
    return await _bare(crowd, json.dumps(body).encode(), cut=0, pause=3.0)


async def break_off(crowd: Crowd) -> str:
    """Hang up in the middle of a request's body."""
    return await _bare(crowd, json.dumps({"prompt": "x" * 5000}).encode(), cut=3000, pause=0.2)


async def _bare(crowd: Crowd, body: bytes, *, cut: int, pause: float) -> str:
    address = urlsplit(crowd.url)
    _, writer = await asyncio.open_connection(address.hostname, address.port, limit=1024)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[: len(body) - cut])
    await asyncio.sleep(pause * crowd.draw.random())
    writer.transport.abort()
    return "hung up"


ERRANDS: dict[Callable[[Crowd], Awaitable[str]], float] = {
    ask: 12,
    leave: 3,
    talk_nonsense: 3,
    read_nothing: 1,
    break_off: 1,
}
"""What clients do, and how often beside the others."""


def make_questions(length: int) -> list[Question]:
    """Greedy and seeded requests of many sizes for a server whose sequences have `length` tokens at most."""
    tokens = max(1, min(64, length // 8))
    texts = ["Who are you?", "What is 1958 + 4783?", "你好！介绍一下你自己。", "Count to ten. " * 4, "x"]
    texts += [f"Tell me about number {number}, and then about the next one." for number in range(10)]
    greedy = {"temperature": 0, "max_tokens": tokens}
    seeded = {"temperature": 1.0, "seed": 7, "max_tokens": tokens}
    found = [Question(CHAT, {"messages": [{"role": "user", "content": text}], **greedy}) for text in texts]
    found += [Question(COMPLETIONS, {"prompt": text, **seeded}) for text in texts]
    for share in (4, 2):
        ids = random.Random(share).choices(range(100, 300), k=length // share)
        found.append(Question(COMPLETIONS, {"prompt": ids, **greedy, "ignore_eos": True}))
    return found
