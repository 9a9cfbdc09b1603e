"""The server over the real engine and a small random network in float32: streams, batches, and clients that leave.

`Steps` holds the engine before each forward pass, so that "while queued", "in prefill" and "in decode" are places and
not moments.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from server_fakes import EOS, USER, Live, identity, metric, rebuild, serve, write_tokenizer

from tern.chat import ChatProtocol
from tern.checkpoint import ModelSource, load_model
from tern.checkpoint.generation import GenerationConfig
from tern.engine import Engine, EngineOptions, EngineService, Request
from tern.model import ErnieConfig

CONFIG: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_bias": False,
    "tie_word_embeddings": True,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}


class Steps:
    """A gate before each forward pass of an engine, and the count of passes."""

    def __init__(self, engine: Engine) -> None:
        self._run = engine.runner.run
        self._allowed = threading.Semaphore(0)
        self._free = True
        self._changed = threading.Condition()
        self.arrived = 0
        engine.runner.run = self._gated  # type: ignore[method-assign]

    def _gated(self, *step: Any) -> Any:
        with self._changed:
            self.arrived += 1
            self._changed.notify_all()
        if not self._free:
            self._allowed.acquire()
        return self._run(*step)

    def hold(self) -> None:
        """Let no pass begin any more."""
        self._free = False

    def allow(self, count: int) -> None:
        """Let this many passes through and wait until the next one stands at the gate."""
        goal = self.arrived + count
        for _ in range(count):
            self._allowed.release()
        self.wait_for(goal)

    def wait_for(self, goal: int) -> None:
        """Wait until `goal` passes have come to the gate."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.arrived >= goal, 60), f"only {self.arrived} of {goal} passes"

    def release(self) -> None:
        """Open the gate for good."""
        self._free = True
        self._allowed.release(1000)


class RealServer:
    """A server over a real engine, with its gate and a spy on cancellations."""

    def __init__(self, live: Live, engine: Engine, steps: Steps) -> None:
        self.live, self.engine, self.steps = live, engine, steps
        self.cancelled = threading.Semaphore(0)
        self.connections: list[socket.socket] = []
        self.submitted = threading.Semaphore(0)
        cancel, submit = live.engine.cancel, live.engine.submit

        def spy_submit(request: Request) -> None:
            submit(request)
            self.submitted.release()

        def spy_cancel(request_id: str) -> bool:
            found = bool(cancel(request_id))
            self.cancelled.release()
            return found

        live.engine.cancel, live.engine.submit = spy_cancel, spy_submit

    def wait_idle(self) -> None:
        """Wait until nothing is open, then check that no block and no request leaked."""
        done = threading.Event()
        for _ in range(3000):
            stats = self.live.engine.stats()
            if not self.engine.has_work and stats.running == stats.waiting == 0:
                break
            done.wait(0.01)
        assert not self.engine.has_work
        self.engine.check_integrity()

    def open_request(self, **fields: Any) -> socket.socket:
        """Send a chat request and return its open connection."""
        body = json.dumps({"messages": USER, "temperature": 0, "ignore_eos": True, **fields}).encode()
        host, port = self.live.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        self.connections.append(connection)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection


def random_model(directory: Path, extra_ids: int = 0) -> tuple[Any, ChatProtocol]:
    """A small random network, with `extra_ids` more token ids than its tokenizer."""
    write_tokenizer(directory)
    protocol = ChatProtocol.from_directory(directory)
    config = ErnieConfig.from_dict({**CONFIG, "vocab_size": protocol.tokenizer.vocab_size + extra_ids})
    source = ModelSource("random", directory, config, GenerationConfig(frozenset({EOS})), synthetic_seed=3)
    return load_model(source, dtype=torch.float32, progress=False), protocol


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ChatProtocol]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield random_model(tmp_path_factory.mktemp("random"))
    torch.set_num_threads(threads)


@pytest.fixture
def real(model: tuple[Any, ChatProtocol]) -> Iterator[RealServer]:
    network, protocol = model
    options = EngineOptions(
        max_model_len=512,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        num_kv_blocks=96,
        block_size=8,
        speculation="off",  # passes are counted
        target_step_seconds=None,
        check_integrity_when_idle=True,
    )
    engine = Engine(network, {EOS}, options)
    steps = Steps(engine)
    with serve(EngineService(engine), protocol, identity()) as live:
        real = RealServer(live, engine, steps)
        try:
            yield real
        finally:
            steps.release()
            for connection in real.connections:
                connection.close()


