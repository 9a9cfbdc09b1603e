"""A scripted engine behind the server's door, a small tokenizer, and a server on a loopback port in a thread.

The engine answers each request with the next scripted text, token by token, on a thread of its own, and obeys the
sink's steering as the real one does; nothing in it is random or timed.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tern.chat import ChatProtocol
from tern.engine import Finish, FinishReason, GeneratedToken, Request, ScoredToken, TokenLogprob
from tern.engine.stats import EngineFacts, PromptProgress
from tern.errors import ContextLengthError, EngineUnavailableError, QueueFullError
from tern.server import AppState, ServerOptions, create_app
from tern.server.run import listen, server_config

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
EOS = SPECIAL.index("</s>")
SAMPLE = ["The weather in Beijing is sunny, 26 degrees.", "北京今天天气晴朗，二十六度。", "get_weather location unit"]

WEATHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}},
            "required": ["location", "unit"],
        },
        "strict": True,
    },
}
WEATHER_CALL = (
    "I should look it up.\n</think>\n\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"location": "Beijing", "unit": "c"}}\n</tool_call>\n'
)
GREETING = "They greet me.\n</think>\n\n<response>\nHello, 你好!\n\nHow are you?\n</response>\n"
USER = [{"role": "user", "content": "How is the weather?"}]


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of a few hundred tokens that can spell everything."""
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


@dataclass
class Running:
    """One request in the scripted engine and what is left of its script."""

    request: Request
    script: deque[int]
    pushed: int = 0


@dataclass
class ScriptedEngine:
    """An `EngineDoor`. While `gate` is clear no token comes; `queue_limit` requests at most are open at once."""

    protocol: ChatProtocol
    answers: deque[str] = field(default_factory=deque)
    max_model_len: int = 2048
    queue_limit: int = 64
    capacity: int | None = 1024
    token_capacity: int | None = None
    state: str = "starting"
    gate: threading.Event = field(default_factory=threading.Event)
    age: float = 0.0
    reading: PromptProgress | None = None
    fail_with: str | None = None
    seen: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))

    def __post_init__(self) -> None:
        self.gate.set()
        self._open: dict[str, Running] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._generated = 0
        self._ended = False

    @property
    def num_open(self) -> int:
        return len(self._open)

    def start(self) -> None:
        self.state = "ready"
        self._thread.start()

    def submit(self, request: Request) -> None:
        length = len(request.prompt_token_ids)
        wanted = request.params.max_tokens or 1
        if length + wanted > self.max_model_len:
            raise ContextLengthError(f"The context has {self.max_model_len} tokens but the prompt has {length}.")
        with self._changed:
            if self.state != "ready":
                raise EngineUnavailableError(f"The engine is {self.state}.")
            if len(self._open) >= self.queue_limit:
                raise QueueFullError(f"{len(self._open)} requests are waiting.", retry_after=1.5)
            text = self.answers.popleft() if self.answers else GREETING
            script = deque([*self.protocol.tokenizer.encode(text), EOS])
            self.seen.append(request)
            self._open[request.request_id] = Running(request, script)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> bool:
        with self._changed:
            running = self._open.get(request_id)
            if running is None:
                return False
            self.cancelled.append(request_id)
            self._finish(running, FinishReason.CANCELLED)
            return True

    def stats(self) -> Any:
        from tern.engine import EngineStats  # brings torch along, which most tests do without

        return EngineStats(
            running=len(self._open),
            waiting=0,
            blocks_total=100,
            blocks_free=75,
            blocks_cached=0,
            prefix_query_tokens=40,
            prefix_hit_tokens=16,
            prompt_tokens=sum(len(request.prompt_token_ids) for request in self.seen),
            computed_tokens=0,
            generated_tokens=self._generated,
            drafted_tokens=30,
            accepted_tokens=20,
            preemptions=0,
            steps=0,
            failed_steps=0,
            finished=dict(self.finished),
            last_step_seconds=0.0,
            steps_by_tokens=(5, 2, *[0] * 12),
            disk_hit_tokens=8,
            disk_bytes_read=3000,
            disk_bytes_written=5000,
        )

    def facts(self) -> EngineFacts:
        return EngineFacts("float32", "wint4", "int8", "cpu", 8, 2048, 16, 100, prefix_caching=True)

    def progress(self, request_id: str) -> PromptProgress | None:  # noqa: ARG002
        return self.reading

    def heartbeat_age(self) -> float:
        return self.age

    def drain(self, timeout: float) -> bool:
        with self._changed:
            self.state = "draining"
            return self._changed.wait_for(lambda: not self._open, timeout)

    def stop(self) -> None:
        with self._changed:
            self.state, self._ended = "stopped", True
            for running in list(self._open.values()):
                self._finish(running, FinishReason.CANCELLED)
            self._changed.notify_all()
        self.gate.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Block until `condition` holds; a test that never gets there fails by its time limit."""
        with self._changed:
            assert self._changed.wait_for(condition, 30), "the engine never got there"

    def _run(self) -> None:
        while True:
            self.gate.wait()
            with self._changed:
                if self._ended:
                    return
                for running in list(self._open.values()):
                    self._turn(running)
                self._changed.notify_all()
                if not self._open:
                    self._changed.wait(0.05)

    def _turn(self, running: Running) -> None:
        """One token for one request, and what its sink makes of it."""
        if self.fail_with is not None:
            self._finish(running, FinishReason.ERROR, message=self.fail_with)
            return
        if running.pushed == 0 and running.request.params.prompt_logprobs is not None:
            self._score_prompt(running.request)
        if running.request.params.max_tokens == 0:
            self._finish(running, FinishReason.LENGTH)
            return
        token_id = running.script.popleft()
        self._push(running, token_id, self._with_logprobs(running.request, token_id))

    def _push(self, running: Running, token_id: int, token: GeneratedToken) -> None:
        params = running.request.params
        running.pushed += 1
        self._generated += 1
        steering = running.request.sink.push(token)
        if running.request.request_id not in self._open:
            return  # its sink took it back
        if not token.forced and (token_id == EOS or token_id in params.stop_token_ids):
            self._finish(running, FinishReason.STOP, stop_token_id=token_id)
        elif steering.stop:
            self._finish(running, FinishReason.STOP)
        elif params.max_tokens is not None and running.pushed >= params.max_tokens:
            self._finish(running, FinishReason.LENGTH)
        else:
            for forced in steering.force:
                if running.request.request_id in self._open:
                    self._push(running, forced, GeneratedToken(forced, forced=True))
            if steering.force:
                running.script = deque([*self.protocol.tokenizer.encode("forced answer\n</response>\n"), EOS])

    def _score_prompt(self, request: Request) -> None:
        """Score the token at place i with -i, in two runs; the likeliest there have ids from 6 on."""
        scores = []
        for place, token_id in enumerate(request.prompt_token_ids[1:], 1):
            tops = tuple(TokenLogprob(5 + rank, -0.25 * rank, rank) for rank in range(1, 21))
            top = tops[: request.params.prompt_logprobs]
            scores.append(ScoredToken(token_id, TokenLogprob(token_id, float(-place), 30), top))
        assert request.prompt_sink is not None
        request.prompt_sink(scores[:2])
        request.prompt_sink(scores[2:])

    def _with_logprobs(self, request: Request, token_id: int) -> GeneratedToken:
        if request.params.logprobs is None:
            return GeneratedToken(token_id)
        tops = tuple(TokenLogprob(5 + rank, -0.25 * rank, rank) for rank in range(1, request.params.logprobs + 1))
        return GeneratedToken(token_id, TokenLogprob(token_id, -0.5, 2), tops)

    def _finish(self, running: Running, reason: FinishReason, **fields: Any) -> None:
        request = running.request
        self._open.pop(request.request_id, None)
        self.finished[reason] += 1
        request.sink.finish(Finish(reason, len(request.prompt_token_ids), running.pushed, 4, **fields))
        self._changed.notify_all()


@dataclass
class Live:
    """A server in a thread, its engine and a client for it."""

    engine: Any
    state: AppState
    client: httpx.Client
    url: str

    def chat(self, **fields: Any) -> dict[str, Any]:
        """The answer to an ordinary chat request."""
        response = self.client.post("/v1/chat/completions", json={"messages": USER, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        """Every chunk of a streamed answer; checks that it ends as it should."""
        body = {"stream": True, **fields}
        if path.endswith("chat/completions"):
            body = {"messages": USER, **body}
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]

    def still_serves(self) -> None:
        """An ordinary request succeeds, and nothing is left behind."""
        assert self.chat()["choices"][0]["message"]["content"] == "Hello, 你好!\n\nHow are you?"
        assert self.engine.num_open == 0


def rebuild(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What a client makes of the chunks of one choice: the whole answer's choice."""
    message: dict[str, Any] = {"role": None, "content": None, "reasoning_content": None, "reasoning": None}
    calls: list[dict[str, Any]] = []
    choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None}
    for chunk in chunks:
        for part in chunk["choices"]:
            if part["index"] != index:
                continue
            _add_delta(message, calls, part["delta"])
            if part["logprobs"]:
                choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"]["content"] += part["logprobs"]["content"]
            if "token_ids" in part:
                choice.setdefault("token_ids", []).extend(part["token_ids"])
            if part["finish_reason"] is not None:
                assert "finish_reason" not in choice, "a choice ends once"
                choice |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    if calls:
        message["tool_calls"] = calls
    message["content"] = message["content"] or None
    return choice


