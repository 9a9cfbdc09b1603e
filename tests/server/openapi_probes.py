"""A good request for every route, and values to try in place of each of its fields: good ones and wrong ones."""

from __future__ import annotations

from typing import Any

from server_fakes import USER, WEATHER_CALL, WEATHER_TOOL

from tern.server.schemas.chat import ChatRequest
from tern.server.schemas.completion import CompletionRequest
from tern.server.schemas.fields import Schema
from tern.server.schemas.messages import CountTokensRequest, MessagesRequest, OutputOptions, ThinkingOptions
from tern.server.schemas.responses import ReasoningOptions, ResponsesRequest, TextOptions
from tern.server.schemas.sampling import StreamOptions
from tern.server.schemas.tokenization import DetokenizeRequest, TokenizeRequest

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSE, MESSAGE, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
FUNCTION = WEATHER_TOOL["function"]
RESPONSE_TOOL = {"type": "function", **FUNCTION}
EVERYTHING = "First.\n</think>\n\n<response>\nLook.\n</response>\n" + WEATHER_CALL.split("</think>\n\n")[1]
MESSAGE_TOOL = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}
REQUESTS: dict[str, tuple[type[Schema], dict[str, Any]]] = {
    CHAT: (ChatRequest, {"messages": USER}),
    COMPLETION: (CompletionRequest, {"prompt": "Once"}),
    RESPONSE: (ResponsesRequest, {"input": "How is the weather?"}),
    MESSAGE: (MessagesRequest, {"messages": USER, "max_tokens": 300}),
    COUNT: (CountTokensRequest, {"messages": USER}),
    "/tokenize": (TokenizeRequest, {"prompt": "Once"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}
NESTED = (StreamOptions, TextOptions, ReasoningOptions, ThinkingOptions, OutputOptions)
SCHEMAS_OF_REQUESTS = [*(schema for schema, _ in REQUESTS.values()), *NESTED]
KEPT_NOWHERE = "/v1/responses/{response_id}"

PROBES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 21, 129, 2**31 - 1, 2**31, -(2**31), 2**63, 10.5, -101, 101),
    *("", "x", "none", "auto", "medium", "x" * 4097, [], ["x"], [""], [1], [-1], [0.5], [[]], [[1]], ["x"] * 65),
    *(
        {},
        {"1": 1},
        {"1": 101},
        {"x": 1},
        {"enable_thinking": True},
        {"enable_thinking": 1},
        {"type": "text"},
        ["text"],
    ),
    *({"include_usage": True}, {"include_usage": None}, {"other": 1}, [{"role": "user", "content": "x"}]),
    *(
        [{"role": "user"}],
        [{"role": "you", "content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    ),
    *(
        [{"role": "user", "content": 5}],
        [WEATHER_TOOL],
        [{"type": "function"}],
        [{"type": "x", "function": {"name": "a"}}],
    ),
]
FORMS: list[Any] = [
    {"type": "text", "more": None},
    {"type": "text", "more": 1},
    {"type": "json_object"},
    {"type": "structural_tag"},
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"schema": {}, "name": "a", "strict": False, "description": None}},
    {"type": "json_schema", "json_schema": {"schema": {}, "name": 5}},
    {"type": "json_schema", "json_schema": {"schema": {}, "more": 5}},
    {"type": "json_schema", "json_schema": {"schema": True}},
    {"type": "json_schema", "schema": {"type": "object"}, "name": None},
    {"type": "json_schema", "schema": {"type": "object"}, "strict": 1},
    {"type": "json_schema", "schema": 5},
    {"json": {"type": "object"}},
    {"json": '{"type": "object"}', "regex": None},
    {"json": 5},
    {"json": {}, "regex": "x"},
    {"regex": "[0-9]", "json_object": False, "disable_fallback": True},
    {"regex": "[0-9]", "disable_any_whitespace": True},
    {"regex": "[0-9]", "more": 1},
    {"choice": ["a", "b"]},
    {"choice": [5]},
    {"grammar": 'start: "x"'},
    {"json_object": True},
    {"json_object": False},
    ["a", "b"],
    "[0-9]",
    'start: "x"',
    '{"type": "object"}',
]
CHOICES: list[Any] = [
    *("required", "any"),
    {"type": "auto"},
    {"type": "any", "disable_parallel_tool_use": True},
    {"type": "none", "disable_parallel_tool_use": "x"},
    {"type": "tool", "name": "get_weather"},
    {"type": "tool"},
    {"type": "function", "name": "get_weather"},
    {"type": "function", "function": {"name": "get_weather"}},
    {"type": "function", "function": "get_weather"},
    {"type": "function"},
    {"type": "web_search"},
    {"type": "allowed_tools", "tools": [{"type": "function", "name": "get_weather"}], "mode": "required"},
    {"type": "allowed_tools", "tools": [], "mode": None},
    {"type": "allowed_tools", "tools": [], "mode": "any"},
    {"type": "allowed_tools", "mode": "auto"},
]
TOOLS: list[Any] = [
    [RESPONSE_TOOL],
    [MESSAGE_TOOL],
    [{**MESSAGE_TOOL, "type": "custom"}],
    [{"type": "custom"}],
    [{"type": "bash_20250124", "name": "bash"}, {"type": "local_shell"}],
    [{"name": "a b"}],
    [{"type": "function", "name": "a b"}],
    [{"type": "function", "name": "f", "description": 5}],
    [{"type": "function", "name": "f", "parameters": None, "strict": None}],
    [{}],
]
OPTIONS: list[Any] = [
    {"format": {"type": "text"}, "verbosity": "medium"},
    {"format": None, "verbosity": "low"},
    *({"format": form} for form in FORMS if isinstance(form, dict) and "type" in form),
    *({"effort": effort} for effort in (None, "none", "minimal", "low", "medium", "high", "xhigh", "max", "x", 5)),
    {"summary": "auto", "generate_summary": None, "context": "all_turns"},
    {"context": "current_turn"},
    {"summary": 5},
    *({"type": kind} for kind in ("enabled", "adaptive", "disabled", "between_tools", "x")),
    {"type": "enabled", "budget_tokens": 5, "display": "omitted"},
    {"type": "enabled", "budget_tokens": -1},
    {"type": "adaptive", "display": "x"},
]
TURNS: list[Any] = [
    [{"type": "message", "role": "developer", "content": "x"}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]}, *USER],
    [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, {"type": "redacted_thinking"}]}, *USER],
    [{"role": "assistant", "content": [{"type": "thinking"}]}, *USER],
    [{"role": "assistant", "content": [{"type": "web_search_tool_result"}, {"type": "text", "text": "x"}]}, *USER],
    [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "is_error": True}]},
    ],
    [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "input": {}}]}, *USER],
    [{"type": "reasoning", "summary": [{"text": "x"}], "content": None}, *USER],
    [{"type": "reasoning", "content": [{"text": 5}]}, *USER],
    [
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "x"}]},
    ],
    [{"type": "function_call", "call_id": "a", "arguments": "{}"}, *USER],
    [{"type": "custom_tool_call", "call_id": "a", "name": "f", "input": "x"}, *USER],
    [{"type": "custom_tool_call", "call_id": "a", "name": "f", "input": None}, *USER],
    [{"type": "web_search_call", "id": "x"}, *USER],
    [{"type": "item_reference", "id": "x"}, *USER],
    *(["message.output_text.logprobs", "reasoning.encrypted_content"], {"run": "7"}, "disabled"),
    [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
]
PROBES += [*FORMS, *CHOICES, *TOOLS, *OPTIONS, *TURNS]

COMPANIONS: dict[str, dict[str, dict[str, Any]]] = {
    "stream_options": {path: {"stream": True} for path in (CHAT, COMPLETION, RESPONSE)},
    "top_logprobs": {CHAT: {"logprobs": True}},
    "tool_choice": {
        CHAT: {"tools": [WEATHER_TOOL]},
        RESPONSE: {"tools": [RESPONSE_TOOL]},
        **{path: {"tools": [MESSAGE_TOOL]} for path in (MESSAGE, COUNT)},
    },
}
"""What a field cannot be given without."""
