"""What happens to a field before its schema sees it: null is absence, harmless ones are dropped, others are named.

A field that a schema does not declare is served in one of three ways. It is *ignored* if it cannot change the answer;
it is *neutral* if the one value given means what Tern does anyway; else the request is refused with the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tern.errors import InvalidRequestError, UnsupportedFeatureError

IGNORED: Mapping[str, str] = {
    "user": "names the end user, for the provider's own accounting",
    "metadata": "labels for a dashboard",
    "store": "asks to keep the answer for a dashboard; nothing is kept here",
    "service_tier": "chooses a price",
    "safety_identifier": "names the end user, for the provider's own checks",
    "prompt_cache_key": "hints at which prompts begin alike; the prefix cache finds them itself",
    "prompt_cache_retention": "hints how long to keep a prefix; the cache decides by use",
    "prediction": "a guess at the answer, to speed it up",
    "request_id": "names the request; the server names it itself",
    "max_streaming_response_tokens": "says how tokens are grouped into chunks",
}
"""Fields that cannot change the answer, and what they are for elsewhere."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "bad_words_token_ids": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "disable_chat_template": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": (),
    "functions": ([],),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
"""Fields that other servers know, and the values under which leaving them out changes nothing."""

INSTEAD: Mapping[str, str] = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "chat_template": "the template is the checkpoint's own",
    "cache_salt": "the server keeps the caches of different keys apart",
    "truncate_prompt_tokens": "prompts are never cut",
    "best_of": "ask for n choices with logprobs and take the one you like best",
    "suffix": "this model writes on and fills no gaps, so put all that it shall know into prompt",
    "use_beam_search": "sample, or ask for n choices",
    "enable_thinking": "write chat_template_kwargs.enable_thinking",
}
"""The way out, where there is one."""


class Schema(BaseModel):
    """Base of every request: exact types, no unknown fields. A field's description says what it must be."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    ignored: ClassVar[Mapping[str, str]] = {}
    """Fields of this family alone that cannot change the answer, as in `IGNORED`."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of this family alone and the values that change nothing, as in `NEUTRAL`."""


AnySchema = TypeVar("AnySchema", bound=Schema)


def read_fields(schema: type[AnySchema], body: Mapping[str, Any]) -> AnySchema:
    """Validate a body.

    Raises `UnsupportedFeatureError` for a known field that is not served, `InvalidRequestError` for an unknown field or
    a wrong value, each naming the field.
    """
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name in schema.model_fields:
            if value is not None:
                kept[name] = value
        elif name == "metadata":
            _check_metadata(value)
        elif value is not None and name not in IGNORED and name not in schema.ignored:
            _check_foreign(name, value, {**NEUTRAL, **schema.neutral})
    try:
        return schema.model_validate(kept)
    except ValidationError as error:
        raise _first_problem(schema, error) from None


def _check_metadata(labels: Any) -> None:
    """FastDeploy reads switches from among the labels: they would change the answer."""
    for name in ("enable_thinking", "reasoning_max_tokens"):
        if isinstance(labels, Mapping) and name in labels:
            hint = INSTEAD.get(name, f"write {name} beside messages")
            raise InvalidRequestError(f"metadata.{name} is not read: {hint}.", param=f"metadata.{name}")


def _check_foreign(name: str, value: Any, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    if name in neutral:
        if any(type(value) is type(same) and value == same for same in neutral[name]):
            return
        hint = f": {INSTEAD[name]}." if name in INSTEAD else "."
        raise UnsupportedFeatureError(f"{name} is not supported yet{hint}", param=name)
    hint = INSTEAD.get(name, "leave it out")
    raise InvalidRequestError(f"{name} is not a field of this request: {hint}.", param=name, code="unknown_field")


def _first_problem(schema: type[Schema], error: ValidationError) -> InvalidRequestError:
    problem = error.errors(include_url=False)[0]
    model, path, described = schema, "", "something else"
    for part in problem["loc"]:
        field = model.model_fields.get(str(part))
        if field is None:
            # Below a field that is no schema the location tells of unions and list items; the description says it all.
            break
        path = f"{path}.{part}" if path else str(part)
        described = field.description or described
        model = schema_of(field.annotation) or Schema
    if problem["type"] == "missing":
        return InvalidRequestError(f"{path} is missing: it must be {described}.", param=path, code="missing")
    if problem["type"] == "extra_forbidden":
        path = ".".join(str(part) for part in problem["loc"])
        return InvalidRequestError(
            f"{path} is not a field of this request: leave it out.", param=path, code="unknown_field"
        )
    return InvalidRequestError(f"{path} is {short(problem['input'])}: it must be {described}.", param=path)


def schema_of(annotation: Any) -> type[Schema] | None:
    """The schema inside `X` or `X | None`, if X is one."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Schema):
            return candidate
    return None


def short(value: object) -> str:
    """A value as a complaint shows it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
