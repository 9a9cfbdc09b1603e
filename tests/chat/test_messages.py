"""Messages and tools in OpenAI's form: what is accepted, what it becomes, and the sentence for what is not."""

from __future__ import annotations

import copy
import json
import math

import pytest

from tern.chat import validate_messages, validate_tools
from tern.chat.messages import MAX_MESSAGES
from tern.chat.tools import MAX_SCHEMA_DEPTH, MAX_SCHEMA_NODES, MAX_TOOLS
from tern.errors import InvalidRequestError, UnsupportedFeatureError

USER = {"role": "user", "content": "hi"}


def call(call_id="c1", name="f", arguments='{"x": 1}'):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def asking(*calls, **more):
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def result(call_id="c1", content="42"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def test_a_whole_tool_loop():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "今天"}, {"type": "input_text", "text": "?"}],
            "name": "Ann",
        },
        asking(call("c1"), call("c2", "g", ""), reasoning="I should ask."),
        result("c2"),
        result("c1"),
        {"role": "assistant", "content": "It is 42.", "reasoning_content": "So.", "refusal": None},
    ]
    before = copy.deepcopy(messages)
    normal = validate_messages(messages)
    assert messages == before
    assert normal == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "今天?", "name": "Ann"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I should ask.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c2"},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 42.", "reasoning_content": "So."},
    ]
    assert validate_messages(normal) == normal


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "empty"),
        (None, "messages", "null"),
        ("hi", "messages", "text"),
        ([USER] * (MAX_MESSAGES + 1), "messages", "10001 entries"),
        (["hi"], "messages[0]", "text"),
        ([USER, {"content": "hi"}], "messages[1].role", "None"),
        ([{"role": "wizard", "content": "hi"}], "messages[0].role", "'wizard'.*one of system"),
        ([{"role": ["user"], "content": "hi"}], "messages[0].role", "one of system"),
        ([{"role": "user"}], "messages[0].content", "needs text"),
        ([{"role": "user", "content": 5}], "messages[0].content", "a number"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]", "a number"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content[0].text", "null"),
        ([{"role": "assistant"}], "messages[0].content", "needs content, reasoning_content or tool_calls"),
        ([{"role": "assistant", "content": "a", "reasoning": 1}], "messages[0].reasoning", "a number"),
        ([{"role": "assistant", "reasoning_content": "a", "reasoning": 1}], "messages[0].reasoning", "a number"),
        ([{"role": "assistant", "tool_calls": "f"}], "messages[0].tool_calls", "text"),
        ([asking(*[call()] * 129)], "messages[0].tool_calls", "129 entries"),
        ([asking("f")], "messages[0].tool_calls[0]", "no function call"),
        ([asking({"id": "a", "function": {}})], "messages[0].tool_calls[0].function.name", "None"),
        ([asking(call(call_id=None))], "messages[0].tool_calls[0].id", "None"),
        ([asking(call(arguments=[1]))], "messages[0].tool_calls[0].function.arguments", "a list"),
        ([USER, result()], "messages[1].tool_call_id", "no earlier assistant message made that call"),
        ([asking(call("c1")), result("c2")], "messages[1].tool_call_id", "'c2'"),
        ([asking(call("c1")), result("c1"), result("c1")], "messages[2].tool_call_id", "answered already"),
        ([asking(call("c1")), result(None)], "messages[1].tool_call_id", "needs the id"),
        ([asking(call("c1")), {**result("c1"), "content": None}], "messages[1].content", "needs text"),
    ],
)
def test_wrong_messages(messages, param, words):
    with pytest.raises(InvalidRequestError, match=words) as raised:
        validate_messages(messages)
    assert raised.value.param == param
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("arguments", ['{"x": ', "[1]", "[" * 100_000, "7"])
def test_arguments_that_a_model_got_wrong_come_back_as_text(arguments):
    messages = [asking(call(arguments=arguments)), result("c1", "error: not JSON")]
    assert validate_messages(messages)[0]["tool_calls"][0]["function"]["arguments"] == arguments


def test_images_are_refused_by_name():
    picture = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}
    with pytest.raises(UnsupportedFeatureError, match=r"'image_url'.*reads text only") as raised:
        validate_messages([{"role": "user", "content": [{"type": "text", "text": "what is this?"}, picture]}])
    assert raised.value.param == "messages[0].content[1].type"


def tool(name="f", **function):
    return {"type": "function", "function": {"name": name, **function}}


