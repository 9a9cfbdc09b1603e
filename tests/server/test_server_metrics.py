"""What Prometheus reads: metrics, their labels and bounds, the documentation's list, and the dashboard's queries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import GREETING, USER, WEATHER_CALL, Live, ScriptedEngine, identity, metric, serve

from tern.chat import ChatProtocol
from tern.engine import Finish, FinishReason, Milestones
from tern.server.sink import Ending

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docs" / "grafana" / "dashboard.json"
NAME = re.compile(r"\b(?:(?:vllm|tern):[a-z0-9_]+|(?:process|http)_[a-z0-9_]+)")


def read(server: Live) -> str:
    return server.client.get("/metrics").text


def sample_names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def test_requests_are_measured_by_what_they_ask_and_get(server: Live) -> None:
    before = read(server)
    server.chat(n=2, max_tokens=5)
    server.client.get("/v1/nothing")
    server.client.get("/v1/models/tern-test")
    after = read(server)

    def grown(name: str, **labels: str) -> float:
        old = metric(before, name, **labels) if name in sample_names(before) else 0.0
        return metric(after, name, **labels) - old

    assert grown("vllm:request_params_n_sum") == 2
    assert grown("vllm:request_params_max_tokens_sum") == 5
    assert grown("vllm:request_generation_tokens_sum") == 10
    assert grown("vllm:request_generation_tokens_count") == 2
    assert grown("vllm:request_prompt_tokens_count") == 2
    assert grown("tern:request_reasoning_tokens_count") == 2
    assert metric(after, "http_requests_total", handler="/v1/models/{model_id:path}", method="GET", status="2xx") >= 1
    assert metric(after, "http_requests_total", handler="none", status="4xx") >= 1
    assert metric(after, "http_request_duration_seconds_count", handler="/v1/chat/completions") >= 1


def test_the_engine_s_numbers_and_the_process_s(server: Live) -> None:
    text = read(server)
    assert metric(text, "vllm:iteration_tokens_total_bucket", le="1.0") == 5
    assert metric(text, "vllm:iteration_tokens_total_count") == 7
    cache = {"block_size": "16", "num_gpu_blocks": "100", "cache_dtype": "int8", "enable_prefix_caching": "True"}
    assert metric(text, "vllm:cache_config_info", **cache) == 1
    assert metric(text, "tern:engine_heartbeat_age_seconds") == 0
    assert metric(text, "tern:build_info") == 1
    assert metric(text, "process_resident_memory_bytes") > 2**20


@pytest.mark.parametrize(
    ("times", "counted"),
    [
        (Milestones(1, 3, 6, 16), {"queue": 2, "prefill": 3, "decode": 10, "inference": 13, "per_token": 2.5}),
        (Milestones(1, 3, None, 7), {"queue": 2, "inference": 4}),
        (Milestones(1, None, None, 7), {"queue": 6}),
    ],
)
def test_milestones_are_counted_as_far_as_they_go(
    protocol: ChatProtocol, times: Milestones, counted: dict[str, float]
) -> None:
    names = {
        "queue": "request_queue_time_seconds",
        "prefill": "request_prefill_time_seconds",
        "decode": "request_decode_time_seconds",
        "inference": "request_inference_time_seconds",
        "per_token": "request_time_per_output_token_seconds",
    }
    with serve(ScriptedEngine(protocol), protocol) as live:
        finish = Finish(FinishReason.STOP, 7, 5, 4, milestones=times)
        live.state.metrics.observe_choice(0.0).ended(Ending(finish, 2, None))
        text = read(live)
    found = {key: metric(text, f"vllm:{name}_sum") for key, name in names.items()}
    assert {key: value for key, value in found.items() if value} == counted
    assert sum(metric(text, f"vllm:{name}_count") for name in names.values()) == len(counted)
    computed = metric(text, "vllm:request_prefill_kv_computed_tokens_sum")
    assert computed == (0 if times.started is None else 3)


def test_labels_hold_nothing_of_a_client_s_and_stay_few(protocol: ChatProtocol) -> None:
    with serve(ScriptedEngine(protocol), protocol, identity("the-model")) as live:
        live.engine.answers.extend([GREETING, WEATHER_CALL] * 30)
        ask(live, 0)
        read(live)  # a route of its own
        series = len(samples(live))
        for index in range(1, 12):
            ask(live, index)
        found = samples(live)
    assert len(found) == series, "whatever clients send, there are no more series"
    assert [sample for sample in found if any("zanzibar" in value.lower() for value in sample.labels.values())] == []
    assert {sample.labels.get("model_name", "the-model") for sample in found} == {"the-model"}


def ask(live: Live, index: int) -> None:
    """Requests that put the word Zanzibar wherever a client can put one."""
    word = f"Zanzibar-{index}"
    headers = {"X-Request-Id": word, "User-Agent": word, "traceparent": word}
    tool = {"type": "function", "function": {"name": word}}
    body = {"messages": [{"role": "user", "content": word}], "user": word, "tools": [tool], "stop": [word]}
    live.client.post("/v1/chat/completions", json=body, headers=headers)
    live.client.post("/v1/chat/completions", json={**body, "model": word}, headers=headers)
    live.client.request(word.upper().replace("-", "X"), f"/{word}", headers=headers)
    live.client.get(f"/v1/models/{word}", headers=headers)
    live.client.post("/v1/chat/completions", json={"messages": USER, word: 1}, headers=headers)


def samples(live: Live) -> list[Any]:
    return [sample for family in text_string_to_metric_families(read(live)) for sample in family.samples]


def dashboard_queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return queries + [variable["query"] for variable in dashboard["templating"]["list"]]


def test_every_query_of_the_dashboard_names_metrics_that_there_are(server: Live) -> None:
    server.chat()
    server.client.get("/v1/nothing")
    there = sample_names(read(server))
    queries = dashboard_queries()
    named = [NAME.findall(query) for query in queries]
    assert len(queries) > 30
    assert [query for query, names in zip(queries, named, strict=True) if not names and query != "prometheus"] == []
    assert {name for names in named for name in names} - there == set()


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    cells = [
        (at["x"] + x, at["y"] + y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["w"])
        for y in range(at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_metric_stands_in_the_documentation(server: Live) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(NAME.findall(text))
    server.chat()
    families = [family for family in text_string_to_metric_families(read(server)) if family.type != "unknown"]
    there = {f.name + ("_total" if f.type == "counter" else "") for f in families if not f.name.endswith("_created")}
    ours = {name for name in there if not name.startswith("process_")}
    assert ours - documented == set()
    assert {name for name in documented if name.split(":")[0] in ("vllm", "tern")} - there == set()
