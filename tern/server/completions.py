"""POST /v1/completions: several prompts as text or token ids, `n` choices of each, without template or parser."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from tern.engine import SamplingParams
from tern.server.auth import owner_of
from tern.server.choices import Plan, start
from tern.server.completion_answers import CompletionShape, stream_answer, whole_answer
from tern.server.schemas.completion import DEFAULT_MAX_TOKENS, CompletionRequest, Prompt
from tern.server.schemas.fields import read_fields
from tern.server.sink import PlainText
from tern.server.state import AppState
from tern.server.streaming import EventStream, while_connected


def routes(state: AppState) -> APIRouter:
    """The family's routes."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(http: Request) -> Response:
        owner = owner_of(http, state.options.api_keys)
        state.check_ready()
        body = await state.read_json(http)
        request = read_fields(CompletionRequest, body.fields)
        request.check()
        state.check_model(request.model)
        params = _sampling(state, request)
        given = request.prompts()
        prompts = await state.offload.run(body.size, _tokenise, state, given)
        shape = _shape(state, request, given, prompts)
        plan = Plan(
            request_id=shape.answer_id,
            prompts=prompts,
            params=params,
            new_stream=lambda: state.protocol.text_stream(params),
            new_parser=PlainText,
            owner=owner,
            priority=request.priority,
        )
        generation = start(state, plan)
        await generation.submit(state.offload)
        if request.stream:
            return EventStream(generation, stream_answer(shape, generation, state.options.keep_alive_seconds))
        async with generation:
            updates = await while_connected(http.receive, generation.all_updates())
        return JSONResponse(whole_answer(shape, updates))

    return router


def _sampling(state: AppState, request: CompletionRequest) -> SamplingParams:
    limit = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return request.sampling_params(state.model.generation.sampling_defaults(), max_tokens=limit)


def _tokenise(state: AppState, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    encode = state.protocol.tokenizer.encode
    return [tuple(encode(prompt) if isinstance(prompt, str) else prompt) for prompt in prompts]


def _shape(
    state: AppState, request: CompletionRequest, given: Sequence[Prompt], prompts: Sequence[tuple[int, ...]]
) -> CompletionShape:
    echoes = [""] * len(given)
    if request.echo:
        decode = state.protocol.tokenizer.decode
        echoes = [prompt if isinstance(prompt, str) else decode(prompt, skip_special_tokens=False) for prompt in given]
    return CompletionShape(
        answer_id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=state.model_name,
        tokenizer=state.protocol.tokenizer,
        prompts=tuple(prompts),
        echoes=tuple(echoes),
        choices_each=request.n,
        num_top=request.logprobs,
        token_ids=request.return_token_ids,
        usage_at_end=request.usage_at_end,
        usage_always=request.usage_always,
    )