WEATHER = tool(
    "get_weather",
    description="天气",
    strict=True,
    parameters={
        "type": "object",
        "properties": {
            "location": {"type": "string", "minLength": 1},
            "unit": {"type": ["string", "null"], "enum": ["c", "f", None]},
            "days": {"type": "array", "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"$ref": "#/$defs/day"}]}},
            "anything": True,
            "draft_7": {"type": "array", "items": [{"type": "string"}, {"type": "number"}]},
            "draft_4": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        },
        "$defs": {"day": {"const": "today"}},
        "required": ["location"],
        "additionalProperties": False,
        "x-vendor": object,
    },
)


def test_tools_that_are_right():
    counts = {"properties": {"x": {"type": "string", "minLength": 1.0}, "y": {"type": "number", "multipleOf": 0.5}}}
    tools = [WEATHER, tool("查天气"), tool("a.b-c_1", parameters={}), tool("counting", parameters=counts)]
    assert validate_tools(tools) == tools
    assert validate_tools(None) == []
    assert validate_tools([]) == []


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return {"properties": {"x": schema}}


@pytest.mark.parametrize(
    ("tools", "param", "words"),
    [
        ("f", "tools", "not a list"),
        ({"type": "function"}, "tools", "not a list"),
        ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], "tools", "129 entries"),
        (["f"], "tools[0]", "must be an object"),
        ([{"function": {"name": "f"}}], "tools[0].type", "'function'"),
        ([{"type": "web_search"}], "tools[0].type", "'web_search'"),
        ([{"type": "function"}], "tools[0].function", "must be an object"),
        ([{"type": "function", "function": {}}], "tools[0].function.name", "needs a name"),
        ([tool("")], "tools[0].function.name", "needs a name"),
        ([tool("two words")], "tools[0].function.name", "needs a name"),
        ([tool("x" * 65)], "tools[0].function.name", "1 to 64"),
        ([tool("f"), tool("f")], "tools[1].function.name", "an earlier tool has"),
        ([tool(description=5)], "tools[0].function.description", "must be text"),
        ([tool(strict="yes")], "tools[0].function.strict", "true or false"),
        ([tool(strict=1)], "tools[0].function.strict", "true or false"),
        ([tool(strict=0.0)], "tools[0].function.strict", "true or false"),
        ([tool(parameters="object")], "tools[0].function.parameters", "JSON Schema"),
        ([tool(parameters={"type": "string"})], "tools[0].function.parameters.type", "must be 'object'"),
        ([tool(parameters={"multipleOf": 0})], "tools[0].function.parameters.multipleOf", "above 0"),
        ([tool(parameters={"minLength": 1.5})], "tools[0].function.parameters.minLength", "whole number"),
        ([tool(parameters={"minLength": math.inf})], "tools[0].function.parameters.minLength", "whole number"),
        ([tool(parameters={"properties": []})], "tools[0].function.parameters.properties", "maps names"),
        ([tool(parameters={"properties": {"x": 5}})], "tools[0].function.parameters.properties.x", "JSON Schema"),
        (
            [tool(parameters={"properties": {"x": {"type": "text"}}})],
            "tools[0].function.parameters.properties.x.type",
            "one of string",
        ),
        (
            [tool(parameters={"properties": {"x": {"type": {"a": 1}}}})],
            "tools[0].function.parameters.properties.x.type",
            "one of string",
        ),
        (
            [tool(parameters={"properties": {"x": {"enum": []}}})],
            "tools[0].function.parameters.properties.x.enum",
            "least",
        ),
        ([tool(parameters={"required": "x"})], "tools[0].function.parameters.required", "a list"),
        ([tool(parameters={"required": [1]})], "tools[0].function.parameters.required", "names of properties"),
        ([tool(parameters={"anyOf": {}})], "tools[0].function.parameters.anyOf", "list of schemas"),
        ([tool(parameters={"minProperties": -1})], "tools[0].function.parameters.minProperties", "at least 0"),
        ([tool(parameters={"items": [5]})], "tools[0].function.parameters.items[0]", "JSON Schema"),
        ([tool(parameters={"exclusiveMinimum": "1"})], "tools[0].function.parameters.exclusiveMinimum", "a number"),
        ([tool(parameters={"minimum": True})], "tools[0].function.parameters.minimum", "a number"),
        ([tool(parameters={"minimum": "1"})], "tools[0].function.parameters.minimum", "a number"),
        ([tool(parameters={"title": 1})], "tools[0].function.parameters.title", "text"),
    ],
)
def test_wrong_tools(tools, param, words):
    with pytest.raises(InvalidRequestError, match=words) as raised:
        validate_tools(tools)
    assert raised.value.param == param
    assert len(str(raised.value)) < 400


def test_schema_limits():
    validate_tools([tool(parameters=nested(MAX_SCHEMA_DEPTH - 1))])
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_SCHEMA_DEPTH} schemas deep"):
        validate_tools([tool(parameters=nested(MAX_SCHEMA_DEPTH))])
    with pytest.raises(InvalidRequestError, match="deep"):
        validate_tools([tool(parameters=json.loads('{"items": ' * 900 + "{}" + "}" * 900))])
    wide = {"properties": {f"p{i}": {} for i in range(MAX_SCHEMA_NODES // 2)}}
    validate_tools([tool("f", parameters=wide)])
    with pytest.raises(InvalidRequestError, match=f"over {MAX_SCHEMA_NODES} parts together"):
        validate_tools([tool("f", parameters=wide), tool("g", parameters=wide)])
