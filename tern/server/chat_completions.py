"""POST /v1/chat/completions: from the request's JSON to a generation, and the choice between whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from tern.chat import ParserState, RenderedPrompt, ResponseParser, bad_word_sequences, validate_tools
from tern.engine import SamplingParams
from tern.errors import InvalidRequestError
from tern.server.auth import owner_of
from tern.server.body import JsonObject
from tern.server.chat_answers import ChatShape, stream_answer, whole_answer
from tern.server.choices import Plan, start
from tern.server.schemas.chat import ChatRequest
from tern.server.schemas.fields import read_fields
from tern.server.state import AppState
from tern.server.streaming import EventStream, while_connected

EFFORT_TOKENS = {"none": 0, "low": 1024, "medium": 8192, "high": None}
"""The longest thought, in tokens, for each `reasoning_effort`; None is as long as it takes."""


def routes(state: AppState) -> APIRouter:
    """The family's routes."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(http: Request) -> Response:
        arrived = time.monotonic()
        owner = owner_of(http, state.options.api_keys)
        state.check_ready()
        body = await state.read_json(http)
        asked = await state.offload.run(body.size, _read, state, body.fields)
        shape = _shape(state, asked)
        generation = start(state, _plan(state, asked, shape.answer_id, owner, arrived))
        await generation.submit(state.offload)
        if asked.request.stream:
            return EventStream(generation, stream_answer(shape, generation, state.options.keep_alive_seconds))
        async with generation:
            updates = await while_connected(http.receive, generation.all_updates())
        return JSONResponse(await state.offload.run(len(updates), whole_answer, shape, updates))

    return router


@dataclass(frozen=True)
class Asked:
    """A request that was read and found good, its prompt rendered."""

    request: ChatRequest
    params: SamplingParams
    prompt: RenderedPrompt
    parser_state: ParserState
    bad_words: Sequence[tuple[int, ...]]


def _read(state: AppState, fields: JsonObject) -> Asked:
    """Check a request and render it. Raises what is wrong with it."""
    request = read_fields(ChatRequest, fields)
    request.check()
    state.check_model(request.model)
    params = _sampling(state, request)
    prompt = _render(state, request)
    assert prompt.state is not None, "a rendered chat says where its answer begins"
    return Asked(request, params, prompt, prompt.state, bad_word_sequences(state.protocol.tokenizer, params.bad_words))


def _sampling(state: AppState, request: ChatRequest) -> SamplingParams:
    try:
        return request.sampling_params(
            state.model.generation.sampling_defaults(),
            max_tokens=request.token_limit,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            reasoning_max_tokens=_thought_limit(request),
        )
    except InvalidRequestError as error:
        raise request.named(error) from None


def _thought_limit(request: ChatRequest) -> int | None:
    """The stricter of the limit in tokens and the limit that the effort implies."""
    effort = EFFORT_TOKENS.get(request.reasoning_effort or "high")
    limits = [limit for limit in (request.thinking_limit, effort) if limit is not None]
    return min(limits, default=None)


def _render(state: AppState, request: ChatRequest) -> RenderedPrompt:
    validate_tools(request.tools)  # also where tool_choice keeps them from the model
    kwargs: dict[str, Any] = dict(request.chat_template_kwargs or {})
    if _thought_limit(request) == 0:
        kwargs["enable_thinking"] = False
    return state.protocol.prompt(request.messages, tools=request.offered_tools, template_kwargs=kwargs)


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
    )


def _plan(state: AppState, asked: Asked, request_id: str, owner: str | None, arrived: float) -> Plan:
    request = asked.request
    return Plan(
        request_id=request_id,
        prompts=[tuple(asked.prompt.token_ids)],
        params=asked.params,
        bad_words=asked.bad_words,
        new_stream=lambda: state.protocol.text_stream(asked.params, prompt=asked.prompt),
        new_parser=lambda: ResponseParser(tools=request.offered_tools, start=asked.parser_state),
        arrived=arrived,
        owner=owner,
        priority=request.priority,
        single_call=not request.parallel_tool_calls,
    )
