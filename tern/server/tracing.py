"""A span of OpenTelemetry for each request that generates, sent to a collector. Only with `--otlp-traces-endpoint`.

Knows the record of a request and OpenTelemetry, which is imported when it is asked for. Spans carry counts, times and
sampling values; never any text of a prompt or an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tern import __version__
from tern.errors import OptionError
from tern.server.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

NANOSECONDS = 1_000_000_000
_OPERATIONS = {"/v1/completions": "text_completion"}


class Tracing:
    """Makes spans with `provider`, and closes it at the end. `model` is the name that is served."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("tern", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Spans go to the collector at this URL, by OTLP over HTTP, from a thread of their own.

        Raises `OptionError` if OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise OptionError(
                f"otlp_traces_endpoint needs OpenTelemetry, which is not installed ({error.name}): pip install "
                "'tern-llm[otel]', or leave it out."
            ) from None
        # What the environment says (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) goes before this name.
        resource = Resource({"service.name": "tern"}).merge(Resource.create())
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def record(self, record: RequestRecord, model: str) -> None:
        """Make the span of a request that has ended, below the span that the client named, if it did."""
        if not record.generates:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode

        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=self._propagator.extract(record.trace_headers),
            kind=SpanKind.SERVER,
            start_time=record.began_ns,
            attributes=span_attributes(record, model),
        )
        if record.outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        if record.first_token_seconds is not None:
            first = record.began_ns + int(record.first_token_seconds * NANOSECONDS)
            span.add_event("gen_ai.first_token", timestamp=first)
        span.end(record.began_ns + int(record.seconds * NANOSECONDS))

    def close(self) -> None:
        """Send what waits to be sent, within the exporter's own time limits."""
        self._provider.shutdown()


def span_attributes(record: RequestRecord, model: str) -> dict[str, AttributeValue]:
    """OpenTelemetry's names for generative models, and vLLM's where it has none; seconds and tokens."""
    found: dict[str, AttributeValue | None] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "gen_ai.operation.name": _OPERATIONS.get(record.route, "chat"),
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.id": record.request_id,
        "gen_ai.response.id": record.answer_id,
        "gen_ai.response.finish_reasons": [ending.finish.reason.value for ending in record.endings],
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.generated_tokens,
        "gen_ai.usage.reasoning_tokens": record.reasoning_tokens,
        "gen_ai.latency.e2e": record.seconds,
        "gen_ai.latency.time_to_first_token": record.first_token_seconds,
        **_longest(record),
    }
    if (params := record.params) is not None:
        found |= {
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
        }
    return {name: value for name, value in found.items() if value is not None}


def _longest(record: RequestRecord) -> dict[str, AttributeValue | None]:
    """Where the time went; of several choices the longest."""
    times = [ending.finish.milestones for ending in record.endings if ending.finish.milestones is not None]
    return {
        "gen_ai.latency.time_in_queue": max((t.queue_seconds for t in times), default=None),
        "gen_ai.latency.time_in_model_prefill": max((t.prefill_seconds or 0.0 for t in times), default=None),
        "gen_ai.latency.time_in_model_decode": max((t.decode_seconds or 0.0 for t in times), default=None),
    }