def test_stream_and_whole_are_the_same(real: RealServer) -> None:
    for fields in (
        {"temperature": 0, "max_tokens": 40},
        {"temperature": 1, "seed": 5, "max_tokens": 30, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0, "max_tokens": 60, "reasoning_max_tokens": 8, "return_token_ids": True},
        {"temperature": 1, "seed": 7, "max_tokens": 20, "n": 3},
    ):
        whole = real.live.chat(**fields)
        chunks = real.live.stream(**fields)
        assert [rebuild(chunks, choice["index"]) for choice in whole["choices"]] == whole["choices"]
        assert all(choice["finish_reason"] in ("stop", "length") for choice in whole["choices"])
    real.wait_idle()


def test_a_budget_ends_the_thought_on_the_real_engine(real: RealServer) -> None:
    answer = real.live.chat(temperature=0, max_tokens=200, reasoning_max_tokens=8, ignore_eos=True)
    assert "I have thought long enough" in answer["choices"][0]["message"]["reasoning_content"]
    assert answer["choices"][0]["message"]["content"]
    reasoning = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 8 < reasoning < answer["usage"]["completion_tokens"] == 200


def test_requests_together_answer_as_alone(real: RealServer) -> None:
    bodies = [{"temperature": 0, "max_tokens": 12 + index, "messages": [{"role": "user", "content": f"{index}?"}]}
              for index in range(6)]  # fmt: skip
    alone = [real.live.chat(**body)["choices"] for body in bodies]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda body: real.live.chat(**body)["choices"], bodies))
    assert together == alone
    real.wait_idle()


def test_the_prefix_cache_shows_in_usage_and_metrics(real: RealServer) -> None:
    first = real.live.chat(max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"]
    second = real.live.chat(max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first == 0
    assert second > 0
    assert metric(real.live.client.get("/metrics").text, "vllm:prefix_cache_hits_total") == second


def test_a_changing_billing_line_does_not_bust_the_prefix_cache(real: RealServer) -> None:
    def turn(nonce: str) -> dict[str, int]:
        line = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.37.{nonce}; cch={nonce};"}
        body = {"system": [line, {"type": "text", "text": "You write code."}], "messages": USER}
        response = real.live.client.post("/v1/messages", json={**body, "max_tokens": 2})
        count = real.live.client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
        usage: dict[str, int] = response.json()["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count
        return usage

    first, second = turn("fa690"), turn("0aaa9")
    assert first["cache_read_input_tokens"] == 0
    assert second["input_tokens"] <= 8, "all but the last block came from the cache"


def test_a_prompt_too_long_says_both_numbers(real: RealServer) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "weather " * 600}]}),
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 512}),
        ("/v1/responses", {"input": "weather " * 600}),
        ("/v1/responses", {"input": "weather", "max_output_tokens": 512}),
        ("/v1/completions", {"prompt": [5] * 512}),
        ("/v1/completions", {"prompt": [5] * 10, "max_tokens": 503}),
    ):
        response = real.live.client.post(path, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == next(name for name in ("messages", "input", "prompt") if name in body)
        assert "512" in error["message"]
        count = real.live.client.post("/tokenize", json={k: v for k, v in body.items() if k == "messages"})
        if count.status_code == 200:
            assert str(count.json()["count"]) in error["message"]
    real.wait_idle()


@pytest.mark.parametrize("ids", [[-1], [10**6], [2**70]])
def test_token_ids_that_the_model_does_not_know(real: RealServer, ids: list[int]) -> None:
    for body in ({"prompt": ids}, {"prompt": "x", "stop_token_ids": ids}, {"prompt": "x", "logit_bias": {ids[0]: 1}}):
        response = real.live.client.post("/v1/completions", json=body)
        assert response.status_code == 400, response.text
    real.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["prefill", "decode"])
