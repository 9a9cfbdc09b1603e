"""POST /v1/chat/completions: from the request's JSON to a generation, and the choice between whole and streamed."""

from __future__ import annotations

import time
import uuid
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tern.server.auth import owner_of
from tern.server.body import JsonObject
from tern.server.chat_answers import ChatShape, stream_answer, whole_answer
from tern.server.chat_plan import Asked, plan_chat, read_chat
from tern.server.choices import start
from tern.server.delivery import deliver_whole
from tern.server.openapi import described
from tern.server.openapi.answers import ChatCompletion, ChatCompletionEvent
from tern.server.openapi.operations import GENERATING
from tern.server.schemas.chat import ChatRequest
from tern.server.schemas.fields import read_fields
from tern.server.schemas.structured import reading_size
from tern.server.state import AppState
from tern.server.streaming import EventStream


def routes(state: AppState) -> APIRouter:
    """The family's routes."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        **described(
            "Answer a conversation",
            ChatCompletion,
            meaning="Answers a conversation, whole or as server-sent events: thought, answer and tool calls apart.",
            request=ChatRequest,
            chunk=ChatCompletionEvent,
            errors=GENERATING,
        ),
    )
    async def create_chat_completion(http: Request) -> Response:
        arrived = time.monotonic()
        owner = owner_of(http, state.options.api_keys)
        state.check_ready()
        body = await state.read_json(http)
        asked = await state.offload.run(reading_size(body.fields, body.size), _read, state, body.fields)
        shape = _shape(state, asked)
        plan = plan_chat(state, asked, request_id=shape.answer_id, owner=owner, arrived=arrived)
        generation = start(state, plan)
        await generation.submit(state.offload)
        if asked.request.stream:
            return EventStream(generation, stream_answer(shape, generation, state.options.keep_alive_seconds))
        return await deliver_whole(state, http, generation, partial(whole_answer, shape))

    return router


def _read(state: AppState, fields: JsonObject) -> Asked:
    return read_chat(state, read_fields(ChatRequest, fields))


def _shape(state: AppState, asked: Asked) -> ChatShape:
    request = asked.request
    return ChatShape(
        answer_id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=state.model_name,
        tokenizer=state.protocol.tokenizer,
        prompt_token_ids=tuple(asked.prompt.token_ids),
        choices=request.n,
        num_top=(request.top_logprobs or 0) if request.logprobs else None,
        token_ids=request.return_token_ids,
        usage_at_end=request.usage_at_end,
        usage_always=request.usage_always,
        num_prompt_top=request.prompt_logprobs,
        tokens_as_ids=request.return_tokens_as_token_ids,
        named_call=isinstance(asked.rules.choice, tuple),
    )
