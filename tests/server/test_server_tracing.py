"""Spans of OpenTelemetry: what they say of a request, what they never say, and what is missing without the library."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from server_fakes import USER, Live, ScriptedEngine, serve

from tern.chat import ChatProtocol
from tern.errors import OptionError
from tern.server import ServerOptions
from tern.server.run import run_server
from tern.server.tracing import Tracing

CHAT = "/v1/chat/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """A server whose spans stay in memory."""

    def __init__(self, live: Live, exporter: InMemorySpanExporter) -> None:
        self.live = live
        self._exporter = exporter

    def span(self, path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any) -> ReadableSpan:
        """The only span that a request leaves."""
        self._exporter.clear()
        body = {"messages": USER, **fields} if path == CHAT else fields
        self.live.client.post(path, json=body, headers=headers)
        deadline = time.monotonic() + 30
        while not self._exporter.get_finished_spans() and time.monotonic() < deadline:
            time.sleep(0.001)  # a stream's last event comes before the request has ended
        (span,) = self._exporter.get_finished_spans()
        return span

    def spans_of(self, method: str, path: str, **keywords: Any) -> int:
        self._exporter.clear()
        self.live.client.request(method, path, **keywords)
        self.live.client.get("/health")
        return len(self._exporter.get_finished_spans())


@pytest.fixture
def traced(protocol: ChatProtocol) -> Iterator[Traced]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serve(ScriptedEngine(protocol), protocol, tracing=Tracing(provider)) as live:
        yield Traced(live, exporter)


def test_a_span_says_how_it_went(traced: Traced) -> None:
    span = traced.span(headers={"X-Request-Id": "mine"}, max_tokens=7, temperature=0.5, n=2)
    said = dict(span.attributes or {})
    assert (span.name, span.kind) == (f"POST {CHAT}", SpanKind.SERVER)
    assert span.status.status_code is StatusCode.UNSET
    assert (said["gen_ai.request.id"], said["gen_ai.operation.name"]) == ("mine", "chat")
    assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.temperature"], said["gen_ai.request.n"]) == (
        7,
        0.5,
        2,
    )
    assert said["gen_ai.usage.output_tokens"] == 14
    assert said["gen_ai.usage.input_tokens"] == len(traced.live.engine.seen[0].prompt_token_ids)
    assert said["gen_ai.response.finish_reasons"] == ("length", "length")
    assert said["gen_ai.response.model"] == "tern-test"
    assert said["http.response.status_code"] == 200
    first, whole = said["gen_ai.latency.time_to_first_token"], said["gen_ai.latency.e2e"]
    assert 0 < first <= whole  # type: ignore[operator]
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time < span.events[0].timestamp <= span.end_time


def test_completions_and_streams_have_spans_too(traced: Traced) -> None:
    assert (traced.span("/v1/completions", prompt="x").attributes or {})["gen_ai.operation.name"] == "text_completion"
    assert (traced.span(stream=True).attributes or {})["gen_ai.response.finish_reasons"] == ("stop",)


def test_a_client_s_trace_is_continued(traced: Traced) -> None:
    span = traced.span(headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"})
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.context.trace_state.get("a") == "b"


@pytest.mark.parametrize("wrong", ["", "00-0-0-01", "rubbish" * 1000, f"00-{'0' * 32}-{PARENT}-01"])
def test_a_trace_that_is_none_begins_a_new_one(traced: Traced, wrong: str) -> None:
    span = traced.span(headers={"traceparent": wrong})
    assert span.parent is None
    assert f"{span.context.trace_id:032x}" != TRACE


def test_an_error_is_one(traced: Traced) -> None:
    traced.live.engine.fail_with = "It broke."
    span = traced.span()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["http.response.status_code"] == 500


def test_what_generates_nothing_has_no_span(traced: Traced) -> None:
    assert traced.spans_of("GET", "/v1/models") == 0
    assert traced.spans_of("POST", "/tokenize", json={"prompt": "x"}) == 0
    assert traced.spans_of("POST", CHAT, json={"messages": []}) == 0


def test_no_text_is_in_a_span(traced: Traced) -> None:
    word = "Zanzibar"
    traced.live.engine.answers.append(f"{word}\n</think>\n\n<response>\n{word}\n</response>\n")
    span = traced.span(
        messages=[{"role": "user", "content": word}], stop=[f"{word}x"], user=word, bad_words=[f"{word}y"]
    )
    assert word not in span.to_json()


def test_without_the_library_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    def never() -> Any:
        raise AssertionError("nothing is loaded for a server that cannot trace")

    with pytest.raises(OptionError, match=r"pip install 'tern-llm\[otel\]'"):
        run_server(never, ServerOptions(port=0, otlp_traces_endpoint="http://localhost:4318/v1/traces"))


def test_spans_reach_a_collector(protocol: ChatProtocol) -> None:
    """The whole way, to a collector that is a web server: one POST, whose body holds the span."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = Thread(target=collector.serve_forever)
        thread.start()
        tracing = Tracing.to(f"http://127.0.0.1:{collector.server_port}/v1/traces")
        with serve(ScriptedEngine(protocol), protocol, tracing=tracing) as live:
            live.chat()
        tracing.close()
        collector.shutdown()
        thread.join()
    assert [path for path, _ in got] == ["/v1/traces"]
    assert b"gen_ai.usage.output_tokens" in got[0][1]
    assert b"service.name" in got[0][1]