def test_leaving_stops_the_work_within_one_step(real: RealServer, place: str, stream: bool) -> None:
    real.steps.hold()
    connection = real.open_request(max_tokens=300, stream=stream)
    real.steps.wait_for(1)
    prompt = len(real.live.state.protocol.prompt(USER).token_ids)
    assert prompt > 3 * 16, "the prompt takes several steps"
    if place == "decode":
        real.steps.allow(prompt // 16 + 4)
    before = real.steps.arrived
    connection.close()
    assert real.cancelled.acquire(timeout=60)
    real.steps.release()
    real.wait_idle()
    assert real.steps.arrived == before, "the step under way was the last"
    assert (real.engine.stats().generated_tokens > 0) == (place == "decode")
    assert real.live.chat(max_tokens=3, ignore_eos=True)["choices"][0]["finish_reason"] == "length"


def test_leaving_while_queued(real: RealServer) -> None:
    real.steps.hold()
    first = [real.open_request(max_tokens=3) for _ in range(2)]
    assert all(real.submitted.acquire(timeout=60) for _ in first)
    real.steps.wait_for(1)
    queued = real.open_request(max_tokens=300)
    assert real.submitted.acquire(timeout=60)
    queued.close()
    assert real.cancelled.acquire(timeout=60)
    real.steps.release()
    answers = [connection.recv(65536) for connection in first]
    assert all(b" 200 " in answer for answer in answers)
    for connection in first:
        connection.close()
    real.wait_idle()
    assert real.engine.stats().generated_tokens == 2 * 3
    assert real.live.chat(max_tokens=3, ignore_eos=True)["choices"][0]["finish_reason"] == "length"


def test_priority_goes_before_arrival(real: RealServer) -> None:
    real.steps.hold()
    running = [real.open_request(max_tokens=4) for _ in range(2)]
    assert all(real.submitted.acquire(timeout=60) for _ in running)
    real.steps.wait_for(1)
    order: list[int] = []
    finish = real.engine.delivery.finish

    def note(sequence: Any, *reason: Any, **fields: Any) -> None:
        order.append(sequence.request.priority)
        finish(sequence, *reason, **fields)

    real.engine.delivery.finish = note  # type: ignore[method-assign]
    for priority in (7, 3, -5, 5):
        running.append(real.open_request(max_tokens=40, priority=priority))
        assert real.submitted.acquire(timeout=60)
    real.steps.release()
    for connection in running:
        assert b" 200 " in connection.recv(65536)
    assert order == [0, 0, -5, 3, 5, 7]
    real.wait_idle()


def test_tokens_that_wait_are_bounded(real: RealServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real.engine.admission, "_max_queue_tokens", 300)
    real.steps.hold()
    running = [real.open_request(max_tokens=4) for _ in range(2)]
    assert all(real.submitted.acquire(timeout=60) for _ in running)
    real.steps.wait_for(1)
    sent = {"prompt": [5] * 200, "max_tokens": 1, "n": 2}
    waiting = threading.Thread(target=real.live.client.post, args=["/v1/completions"], kwargs={"json": sent})
    waiting.start()
    assert all(real.submitted.acquire(timeout=60) for _ in range(2))
    response = real.live.client.post("/v1/completions", json=sent)
    assert response.status_code == 429
    assert "max_queue_tokens is 300" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1
    real.steps.release()
    waiting.join()
    assert real.live.client.post("/v1/completions", json=sent).status_code == 200
    real.wait_idle()


def test_a_hundred_clients_that_vanish_leave_nothing_behind(real: RealServer) -> None:
    real.steps.hold()
    for number in range(100):
        real.open_request(max_tokens=300, stream=bool(number % 2), n=1 + number % 3)
    assert all(real.submitted.acquire(timeout=60) for _ in range(100 + 33 + 66))
    for connection in real.connections:
        connection.close()
    assert all(real.cancelled.acquire(timeout=60) for _ in range(100 + 33 + 66))
    real.steps.release()
    real.wait_idle()
    stats = real.engine.stats()
    assert stats.blocks_free == stats.blocks_total
    assert real.live.chat(max_tokens=3, ignore_eos=True)["choices"][0]["finish_reason"] == "length"


def test_a_network_with_more_ids_than_its_tokenizer(tmp_path: Path) -> None:
    network, protocol = random_model(tmp_path, extra_ids=3000)
    engine = Engine(network, {EOS}, EngineOptions(max_model_len=256, num_kv_blocks=32))
    with serve(EngineService(engine), protocol, identity()) as live:
        fields = {"max_tokens": 20, "temperature": 1, "seed": 1, "ignore_eos": True, "return_token_ids": True}
        answer = live.chat(logprobs=True, top_logprobs=5, **fields)
        assert max(answer["choices"][0]["token_ids"]) >= protocol.tokenizer.vocab_size
        assert answer["usage"]["completion_tokens"] == 20
        assert len(answer["choices"][0]["logprobs"]["content"]) == 20


def test_draining_lets_what_runs_finish(real: RealServer) -> None:
    real.steps.hold()
    connection = real.open_request(max_tokens=3)
    real.steps.wait_for(1)
    drained: list[bool] = []
    drainer = threading.Thread(target=lambda: drained.append(real.live.engine.drain(60)))
    drainer.start()
    while real.live.client.get("/ready").status_code == 200:
        pass
    response = real.live.client.post("/v1/chat/completions", json={"messages": USER})
    assert response.status_code == 503
    real.steps.release()
    drainer.join()
    assert drained == [True]
    assert b" 200 " in connection.recv(65536)
    connection.close()
