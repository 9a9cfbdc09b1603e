"""Routes that other servers have and this one does not yet: each says so by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tern.errors import UnsupportedFeatureError
from tern.server.auth import owner_of
from tern.server.state import AppState

NOT_YET = ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens")


def routes(state: AppState) -> APIRouter:
    """One refusing route for each path."""
    router = APIRouter()
    for path in NOT_YET:
        router.add_api_route(path, _refusal(state, path), methods=["POST"], include_in_schema=False)
    return router


def _refusal(state: AppState, path: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(http: Request) -> Response:
        owner_of(http, state.options.api_keys)
        raise UnsupportedFeatureError(f"{path} is not supported yet: use /v1/chat/completions.")

    return refuse
