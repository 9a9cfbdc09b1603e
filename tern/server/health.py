"""GET /, /health, /ready, /version and /metrics: whether the server lives, whether it takes work, and what it is."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from tern import __version__
from tern.server import metrics
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
  GET  /version{metrics}
"""


def routes(state: AppState) -> APIRouter:
    """The family's routes; none asks for an API key."""
    router = APIRouter()

    @router.get("/", response_class=PlainTextResponse)
    async def welcome(http: Request) -> str:
        return WELCOME.format(
            model=state.model_name,
            key=state.options.curl_key,
            base=str(http.base_url).rstrip("/"),
            metrics=" /metrics" if state.options.metrics_port is None else "",
        )

    @router.get("/health")
    async def health() -> Response:
        age = state.engine.heartbeat_age()
        alive = state.engine.state in ("ready", "draining") and age < state.options.heartbeat_timeout
        report = {"status": "ok" if alive else "unhealthy", "engine": str(state.engine.state), "heartbeat_age": age}
        return JSONResponse(report, status_code=200 if alive else 503)

    @router.get("/ready")
    async def ready() -> Response:
        takes_work = state.engine.state == "ready"
        return JSONResponse({"ready": takes_work, "engine": str(state.engine.state)}, 200 if takes_work else 503)

    @router.get("/version")
    async def tern_version() -> Response:
        return JSONResponse({"version": __version__})

    if state.options.metrics_port is None:

        @router.get("/metrics")
        async def prometheus() -> Response:
            return Response(state.metrics.render(), media_type=metrics.CONTENT_TYPE)

    return router
