"""Messages to a prompt, by the checkpoint's own chat template in a sandbox.

Knows Jinja and the conventions that templates written for transformers rely on. Knows nothing of tokens. A template
comes with a model, so it is treated as a stranger's program: it runs in a sandbox (`sandbox`), and its size is bounded.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from tern.chat.config_files import TextFiles, token_text
from tern.chat.messages import validate_messages
from tern.chat.parser import END_THINK, RESPONSE, ParserState, state_after_prompt
from tern.chat.sandbox import Refused, Sandbox, bounded
from tern.chat.tools import validate_tools
from tern.errors import CheckpointError, InvalidRequestError

MAX_TEMPLATE_LENGTH = 1_000_000

_FAILURES = (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError)
"""What a template's own mistakes raise; constants are computed when it is compiled."""

_GIVEN = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


class ChatTemplate:
    """One compiled template. Thread-safe."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile `source`; `special_tokens` gives `bos_token` and its like.

        Raises `CheckpointError` if it is no template.
        """
        if len(source) > MAX_TEMPLATE_LENGTH:
            raise CheckpointError(
                f"The chat template has {len(source)} characters: at most {MAX_TEMPLATE_LENGTH} are read."
            )
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree)) & _read_before_set(tree)
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise CheckpointError(f"The chat template cannot be compiled: {error}.") from None
        self._special_tokens = {"bos_token": "", "eos_token": "", **(special_tokens or {})}

    @classmethod
    def from_directory(cls, path: str | Path, given: Mapping[str, bytes] | None = None) -> ChatTemplate:
        """The template of a checkpoint: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`, else
        the built-in layout. Files `given` by name stand in the directory's place.
        """
        files = TextFiles(Path(path), given)
        config = files.read_object("tokenizer_config.json")
        tokens = {key: text for key, value in config.items() if key.endswith("_token") and (text := token_text(value))}
        if files.has("chat_template.jinja"):
            return cls(files.read_text("chat_template.jinja"), special_tokens=tokens)
        source = _named(config.get("chat_template"))
        return cls(default_template() if source is None else source, special_tokens=tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        ids_required: bool = True,
    ) -> str:
        """The prompt for a conversation; `ids_required` as in `validate_messages`.

        `template_kwargs` may name only variables that the template reads, and `enable_thinking`: False closes the
        thought before it begins, whether or not the template knows of it. Raises
        `InvalidRequestError` for messages, tools or variables that are wrong, and with the template's own words when
        it refuses them.
        """
        variables = {
            **self._special_tokens,
            **self._checked({} if template_kwargs is None else template_kwargs),
            "messages": validate_messages(messages, ids_required=ids_required),
            "tools": validate_tools(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = "".join(bounded(self._template.generate(variables)))
        except Refused as error:
            raise InvalidRequestError(f"The chat template refuses these messages: {error}", param="messages") from None
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise InvalidRequestError(
                f"The chat template cannot render these messages: {type(error).__name__}: {error}", param="messages"
            ) from None
        if variables.get("enable_thinking", True) or state_after_prompt(prompt) is not ParserState.REASONING:
            return prompt
        return prompt.rstrip("\n") + f"\n\n{END_THINK}\n\n" + ("" if tools else f"{RESPONSE}\n")

    def _checked(self, template_kwargs: Any) -> dict[str, Any]:
        if not isinstance(template_kwargs, Mapping):
            raise InvalidRequestError(
                f"chat_template_kwargs is {type(template_kwargs).__name__}: it must be an object of names and values.",
                param="chat_template_kwargs",
            )
        allowed = (self.variables | {"enable_thinking"}) - _GIVEN - _environment().globals.keys()
        for name, value in template_kwargs.items():
            if name not in allowed:
                raise InvalidRequestError(
                    f"chat_template_kwargs has {name!r}, which this model's template does not read: "
                    f"it takes {', '.join(sorted(allowed))}.",
                    param=f"chat_template_kwargs.{name}",
                )
            if not isinstance(value, bool | int | float | str | list | dict | None):
                raise InvalidRequestError(
                    f"chat_template_kwargs.{name} is {type(value).__name__}: it must be a JSON value.",
                    param=f"chat_template_kwargs.{name}",
                )
        thinking = template_kwargs.get("enable_thinking", True)
        if not isinstance(thinking, bool):
            raise InvalidRequestError(
                f"chat_template_kwargs.enable_thinking is {thinking!r}: it must be true or false.",
                param="chat_template_kwargs.enable_thinking",
            )
        return dict(template_kwargs)


@cache
def default_template() -> str:
    """The built-in layout, the one of the text protocol."""
    return (resources.files("tern.chat") / "default_template.jinja").read_text(encoding="utf-8")


def _read_before_set(tree: nodes.Template) -> set[str]:
    """The names that the template reads before it sets them, in the order in which it is written."""
    first: dict[str, str] = {}
    for name in _names(tree):
        first.setdefault(name.name, name.ctx)
    return {name for name, context in first.items() if context == "load"}


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign):
        children = [node.node, node.target]
    elif isinstance(node, nodes.For):
        children = [node.iter, node.target, *(child for child in children if child not in (node.iter, node.target))]
    for child in children:
        yield from _names(child)


class _Generation(Extension):
    """Lets `{% generation %}` through, with which training templates mark what the model writes."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block, as if the block were not there."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: object) -> None:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model reads it: other scripts as themselves, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_GLOBALS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


@cache
def _environment() -> Sandbox:
    return Sandbox(
        filters={"tojson": _to_json},
        functions=_GLOBALS,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
    )


def _named(template: object) -> str | None:
    """`chat_template` is text, or a list of named templates, of which "default" counts, else the first."""
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, Mapping)}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None
