"""The web application: every family of routes over one state. Knows which families there are, and nothing of them."""

from __future__ import annotations

from fastapi import FastAPI

from tern.server import chat_completions, completions, health, messages, models, responses, tokenization
from tern.server.errors import install_error_handlers
from tern.server.state import AppState

FAMILIES = (chat_completions, completions, responses, messages, models, tokenization, health)


def create_app(state: AppState) -> FastAPI:
    """The application for a server; it starts and stops nothing.

    Pages with interactive documentation are left out: they load scripts from elsewhere.
    """
    app = FastAPI(title="Tern", docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app, state.metrics.refused)
    for family in FAMILIES:
        app.include_router(family.routes(state))
    return app
