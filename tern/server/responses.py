"""POST /v1/responses: from the request's JSON to a chat, and from the chat's parts to items. Answers are not kept."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tern.server.auth import owner_of
from tern.server.body import JsonObject
from tern.server.chat_plan import Asked, plan_chat
from tern.server.delivery import deliver
from tern.server.errors import NotKeptError
from tern.server.openapi import described
from tern.server.openapi.answers_responses import ResponseAnswer, ResponseEvent
from tern.server.openapi.operations import GENERATING
from tern.server.response_answers import ResponseForm, ResponseWriter
from tern.server.response_input import as_chat
from tern.server.schemas.fields import read_fields
from tern.server.schemas.responses import KEPT_NOWHERE, ResponsesRequest
from tern.server.schemas.structured import reading_size
from tern.server.state import AppState
from tern.server.translation import Translation


def routes(state: AppState) -> APIRouter:
    """The family's routes."""
    router = APIRouter()

    @router.post(
        "/v1/responses",
        **described(
            "Answer a conversation in items",
            ResponseAnswer,
            meaning="OpenAI's newer form of a chat, whole or as named server-sent events; answers are not kept.",
            request=ResponsesRequest,
            chunk=ResponseEvent,
            errors=GENERATING,
        ),
    )
    async def create_response(http: Request) -> Response:
        arrived = time.monotonic()
        owner = owner_of(http, state.options.api_keys)
        state.check_ready()
        body = await state.read_json(http)
        request, chat, asked = await state.offload.run(reading_size(body.fields, body.size), _read, state, body.fields)
        form = ResponseForm(
            answer_id=f"resp_{uuid.uuid4().hex}",
            created=int(time.time()),
            model=state.model_name,
            request=request,
            params=asked.params,
            tokenizer=state.protocol.tokenizer,
        )
        plan = plan_chat(state, asked, request_id=form.answer_id, owner=owner, arrived=arrived)
        return await deliver(state, http, plan, chat, ResponseWriter(form), stream=request.stream)

    nothing = described("Find a response", meaning="Always 404: answers are not kept.", errors=(401, 404), only=404)

    @router.get("/v1/responses/{response_id}", **nothing)
    @router.delete("/v1/responses/{response_id}", **nothing)
    async def find_response(http: Request, response_id: str) -> Response:
        owner_of(http, state.options.api_keys)
        raise NotKeptError(f"There is no response {response_id[:100]!r}: {KEPT_NOWHERE}.")

    return router


def _read(state: AppState, fields: JsonObject) -> tuple[ResponsesRequest, Translation, Asked]:
    request = read_fields(ResponsesRequest, fields)
    chat = as_chat(request)
    return request, chat, chat.read(state)
