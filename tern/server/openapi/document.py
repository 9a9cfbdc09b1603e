"""The document of a whole application. Knows FastAPI's own generator and what it adds that is not so here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tern import __version__
from tern.server.openapi.operations import SCHEMAS

ABOUT = (
    "ERNIE-4.5 behind OpenAI's and Anthropic's APIs, with the additions of vLLM and FastDeploy. "
    "Whole numbers are written without a fraction: 1.0 is none."
)
KEY = {"type": "http", "scheme": "bearer", "description": "One of the keys that the server was started with, if any."}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the application's routes."""
    made: dict[str, Any] = get_openapi(title="Tern", version=__version__, description=ABOUT, routes=app.routes)
    schemas: dict[str, Any] = {}
    for methods in made["paths"].values():
        for operation in methods.values():
            schemas.update(operation.pop(SCHEMAS, {}))
            operation["responses"].pop("422", None)  # FastAPI's own answer to a wrong path parameter: none can be wrong
    made["components"] = {"schemas": dict(sorted(schemas.items())), "securitySchemes": {"key": KEY}}
    return made
