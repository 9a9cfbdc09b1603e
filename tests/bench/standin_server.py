"""A server that plays an OpenAI-compatible one: it answers as each test scripts it, and keeps what it was sent."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

DONE = "data: [DONE]\n\n"


def event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@dataclass
class StandInServer:
    """Counts a prompt as `template_tokens` and `tokens_a_word` for each word.

    `streams`: for each streamed request in turn (the last for all that follow) the status and the body to send, None
    for a whole answer. `status` answers everything else instead of 200; `refuses_ignore_eos` as OpenAI's API does.
    """

    models: list[str] = field(default_factory=lambda: ["ernie"])
    tokens_a_word: int = 2
    template_tokens: int = 5
    refuses_ignore_eos: bool = False
    counts: bool = True
    status: int = 200
    streams: list[tuple[int, str] | None] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def usage(self, prompt: str, output: int) -> dict[str, int]:
        tokens = self.template_tokens + self.tokens_a_word * len(prompt.split())
        return {"prompt_tokens": tokens, "completion_tokens": output, "total_tokens": tokens + output}

    def answer(self, body: dict[str, Any]) -> tuple[int, str]:
        """Status and body of one completion, streamed or whole."""
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        with self.lock:
            self.bodies.append(body)
            self.prompts.append(prompt)
            if self.status != 200:
                return self.status, json.dumps({"error": {"message": "The stand-in\nwill not."}})
            if self.refuses_ignore_eos and "ignore_eos" in body:
                return 400, json.dumps({"error": {"message": "Unknown field ignore_eos."}})
            if body.get("stream"):
                script = self.streams.pop(0) if len(self.streams) > 1 else (self.streams or [None])[0]
                return script or (200, self.whole_stream(body, prompt))
        return 200, json.dumps({"choices": [{"text": "a"}], "usage": self.usage(prompt, 1) if self.counts else None})

    def whole_stream(self, body: dict[str, Any], prompt: str) -> str:
        """As many pieces as tokens were asked for, with a beginning and an end that hold no text."""
        chat = "messages" in body
        empty = {"delta": {"role": "assistant", "content": ""}} if chat else {"text": ""}
        piece = {"delta": {"reasoning_content": "hm"}} if chat else {"text": " word"}
        chunks = [{"choices": [empty]}, *[{"choices": [piece]}] * body["max_tokens"], {"choices": [empty]}]
        events = "".join(event({**chunk, "usage": None}) for chunk in chunks)
        return events + event({"choices": [], "usage": self.usage(prompt, body["max_tokens"])}) + DONE


class StandInHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "StandIn"
    stand_in: StandInServer

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        models = {"data": [{"id": name} for name in self.stand_in.models]}
        self._send(self.stand_in.status, json.dumps(models), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stand_in.keys.add(self.headers.get("Authorization"))
        status, text = self.stand_in.answer(body)
        self._send(status, text, "text/event-stream" if body.get("stream") and status == 200 else "application/json")

    def _send(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
