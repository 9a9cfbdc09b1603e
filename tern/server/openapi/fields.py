"""What each field of a request means, and the values it takes beyond its type. Knows requests; knows no route.

The key is a field's name, or `Request.name` where requests mean different things by one name. Types come from the
requests themselves (`tern.server.schemas`), ranges from `SamplingParams`; a test sends values within and without.
"""

from __future__ import annotations

from collections.abc import Mapping

from tern.chat.messages import MAX_MESSAGES, MAX_TOOL_CALLS, ROLES
from tern.chat.tools import MAX_TOOLS
from tern.engine import sampling_params as limits
from tern.server.openapi import fields_forms, fields_messages, fields_responses
from tern.server.openapi.about import MAX_WHOLE, TEXT, About, Form, any_list, between, list_of, one_of, or_null, record
from tern.server.openapi.fields_forms import ARGUMENTS, STRICT, TOOL_DESCRIPTION, TOOL_NAME
from tern.server.schemas.chat import EFFORTS
from tern.server.schemas.sampling import MAX_PRIORITY

_TOKEN = {"type": "integer", **between(0, MAX_WHOLE)}
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_STOP = {"type": "string", "minLength": 1, "maxLength": limits.MAX_STOP_LENGTH}

_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": TEXT},
    "required": ["type", "text"],
}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "minLength": 1},
        "type": {"description": "function; not read."},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "arguments": {"type": ["string", "object", "null"], "description": "JSON text, or the object itself."},
            },
            "required": ["name"],
        },
    },
    "required": ["id", "function"],
}
_CONTENT = one_of(TEXT, any_list(one_of(TEXT, _PART)))
_THOUGHT: Form = {"type": ["string", "null"], "description": "The thought."}
_TURN = record(
    {"role": {"enum": [role for role in ROLES if role not in ("assistant", "tool")]}, "content": _CONTENT},
    ["role", "content"],
)
_RESULT = record(
    {
        "role": {"const": "tool"},
        "content": _CONTENT,
        "tool_call_id": {"type": "string", "minLength": 1, "description": "The call that is answered."},
    },
    ["role", "content", "tool_call_id"],
)
_ANSWER: Form = {
    **record(
        {
            "role": {"const": "assistant"},
            "content": or_null(_CONTENT),
            "reasoning_content": _THOUGHT,
            "reasoning": _THOUGHT,
            "tool_calls": or_null(list_of(_CALL, MAX_TOOL_CALLS)),
        },
        ["role"],
    ),
    "anyOf": [
        *(
            record({name: {"type": ["string", "array"]}}, [name])
            for name in ("content", "reasoning_content", "reasoning")
        ),
        record({"tool_calls": {"type": "array", "minItems": 1}}, ["tool_calls"]),
    ],
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": TOOL_NAME,
                "description": TOOL_DESCRIPTION,
                "parameters": ARGUMENTS,
                "strict": STRICT,
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_KWARGS = {"type": "object", "properties": {"enable_thinking": {"type": "boolean"}}, "additionalProperties": False}
_MESSAGES = About("The conversation.", list_of(one_of(_TURN, _RESULT, _ANSWER), MAX_MESSAGES, 1))
_TOOLS = About("The functions that the model may call.", list_of(_TOOL, MAX_TOOLS))
_TEMPLATE = About("Variables of the template; enable_thinking false answers without a thought.", _KWARGS)
_PROBABILITIES = between(0, limits.MAX_LOGPROBS)

ABOUT: Mapping[str, About] = {
    **fields_forms.ABOUT,
    **fields_responses.ABOUT,
    **fields_messages.ABOUT,
    "messages": _MESSAGES,
    "tools": _TOOLS,
    "chat_template_kwargs": _TEMPLATE,
    "model": About("The served model's name, or nothing."),
    "stream": About("Send the answer as server-sent events."),
    "stream_options": About("What a stream carries besides the answer."),
    "include_usage": About("End the stream with a chunk of usage."),
    "continuous_usage_stats": About("With include_usage: usage so far in every chunk."),
    "include_obfuscation": About("Accepted; changes nothing."),
    "n": About("Choices for each prompt.", between(1, limits.MAX_CHOICES)),
    "max_tokens": About("Most tokens to generate, thought included; by default as many as fit.", between(1, MAX_WHOLE)),
    "max_completion_tokens": About("The newer name of max_tokens.", between(1, MAX_WHOLE)),
    "CompletionRequest.max_tokens": About(
        "Most tokens to generate, 16 by default; 0 with echo or prompt_logprobs generates none.", between(0, MAX_WHOLE)
    ),
    "temperature": About("0 always takes the likeliest token; default: the checkpoint's own.", between(0, 10)),
    "top_p": About("Share of the probability to draw from.", {"exclusiveMinimum": 0, "maximum": 1}),
    "top_k": About("Likeliest tokens to draw from; -1 and 0 are all.", between(-1, MAX_WHOLE)),
    "min_p": About("Least probability, as a share of the likeliest token's.", between(0, 1)),
    "frequency_penalty": About("Lowers tokens by how often they were written.", between(-2, 2)),
    "presence_penalty": About("Lowers tokens that were written.", between(-2, 2)),
    "repetition_penalty": About(
        "Divides the scores of tokens of prompt and answer.", between(limits.MIN_REPETITION_PENALTY, 10)
    ),
    "logit_bias": About(
        "What is added to the scores of tokens, by id.",
        {
            "additionalProperties": {"type": "number", **between(-100, 100)},
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "maxProperties": limits.MAX_BIASED_TOKENS,
        },
    ),
    "bad_words": About("Texts never to write.", list_of({"type": "string", "minLength": 1}, limits.MAX_BAD_WORDS)),
    "allowed_token_ids": About("The only tokens that may be chosen.", list_of(_TOKEN, limits.MAX_ALLOWED_TOKENS)),
    "seed": About(
        "The same request with the same seed gives the same answer.",
        between(limits.SEED_RANGE[0], limits.SEED_RANGE[1]),
    ),
    "stop": About(
        "Texts that end the answer; in a chat they count only behind the thought.",
        {"anyOf": [_STOP, list_of(_STOP, limits.MAX_STOP_STRINGS)]},
    ),
    "stop_token_ids": About("Tokens that end the answer.", list_of(_TOKEN, limits.MAX_STOP_TOKENS)),
    "include_stop_str_in_output": About("Whether what ended the answer stands in it."),
    "ignore_eos": About("Go on past the model's end token."),
    "min_tokens": About("No end before so many tokens; at most max_tokens.", between(0, MAX_WHOLE)),
    "skip_special_tokens": About("Leave control tokens out of the text."),
    "priority": About("Lower goes first.", between(-MAX_PRIORITY, MAX_PRIORITY)),
    "return_token_ids": About("Add prompt_token_ids and each choice's token_ids."),
    "return_tokens_as_token_ids": About("Log-probabilities call tokens token_id:123."),
    "prompt_logprobs": About(
        "Add each prompt token's log-probability and those of so many likeliest tokens; not in a stream.",
        _PROBABILITIES,
    ),
    "parallel_tool_calls": About("False ends the answer behind its first call."),
    "logprobs": About("Add the log-probability of every sampled token."),
    "CompletionRequest.logprobs": About("Add log-probabilities, with so many likeliest tokens.", _PROBABILITIES),
    "top_logprobs": About("With logprobs: so many likeliest tokens at each place.", _PROBABILITIES),
    "reasoning_effort": About(
        "none: no thought; low and medium bound it to 1024 and 8192 tokens; high does not.", {"enum": list(EFFORTS)}
    ),
    "reasoning_max_tokens": About("The longest thought in tokens; then it is closed.", between(0, MAX_WHOLE)),
    "thinking_budget": About("Another name of reasoning_max_tokens.", between(0, MAX_WHOLE)),
    "prompt": About(
        "What to continue: text, token ids, or a list of either; at most 1024 prompts times n.",
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                _IDS,
                list_of({"type": "string", "minLength": 1}, 1024, 1),
                list_of(_IDS, 1024, 1),
            ]
        },
    ),
    "TokenizeRequest.prompt": About("Plain text; give it or messages."),
    "echo": About("Put the prompt before its completion, with its log-probabilities if those are asked for."),
    "add_special_tokens": About("Begin text prompts with the checkpoint's begin token, where it has one."),
    "return_token_strs": About("Add each token's text."),
    "tokens": About("The token ids.", {"type": "array", "items": {"type": "integer"}}),
}
"""What there is to say of every field of every request."""


def about(request: str, name: str) -> About | None:
    """What there is to say of a request's field."""
    return ABOUT.get(f"{request}.{name}") or ABOUT.get(name)
