"""The web application: every family of routes over one state. Knows which families there are, and nothing of them."""

from __future__ import annotations

from functools import cache

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from tern.server import chat_completions, completions, health, messages, models, page, responses, tokenization
from tern.server.errors import install_error_handlers
from tern.server.guard import Guard
from tern.server.openapi import document
from tern.server.request_log import ID_HEADER, RequestLog
from tern.server.state import AppState

FAMILIES = (chat_completions, completions, responses, messages, models, tokenization, health, page)


def create_app(state: AppState) -> FastAPI:
    """The application for a server; it starts and stops nothing.

    Pages with interactive documentation are left out: they load scripts from elsewhere.
    """
    app = FastAPI(title="Tern", docs_url=None, redoc_url=None)
    app.openapi = cache(lambda: document(app))  # type: ignore[method-assign]
    install_error_handlers(app, state.metrics.refused)
    for family in FAMILIES:
        app.include_router(family.routes(state))
    _surround(app, state)
    return app


def _surround(app: FastAPI, state: AppState) -> None:
    """What every request passes before its route, from the inside out."""
    options = state.options
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_credentials=options.allow_credentials,
            expose_headers=[ID_HEADER, "Retry-After"],
        )
    app.add_middleware(Guard, options=options, refused=state.metrics.refused)
    app.add_middleware(RequestLog, observers=[state.answered], access_log=options.access_log)
