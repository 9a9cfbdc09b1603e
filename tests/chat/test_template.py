"""Chat templates: the built-in layout byte for byte, transformers' conventions, and the sandbox's limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import tern
from tern.chat import ChatTemplate, sandbox
from tern.chat.template import default_template
from tern.errors import CheckpointError, InvalidRequestError

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "天气 <b> & 'more'", "parameters": {}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "今天北京天气?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I should ask.",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"location":"北京"}'}},
            {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "晴"},
    {"role": "tool", "tool_call_id": "2", "content": '{"t": 3}'},
    {"role": "assistant", "content": "Sunny.", "reasoning": "So it is sunny."},
    {"role": "user", "content": "Thanks"},
]
GOLDEN = """<|im_start|>system
<system_setting>
Be brief.

</system_setting>

<global_setting>
think_mode=True
</global_setting>

<tool_list>
[{"type": "function", "function": {"name": "get_weather", "description": "天气 <b> & 'more'", "parameters": {}}}]
</tool_list><|im_end|>

<|im_start|>user
今天北京天气?<|im_end|>

<|im_start|>assistant
<think>
I should ask.
</think>

<tool_call>
{"name": "get_weather", "arguments": {"location": "北京"}}
</tool_call>

<tool_call>
{"name": "get_weather", "arguments": {}}
</tool_call>
<|im_end|>

<|im_start|>user
<tool_response>
晴
</tool_response><|im_end|>

<|im_start|>user
<tool_response>
{"t": 3}
</tool_response><|im_end|>

<|im_start|>assistant
<think>
So it is sunny.
</think>
<response>
Sunny.
</response>
<|im_end|>

<|im_start|>user
Thanks<|im_end|>

<|im_start|>assistant
<think>
"""
SHORT = """<|im_start|>system
<global_setting>
think_mode=True
</global_setting><|im_end|>

<|im_start|>user
hi<|im_end|>

