"""POST /v1/completions: several prompts as text or token ids, `n` choices of each, without template or parser."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tern.chat import CompiledGrammar, Tokenizer, bad_word_sequences
from tern.engine import SamplingParams
from tern.errors import ContextLengthError, InvalidRequestError
from tern.server.auth import owner_of
from tern.server.body import JsonObject
from tern.server.choices import Plan, start
from tern.server.completion_answers import CompletionShape, stream_answer, whole_answer
from tern.server.delivery import deliver_whole
from tern.server.openapi import described
from tern.server.openapi.answers import Completion, CompletionEvent
from tern.server.openapi.operations import GENERATING
from tern.server.schemas.completion import DEFAULT_MAX_TOKENS, CompletionRequest, Prompt
from tern.server.schemas.fields import read_fields
from tern.server.schemas.structured import reading_size
from tern.server.sink import PlainText
from tern.server.state import AppState
from tern.server.streaming import EventStream


def routes(state: AppState) -> APIRouter:
    """The family's routes."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        **described(
            "Continue prompts",
            Completion,
            meaning="Continues plain prompts, whole or as server-sent events. There is no template: tags are text.",
            request=CompletionRequest,
            chunk=CompletionEvent,
            errors=GENERATING,
        ),
    )
    async def create_completion(http: Request) -> Response:
        arrived = time.monotonic()
        owner = owner_of(http, state.options.api_keys)
        state.check_ready()
        body = await state.read_json(http)
        asked = await state.offload.run(reading_size(body.fields, body.size), _read, state, body.fields)
        shape = _shape(state, asked)
        plan = Plan(
            request_id=shape.answer_id,
            prompts=asked.prompts,
            params=asked.params,
            bad_words=asked.bad_words,
            new_stream=lambda: state.protocol.text_stream(asked.params),
            new_parser=PlainText,
            arrived=arrived,
            owner=owner,
            priority=asked.request.priority,
            new_grammar=lambda: asked.grammar.start() if asked.grammar else None,
        )
        generation = start(state, plan)
        try:
            await generation.submit(state.offload)
        except ContextLengthError as error:  # the engine cannot know what its caller calls a prompt
            raise ContextLengthError(str(error), param="prompt") from None
        if asked.request.stream:
            return EventStream(generation, stream_answer(shape, generation, state.options.keep_alive_seconds))
        return await deliver_whole(state, http, generation, partial(whole_answer, shape))

    return router


@dataclass(frozen=True)
class Asked:
    """A request that was read and found good: its prompts as token ids, and what each echoes ("" for nothing)."""

    request: CompletionRequest
    params: SamplingParams
    prompts: Sequence[tuple[int, ...]]
    echoes: Sequence[str]
    bad_words: Sequence[tuple[int, ...]]
    grammar: CompiledGrammar | None


def _read(state: AppState, fields: JsonObject) -> Asked:
    """Check a request and tokenise it. Raises what is wrong with it."""
    request = read_fields(CompletionRequest, fields)
    request.check()
    state.check_model(request.model)
    limit = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    params = request.sampling_params(
        state.model.generation.sampling_defaults(), max_tokens=limit, prompt_logprobs=request.num_scored_top
    )
    given = request.prompts()
    tokenizer = state.protocol.tokenizer
    if request.add_special_tokens:  # from here on they are part of the prompt, and of its echo
        given = [
            prompt if isinstance(prompt, list) else tokenizer.encode(prompt, add_special_tokens=True)
            for prompt in given
        ]
    prompts = [tuple(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in given]
    try:
        echoes = [_text(tokenizer, prompt) if request.echo else "" for prompt in given]
    except InvalidRequestError as error:  # an id outside the vocabulary
        raise InvalidRequestError(str(error), param="prompt") from None
    grammar = state.grammars.for_text(request.answer_form())
    return Asked(request, params, prompts, echoes, bad_word_sequences(tokenizer, params.bad_words), grammar)


def _text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)


def _shape(state: AppState, asked: Asked) -> CompletionShape:
    return CompletionShape(
        answer_id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=state.model_name,
        tokenizer=state.protocol.tokenizer,
        prompts=tuple(asked.prompts),
        echoes=tuple(asked.echoes),
        choices_each=asked.request.n,
        num_top=asked.request.logprobs,
        skip_special_tokens=asked.request.skip_special_tokens,
        token_ids=asked.request.return_token_ids,
        usage_at_end=asked.request.usage_at_end,
        usage_always=asked.request.usage_always,
        num_prompt_top=asked.request.prompt_logprobs,
        tokens_as_ids=asked.request.return_tokens_as_token_ids,
    )
