"""GET /v1/models and /v1/models/{id}: the one model that is served, in OpenAI's form with vLLM's fields and Tern's."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from tern.server.auth import owner_of
from tern.server.body import JsonObject
from tern.server.openapi import described
from tern.server.openapi.answers import ModelCard, ModelList
from tern.server.state import AppState


def routes(state: AppState) -> APIRouter:
    """The family's routes."""
    router = APIRouter()

    @router.get("/v1/models", **described("List models", ModelList, meaning="The one model there is.", errors=(401,)))
    async def list_models(http: Request) -> Response:
        owner_of(http, state.options.api_keys)
        return JSONResponse({"object": "list", "data": [_card(state)]})

    @router.get(
        "/v1/models/{model_id:path}",
        **described("Show a model", ModelCard, meaning="The model, if it is the one there is.", errors=(401, 404)),
    )
    async def retrieve_model(http: Request, model_id: str) -> Response:
        owner_of(http, state.options.api_keys)
        state.check_model(model_id)
        return JSONResponse(_card(state))

    return router


def _card(state: AppState) -> JsonObject:
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "tern",
        "root": state.model.name,
        "parent": None,
        "max_model_len": state.engine.max_model_len,
        "permission": [_permission(state)],
        "tern": asdict(state.engine.facts()),
    }


def _permission(state: AppState) -> JsonObject:
    """What may be done with the model, as OpenAI once said it and older clients still read it."""
    return {
        "id": f"modelperm-{state.created}",
        "object": "model_permission",
        "created": state.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