"""
USER = [{"role": "user", "content": "hi"}]
EMBEDDED = Path(tern.__file__).parent / "embedded" / "tiny" / "chat_template.jinja"


@pytest.fixture(params=["built-in", "embedded"])
def layout(request) -> ChatTemplate:
    """The protocol's layout: built in, and as the embedded model's checkpoint brings it."""
    return ChatTemplate(default_template() if request.param == "built-in" else EMBEDDED.read_text(encoding="utf-8"))


def test_golden_conversation(layout):
    assert layout.render(CONVERSATION, tools=[TOOL]) == GOLDEN


def test_golden_shortest(layout):
    assert layout.render(USER, add_generation_prompt=False) == SHORT
    assert layout.render(USER) == SHORT + "<|im_start|>assistant\n<think>\n"


def test_a_system_message_in_the_middle(layout):
    text = layout.render([*USER, {"role": "developer", "content": "Now be kind."}, *USER], add_generation_prompt=False)
    turn = "<|im_start|>system\n<system_setting>\nNow be kind.\n</system_setting><|im_end|>\n\n"
    assert text == SHORT + turn + "<|im_start|>user\nhi<|im_end|>\n\n"


def test_a_turn_without_reasoning_or_text(layout):
    text = layout.render([*USER, {"role": "assistant", "content": ""}], add_generation_prompt=False)
    assert text == SHORT + "<|im_start|>assistant\n<think>\n\n</think>\n<response>\n\n</response>\n<|im_end|>\n\n"


CONVENTIONS = """
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
{% endfor %}
{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ {'é': '<&>'} | tojson }}
{{ bos_token }}|{{ flag is defined }}|{{ namespace(a=1).a }}
{%- if add_generation_prompt %}
go
{% endif %}
"""


def test_conventions_of_transformers():
    ours = ChatTemplate(CONVENTIONS, special_tokens={"bos_token": "<s>"})
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " 你好 "}]
    theirs, _ = render_jinja_template([messages], tools=[TOOL], chat_template=CONVENTIONS, bos_token="<s>",
                                      add_generation_prompt=True)  # fmt: skip
    assert ours.render(messages, tools=[TOOL]) == theirs[0]
    assert "你好" in theirs[0]


def test_strftime_now_and_raise_exception():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER).isdigit()
    with pytest.raises(InvalidRequestError, match="refuses these messages: no roles of type user here"):
        ChatTemplate("{{ raise_exception('no roles of type ' ~ messages[0].role ~ ' here') }}").render(USER)


def test_what_a_template_sets_itself_is_no_switch():
    source = (
        "{% macro say(word) %}{{ word }}{% endmacro %}{% if not mood is defined %}{% set mood = 'so ' %}{% endif %}"
        "{% for message in messages %}{% set part = message.content %}{{ say(mood) ~ part }}{% endfor %}"
    )
    template = ChatTemplate(source)
    assert template.render(USER) == "so hi"
    assert template.render(USER, template_kwargs={"mood": "oh "}) == "oh hi"
    for name in ("part", "message", "word", "say"):
        with pytest.raises(InvalidRequestError, match="it takes enable_thinking, mood"):
            template.render(USER, template_kwargs={name: "x"})


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m(n) %}{% if n %}{% set a = m(n - 1) ~ m(n - 1) %}{% endif %}{% endmacro %}{% set z = m(40) %}",
        "{{ 'a'.ljust(10 ** 11) | length }}",
        "{{ '%100000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 11, 1) }}",
    ],
)
def test_macros_and_formats_are_bounded_too(source, monkeypatch):
    monkeypatch.setattr("tern.chat.sandbox.MAX_SECONDS", 0.2)
    with pytest.raises(InvalidRequestError, match="The chat template"):
        ChatTemplate(source).render(USER)


def test_thinking_off_closes_the_thought_whatever_the_template_knows():
    opens = ChatTemplate("{{ messages[0].content }}<think>\n")
    off = {"enable_thinking": False}
    assert opens.render(USER, template_kwargs=off) == "hi<think>\n\n</think>\n\n<response>\n"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert opens.render(USER, tools=tools, template_kwargs=off) == "hi<think>\n\n</think>\n\n"
    with pytest.raises(InvalidRequestError, match="enable_thinking is 1: it must be true or false"):
        opens.render(USER, template_kwargs={"enable_thinking": 1})


def test_template_kwargs_are_those_the_template_reads():
    reads = ChatTemplate("{{ mood }}{{ messages[0].content }}{% if enable_thinking %}!{% endif %}")
    assert reads.render(USER, template_kwargs={"mood": "so ", "enable_thinking": True}) == "so hi!"
    for name in ("moood", "messages", "range", "bos_token", "strftime_now"):
        with pytest.raises(InvalidRequestError, match="it takes enable_thinking, mood") as raised:
            reads.render(USER, template_kwargs={name: 1})
        assert raised.value.param == f"chat_template_kwargs.{name}"
    with pytest.raises(InvalidRequestError, match="must be a JSON value"):
        reads.render(USER, template_kwargs={"mood": object()})
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs is int: it must be an object"):
        reads.render(USER, template_kwargs=5)
    assert ChatTemplate("x").render(USER, template_kwargs={"enable_thinking": False}) == "x"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
        "{{ messages[0].content + 1 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_the_sandbox(source):
    with pytest.raises(InvalidRequestError, match="cannot render these messages"):
        ChatTemplate(source).render(USER)


def test_a_template_that_writes_too_much(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_PROMPT_LENGTH", 1000)
    source = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="more than 1000 characters"):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * messages[0].content }}",
        "{% set x = messages * 10**9 %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% if (2**20) ** (2**20) %}{% endif %}",
    ],
)
def test_operators_make_nothing_huge(source):
    with pytest.raises(InvalidRequestError, match=r"refuses these messages: it (repeats|computes)"):
        ChatTemplate(source).render(USER)


def test_operators_work():
    assert ChatTemplate("{{ 6 * 7 }} {{ 'ab' * 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1.5 ** 2 }}").render(USER) == (
        "42 abab 1024 0.5 2.25"
    )


@pytest.mark.parametrize("body", ["", "x"])
def test_a_template_that_does_not_end(monkeypatch, body):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    loops = "{% for a in range(99999) %}{% for b in messages * 99999 %}" + body + "{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequestError, match=r"longer than 0\.05 seconds"):
        ChatTemplate(loops).render(USER)


def test_what_is_no_template():
    with pytest.raises(CheckpointError, match="cannot be compiled"):
        ChatTemplate("{% if %}")
    with pytest.raises(CheckpointError, match="cannot be compiled"):
        ChatTemplate("{{ " + "9" * 5000 + " }}")
    with pytest.raises(CheckpointError, match="1000001 characters"):
        ChatTemplate("x" * 1_000_001)


def test_where_a_template_comes_from(tmp_path):
    assert ChatTemplate.from_directory(tmp_path).render(USER, add_generation_prompt=False) == SHORT

    def configure(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return ChatTemplate.from_directory(tmp_path).render(USER)

    assert configure(chat_template="{{ eos_token }}", eos_token={"content": "</s>"}) == "</s>"
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    assert configure(chat_template=named) == "plain"
    assert configure(chat_template=named[:1]) == "rag"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}", encoding="utf-8")
    assert configure(chat_template="config", bos_token="<s>") == "file <s>"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ChatTemplate.from_directory(tmp_path)


def test_wrong_messages_and_tools_are_refused_before_rendering(layout):
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        layout.render([])
    with pytest.raises(InvalidRequestError, match="needs a name"):
        layout.render(USER, tools=[{"type": "function", "function": {}}])
