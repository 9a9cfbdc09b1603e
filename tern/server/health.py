"""GET /health, /ready, /version and /metrics: whether the server lives, whether it takes work, and what it is."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from tern import __version__
from tern.server import metrics
from tern.server.openapi import described
from tern.server.openapi.answers import Health, Readiness, Version
from tern.server.state import AppState

WELCOME = """\
Tern serves {model} here. Try:

  curl {base}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{{
    "messages": [{{"role": "user", "content": "Give me a short introduction to large language model."}}]}}'

  POST /v1/chat/completions    chat, as OpenAI's; "stream": true for server-sent events, "tools" for tool calls
  POST /v1/responses           the same chats in OpenAI's newer form
  POST /v1/messages            the same chats as Anthropic's; /v1/messages/count_tokens
  POST /v1/completions         plain completions
  GET  /v1/models              what is served
  POST /tokenize /detokenize   text to token ids and back
  GET  /health /ready          is it alive, does it take work
  GET  /version /openapi.json{metrics}
"""


def what_to_try(state: AppState, base: str) -> str:
    """What the server at the URL `base` answers, with a command to begin with."""
    return WELCOME.format(
        model=state.model_name,
        key=state.options.curl_key,
        base=base,
        metrics=" /metrics" if state.options.metrics_port is None else "",
    )


def routes(state: AppState) -> APIRouter:
    """The family's routes; none asks for an API key."""
    router = APIRouter()

    @router.get("/health", **described("Is it alive", Health, meaning="503 when the engine hangs.", also=(503,)))
    async def health() -> Response:
        age = state.engine.heartbeat_age()
        alive = state.engine.state in ("ready", "draining") and age < state.options.heartbeat_timeout
        report = {"status": "ok" if alive else "unhealthy", "engine": str(state.engine.state), "heartbeat_age": age}
        return JSONResponse(report, status_code=200 if alive else 503)

    @router.get("/ready", **described("Does it take work", Readiness, meaning="503 when it does not.", also=(503,)))
    async def ready() -> Response:
        takes_work = state.engine.state == "ready"
        return JSONResponse({"ready": takes_work, "engine": str(state.engine.state)}, 200 if takes_work else 503)

    @router.get("/version", **described("Which version", Version, meaning="Tern's version."))
    async def tern_version() -> Response:
        return JSONResponse({"version": __version__})

    if state.options.metrics_port is None:

        @router.get(
            "/metrics",
            response_class=PlainTextResponse,
            **described("Metrics", meaning="Prometheus' text format."),
        )
        async def prometheus() -> Response:
            return Response(state.metrics.render(), media_type=metrics.CONTENT_TYPE)

    return router
