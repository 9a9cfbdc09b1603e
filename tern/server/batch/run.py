"""A batch's lines through the application, several at a time. Knows ASGI; what a body means is its route's business."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.types import Message

from tern.errors import EngineUnavailableError
from tern.server.batch.answers import AnswerFile
from tern.server.batch.lines import FaultyLine, Line
from tern.server.body import JsonObject

UNAVAILABLE = 503


@dataclass
class Tally:
    """What one run did: lines that it found answered, lines that it answered, and the tokens of those."""

    earlier: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, body: JsonObject) -> None:
        """Count the tokens of one answer, under OpenAI's older or newer names, or Anthropic's, where hits are apart."""
        usage = body.get("usage") or {}
        self.prompt_tokens += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        self.prompt_tokens += usage.get("cache_read_input_tokens", 0)
        self.completion_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))


def batch_urls(app: FastAPI) -> frozenset[str]:
    """The paths that a batch may ask: all below /v1 that take a POST."""
    paths = app.openapi()["paths"]
    return frozenset(path for path, methods in paths.items() if path.startswith("/v1/") and "post" in methods)


async def run_batch(
    app: FastAPI,
    lines: Iterator[Line | FaultyLine],
    answers: AnswerFile,
    tally: Tally,
    *,
    concurrency: int,
    on_line: Callable[[], None],
) -> None:
    """Answer every line that `answers` lacks, `concurrency` at a time, in whatever order they are done.

    `on_line` is called after each line, found or answered. Raises `EngineUnavailableError` when the engine takes no
    more requests; the lines that it did not answer are then left for another run, as they are on cancellation.
    """

    async def work() -> None:
        for line in lines:  # one iterator for all workers
            if answers.has(line):
                tally.earlier += 1
            elif isinstance(line, FaultyLine):
                answers.write(line)
                tally.answered += 1
            else:
                await _answer(app, line, answers, tally)
            on_line()

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(work())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


async def _answer(app: FastAPI, line: Line, answers: AnswerFile, tally: Tally) -> None:
    status, raw = await post(app, line.url, line.body)
    body = json.loads(raw)
    if status == UNAVAILABLE:
        raise EngineUnavailableError(body["error"]["message"])
    answers.write(line, status, body)
    tally.answered += 1
    tally.add(body)


async def post(app: FastAPI, path: str, body: bytes) -> tuple[int, bytes]:
    """POST JSON to the application -> status and body of its answer. Cancelled, it is a client that leaves."""
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, parts = 0, []

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()  # this client never closes the connection
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": ("localhost", None),
    }
    try:
        await app(scope, receive, send)
    except Exception:
        if not status:  # else it has answered with 500 and logged why
            raise
    return status, b"".join(parts)
