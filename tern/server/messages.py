"""POST /v1/messages and /v1/messages/count_tokens: from JSON to a chat, from the chat's parts to blocks."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from tern.errors import ContextLengthError
from tern.server.auth import owner_of
from tern.server.body import JsonObject
from tern.server.chat_plan import Asked, plan_chat
from tern.server.delivery import deliver
from tern.server.message_answers import MessageForm, MessageWriter
from tern.server.message_input import as_chat
from tern.server.openapi import described
from tern.server.openapi.answers_messages import CountedTokens, Message, MessageError, MessageEvent
from tern.server.openapi.operations import GENERATING, READING
from tern.server.schemas.fields import read_fields
from tern.server.schemas.messages import CountTokensRequest, MessagesRequest
from tern.server.schemas.structured import reading_size
from tern.server.state import AppState
from tern.server.translation import Translation


def routes(state: AppState) -> APIRouter:
    """The family's routes."""
    router = APIRouter()

    @router.post(
        "/v1/messages",
        **described(
            "Answer a conversation in blocks",
            Message,
            meaning="Anthropic's form of a chat, whole or as named server-sent events.",
            request=MessagesRequest,
            chunk=MessageEvent,
            errors=GENERATING,
            failure=MessageError,
        ),
    )
    async def create_message(http: Request) -> Response:
        arrived = time.monotonic()
        owner = owner_of(http, state.options.api_keys)
        state.check_ready()
        body = await state.read_json(http)
        request, chat, asked = await state.offload.run(reading_size(body.fields, body.size), _read, state, body.fields)
        form = MessageForm(
            answer_id=f"msg_{uuid.uuid4().hex}",
            model=state.model_name,
            num_prompt_tokens=len(asked.prompt.token_ids),
            shown=request.shows_thought,
            spelt_out=request.thinking is not None and request.thinking.display != "omitted",
        )
        plan = plan_chat(state, asked, request_id=form.answer_id, owner=owner, arrived=arrived)
        try:
            return await deliver(state, http, plan, chat, MessageWriter(form), stream=request.stream)
        except ContextLengthError:
            raise _too_long(state, asked) from None

    @router.post(
        "/v1/messages/count_tokens",
        **described(
            "Count a conversation's tokens",
            CountedTokens,
            meaning="How many tokens the engine would read, exactly.",
            request=CountTokensRequest,
            errors=READING,
            failure=MessageError,
        ),
    )
    async def count_tokens(http: Request) -> Response:
        owner_of(http, state.options.api_keys)
        body = await state.read_json(http)
        return JSONResponse(
            {"input_tokens": await state.offload.run(reading_size(body.fields, body.size), _count, state, body.fields)}
        )

    return router


def _read(state: AppState, fields: JsonObject) -> tuple[MessagesRequest, Translation, Asked]:
    request = read_fields(MessagesRequest, fields)
    chat = as_chat(request, drop_volatile_lines=state.options.drop_volatile_lines)
    return request, chat, chat.read(state)


def _count(state: AppState, fields: JsonObject) -> int:
    request = read_fields(CountTokensRequest, fields)
    chat = as_chat(request, drop_volatile_lines=state.options.drop_volatile_lines)
    return len(chat.read(state).prompt.token_ids)


def _too_long(state: AppState, asked: Asked) -> ContextLengthError:
    """Anthropic's words, by which coding agents see that they must compact, or ask for less, and by how much."""
    prompt, limit, wanted = len(asked.prompt.token_ids), state.engine.max_model_len, asked.params.max_tokens
    if prompt >= limit:
        return ContextLengthError(f"prompt is too long: {prompt} tokens > {limit - 1} maximum")
    return ContextLengthError(
        f"input length and `max_tokens` exceed context limit: {prompt} + {wanted} > {limit}, "
        "decrease input length or `max_tokens` and try again"
    )