def _add_delta(message: dict[str, Any], calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    for name in ("role", "content", "reasoning_content", "reasoning"):
        if name in delta:
            assert delta[name] is not None
            message[name] = (message[name] or "") + delta[name]
    for piece in delta.get("tool_calls", ()):
        if "id" in piece:
            assert piece["index"] == len(calls), "calls are numbered in order"
            function = {"name": piece["function"]["name"], "arguments": ""}
            calls.append({"id": piece["id"], "type": piece["type"], "function": function})
        calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice without the random ids of its calls."""
    for call in choice["message"].get("tool_calls", ()):
        assert call.pop("id")
    return choice


def identity(name: str = "tern-test", **defaults: Any) -> Any:
    """What `ModelSource` is to the server."""
    generation = SimpleNamespace(eos_token_ids=frozenset({EOS}), sampling_defaults=lambda: defaults)
    return SimpleNamespace(name=name, generation=generation)


def metric(text: str, name: str, **labels: str) -> float:
    """The value of the one sample in the text of /metrics that has this name and these labels among its own."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    (value,) = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    return value


@contextmanager
def serve(
    engine: Any, protocol: ChatProtocol, model: Any = None, *, tracing: Any = None, **options: Any
) -> Iterator[Live]:
    """Serve on a free loopback port until the block is left."""
    state = AppState.create(engine, protocol, model or identity(), ServerOptions(port=0, **options), tracing=tracing)
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(server_config(create_app(state)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        engine.start()
        thread.start()
        with httpx.Client(base_url=url, timeout=30) as client:
            try:
                yield Live(engine, state, client, url)
            finally:
                server.should_exit = True
                engine.stop()
                thread.join()
                state.offload.close()
