"""The smaller routes: models, tokenize, health, version, metrics, the first page, and the API key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server_fakes import USER, WEATHER_CALL, WEATHER_TOOL, Live, ScriptedEngine, identity, metric, serve

import tern
from tern.chat import ChatProtocol
from tern.server.offload import LARGE


def test_models(server: Live) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tern-test", "model", 2048)
    assert (card["root"], card["parent"], card["permission"][0]["allow_sampling"]) == ("tern-test", None, True)
    assert card["tern"] == {
        "dtype": "float32",
        "quantization": "wint4",
        "kv_cache_dtype": "int8",
        "device": "cpu",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "block_size": 16,
        "num_blocks": 100,
        "prefix_caching": True,
    }
    assert server.client.get("/v1/models/tern-test").json() == card


def test_a_served_name_with_a_slash(protocol: ChatProtocol) -> None:
    model = identity("/some/where/ernie")
    with serve(ScriptedEngine(protocol), protocol, model, served_model_name="baidu/ERNIE") as live:
        card = live.client.get("/v1/models/baidu/ERNIE").json()
        assert (card["id"], card["root"]) == ("baidu/ERNIE", "/some/where/ernie")
        assert live.chat(model="baidu/ERNIE")["model"] == "baidu/ERNIE"


def test_the_checkpoint_s_own_sampling_values_are_the_defaults(protocol: ChatProtocol) -> None:
    engine = ScriptedEngine(protocol)
    with serve(engine, protocol, identity(temperature=0.8, top_p=0.7)) as live:
        live.chat()
        live.chat(temperature=0)
        live.client.post("/v1/completions", json={"prompt": "x"})
    values = [(request.params.temperature, request.params.top_p) for request in engine.seen]
    assert values == [(0.8, 0.7), (0, 0.7), (0.8, 0.7)]


def test_tokenize_text_and_back(server: Live) -> None:
    answer = server.client.post("/tokenize", json={"prompt": "Hi 北京", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    back = server.client.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "Hi 北京"}


def test_tokenize_a_chat_gives_what_the_engine_reads(server: Live) -> None:
    for thinks in (True, False):
        chat = {"messages": USER, "tools": [WEATHER_TOOL], "chat_template_kwargs": {"enable_thinking": thinks}}
        answer = server.client.post("/tokenize", json=chat).json()
        server.chat(**chat)
        assert answer["tokens"] == list(server.engine.seen[-1].prompt_token_ids)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": USER}),
        ("/tokenize", {"prompt": "x", "tools": [WEATHER_TOOL]}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": USER, "chat_template_kwargs": {"x": True}}),
        ("/tokenize", {"prompt": "x", "typo": 1}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": [True]}),
    ],
)
def test_wrong_tokenizer_requests(server: Live, path: str, body: dict[str, Any]) -> None:
    response = server.client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    if "tokens" in body:
        assert response.json()["error"]["param"] == "tokens"
    server.still_serves()


def test_the_first_page_says_what_to_try(server: Live) -> None:
    response = server.client.get("/")
    assert response.headers["content-type"].startswith("text/plain")
    assert f"curl {server.url}/v1/chat/completions" in response.text
    assert "tern-test" in response.text


def test_version(server: Live) -> None:
    assert server.client.get("/version").json() == {"version": tern.__version__}


def test_health_is_the_heartbeat_and_ready_the_state(server: Live) -> None:
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/ready").status_code == 200
    server.engine.age = 1000.0
    assert server.client.get("/health").status_code == 503
    server.engine.age = 0.0
    try:
        for state, health, ready in [("starting", 503, 503), ("draining", 200, 503), ("failed", 503, 503)]:
            server.engine.state = state
            answers = server.client.get("/health"), server.client.get("/ready")
            assert [answer.status_code for answer in answers] == [health, ready], state
            assert answers[1].json()["engine"] == state
    finally:
        server.engine.state = "ready"


def test_reading_a_large_chat_does_not_stall_the_others(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()
    prompt = server.state.protocol.prompt

    def slow(*args: Any, **kwargs: Any) -> Any:
        reading.set()
        assert go_on.wait(60)
        return prompt(*args, **kwargs)

    monkeypatch.setattr(server.state.protocol, "prompt", slow)
    large = {"messages": [{"role": "user", "content": "x " * LARGE}]}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: httpx.post(server.url + "/tokenize", json=large, timeout=60))
        assert reading.wait(60)
        assert server.client.get("/health").status_code == 200
        go_on.set()
        assert waiting.result().status_code == 200


def test_metrics(server: Live) -> None:
    def read() -> str:
        response = server.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return response.text

    before = read()
    server.engine.answers.append(WEATHER_CALL)
    usage = server.chat(tools=[WEATHER_TOOL])["usage"]
    server.client.post("/v1/chat/completions", json={"messages": []})
    after = read()

    def grown(name: str, **labels: str) -> float:
        return metric(after, name, **labels) - metric(before, name, **labels)

    assert grown("vllm:request_success_total", finished_reason="stop") == 1
    assert grown("tern:reasoning_tokens_total") == usage["completion_tokens_details"]["reasoning_tokens"]
    assert grown("vllm:generation_tokens_total") == usage["completion_tokens"]
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == usage["completion_tokens"] - 1
    assert grown("vllm:e2e_request_latency_seconds_count") == 1
    assert metric(after, "tern:request_refused_total", code="400") >= 1
    assert metric(after, "vllm:kv_cache_usage_perc") == 0.25
    assert metric(after, "vllm:num_requests_running") == 0
    assert metric(after, "vllm:num_requests_waiting") == 0
    assert metric(after, "vllm:spec_decode_num_draft_tokens_total") == 30
    assert metric(after, "vllm:spec_decode_num_accepted_tokens_total") == 20
    assert (metric(after, "vllm:prefix_cache_queries_total"), metric(after, "vllm:prefix_cache_hits_total")) == (40, 16)
    disk = [metric(after, f"tern:disk_cache_{name}_total") for name in ("hits", "read_bytes", "written_bytes")]
    assert disk == [8, 3000, 5000]


@pytest.fixture(scope="module")
def locked(protocol: ChatProtocol) -> Iterator[Live]:
    with serve(ScriptedEngine(protocol), protocol, api_keys=("first-key", "zweiter-schlüssel")) as live:
        yield live


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "first-key", "Basic first-key", "Bearer \xff\xfe"])
def test_without_a_key_nothing_is_served(locked: Live, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/v1/responses"),
    ):
        response = httpx.request(method, locked.url + path, headers=headers, timeout=60)  # type: ignore[arg-type]
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert locked.engine.seen == []


def test_health_needs_no_key(locked: Live) -> None:
    for path in ("/", "/health", "/ready", "/version", "/metrics"):
        assert locked.client.get(path).status_code == 200


def test_each_key_has_its_own_corner_of_the_prefix_cache(locked: Live) -> None:
    for key in ("first-key", "zweiter-schlüssel", "first-key"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        response = locked.client.post("/v1/chat/completions", json={"messages": USER}, headers=headers)
        assert response.status_code == 200, response.text
    salts = [request.cache_salt for request in locked.engine.seen]
    assert salts[0] == salts[2] != salts[1]
    assert all(len(salt) == 32 and b"key" not in salt for salt in salts)


def test_without_keys_there_is_no_salt(server: Live) -> None:
    server.chat()
    assert server.engine.seen[0].cache_salt == b""
