"""POST /tokenize and /detokenize, in vLLM's forms: what the model reads for a text or a chat, and ids back as text."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from tern.errors import InvalidRequestError
from tern.server.auth import owner_of
from tern.server.body import JsonObject
from tern.server.logprobs import token_name
from tern.server.openapi import described
from tern.server.openapi.answers import Detokenized, Tokenized
from tern.server.openapi.operations import READING
from tern.server.schemas.chat import check_template_kwargs
from tern.server.schemas.fields import read_fields
from tern.server.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from tern.server.state import AppState

SLICE = 10_000
"""Items of a list that are written as JSON at once: about a millisecond."""


def routes(state: AppState) -> APIRouter:
    """The family's routes."""
    router = APIRouter()

    @router.post(
        "/tokenize",
        **described(
            "Text or chat to token ids",
            Tokenized,
            meaning="What the model reads for a text, or for a chat in the checkpoint's template.",
            request=TokenizeRequest,
            errors=READING,
        ),
    )
    async def tokenize(http: Request) -> Response:
        owner_of(http, state.options.api_keys)
        body = await state.read_json(http)
        return await state.offload.run(body.size, _tokenize, state, body.fields)

    @router.post(
        "/detokenize",
        **described(
            "Token ids to text",
            Detokenized,
            meaning="The text of token ids, control tokens spelt out.",
            request=DetokenizeRequest,
            errors=READING,
        ),
    )
    async def detokenize(http: Request) -> Response:
        owner_of(http, state.options.api_keys)
        body = await state.read_json(http)
        return await state.offload.run(body.size, _detokenize, state, body.fields)

    return router


def _tokenize(state: AppState, fields: JsonObject) -> Response:
    request = read_fields(TokenizeRequest, fields)
    request.check()
    check_template_kwargs(request.chat_template_kwargs)
    state.check_model(request.model)
    if request.prompt is not None:
        ids = state.protocol.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens)
    else:
        kwargs = request.chat_template_kwargs or {}
        ids = list(state.protocol.prompt(request.messages or [], tools=request.tools, template_kwargs=kwargs).token_ids)
    answer: JsonObject = {"count": len(ids), "max_model_len": state.engine.max_model_len, "tokens": ids}
    if request.return_token_strs:
        answer["token_strs"] = [token_name(state.protocol.tokenizer, token_id) for token_id in ids]
    return Response(_json_in_slices(answer), media_type="application/json")


def _json_in_slices(answer: JsonObject) -> bytes:
    """An object as JSON, its lists piece by piece: one call for a long list would let no other thread run meanwhile."""
    return b"{" + b",".join(_json(key) + b":" + _json_of(value) for key, value in answer.items()) + b"}"


def _json_of(value: Any) -> bytes:
    if not isinstance(value, list):
        return _json(value)
    slices = (value[start : start + SLICE] for start in range(0, len(value), SLICE))
    return b"[" + b",".join(_json(piece)[1:-1] for piece in slices) + b"]"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _detokenize(state: AppState, fields: JsonObject) -> Response:
    request = read_fields(DetokenizeRequest, fields)
    state.check_model(request.model)
    try:
        return JSONResponse({"prompt": state.protocol.tokenizer.decode(request.tokens, skip_special_tokens=False)})
    except InvalidRequestError as error:  # an id outside the vocabulary
        raise InvalidRequestError(str(error), param="tokens") from None
