"""What must hold of an answer, and the grammar that says so in llguidance's dialect of Lark.

Knows the canonical form of an answer behind its thought (docs/structured-output.md) and the states in which a prompt
may leave off. Compiles nothing.

    form           \\n\\n<response>\\n CONTENT \\n</response>\\n
    calls          \\n\\n<tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>\\n ( \\n<tool_call>... )*
    form or calls  with a form and tools under auto
    free           with strict tools under auto: any response, calls, or both
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tern.chat.grammar_schema import Schema, as_rule, check_for_grammar, object_schema
from tern.chat.parser import END_RESPONSE, END_TOOL_CALL, RESPONSE, TOOL_CALL, ParserState
from tern.errors import InvalidRequestError

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES_BYTES = 256 * 1024

FormKind = Literal["json", "regex", "choice", "grammar"]


class StructuredOutputs(Protocol):
    """vLLM's `StructuredOutputsParams`: one of these is given."""

    @property
    def json(self) -> Mapping[str, Any] | str | None: ...

    @property
    def regex(self) -> str | None: ...

    @property
    def choice(self) -> Sequence[str] | None: ...

    @property
    def grammar(self) -> str | None: ...

    @property
    def json_object(self) -> bool | None: ...


@dataclass(frozen=True)
class AnswerForm:
    """The form of an answer's text: a JSON Schema, a regular expression, one of some texts, or a Lark (or GBNF)
    grammar. `place` is the field that said so.
    """

    kind: FormKind
    value: Any
    place: str

    @classmethod
    def of(cls, given: StructuredOutputs | None, place: str = "structured_outputs") -> AnswerForm | None:
        """What vLLM's parameters ask for. Raises `InvalidRequestError` for JSON text that is none."""
        if given is None:
            return None
        if given.json is not None:
            schema = _parsed(given.json, f"{place}.json") if isinstance(given.json, str) else given.json
            return cls("json", schema, f"{place}.json")
        if given.regex is not None:
            return cls("regex", given.regex, f"{place}.regex")
        if given.choice is not None:
            return cls("choice", list(given.choice), f"{place}.choice")
        if given.grammar is not None:
            return cls("grammar", given.grammar, f"{place}.grammar")
        return cls("json", {"type": "object"}, f"{place}.json_object")


@dataclass(frozen=True)
class AnswerRules:
    """What must hold of a chat's answer.

    `form` is that of its content, None for free text. `tools` are those that the model may call, and `choice` says
    whether it must: "auto", "required", or ("named", NAME). `one_call`: at most one.
    """

    form: AnswerForm | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    choice: Literal["auto", "required"] | tuple[Literal["named"], str] = "auto"
    one_call: bool = False

    @property
    def must_call(self) -> bool:
        """The answer is calls and nothing else."""
        return self.choice != "auto"

    @property
    def binds(self) -> bool:
        """Whether anything has to be held at all."""
        return self.form is not None or self.must_call or any(_strict(tool) for tool in self.tools)

    @property
    def only_content(self) -> bool:
        """Whether the answer can only be a `<response>`."""
        return self.form is not None and not self.tools


@dataclass(frozen=True)
class SchemaPart:
    """A schema that went into a grammar, and the field that it came from: where to look if the grammar fails."""

    schema: Schema
    place: str


@dataclass(frozen=True)
class GrammarText:
    """A grammar as llguidance reads it, the schemas in it, and the field to blame if none of them is at fault."""

    text: str
    parts: Sequence[SchemaPart]
    place: str


def text_grammar(form: AnswerForm) -> GrammarText:
    """The grammar of a plain completion: the form from the first token to the end."""
    writer = _Writer()
    return writer.finish(writer.content(form, ""), form.place)


def answer_grammar(rules: AnswerRules, state: ParserState, newlines: int = 0) -> GrammarText:
    """The grammar of a chat's answer behind its thought.

    `state` and the number of `newlines` are how the prompt ends. Raises `InvalidRequestError` for rules that no grammar
    can hold.
    """
    place = rules.form.place if rules.form is not None else "tool_choice" if rules.must_call else "tools"
    writer = _Writer()
    inside = state is ParserState.RESPONSE
    parts = []
    if not rules.must_call:
        opening = "" if inside else RESPONSE + "\n"
        parts.append(writer.free(opening) if rules.form is None else writer.content(rules.form, opening, closed=True))
    calls = writer.calls(rules)
    if state is ParserState.CALL:
        if not calls:
            raise InvalidRequestError(
                f"{place} is given, but the template opens a tool call: leave it out.", param=place
            )
        return writer.finish(f"first {writer.more(rules)}", place)
    if calls and not (inside and rules.form is not None):
        parts.append(calls)
        if parts[0] != calls and rules.form is None:
            parts += [rf'{parts[0]} "\n" {calls}', rf'{calls} "\n" {parts[0]}']
    lead = "\n" * max(0, 2 - newlines) if state is not ParserState.RESPONSE else ""
    start = f"({' | '.join(parts)})"
    return writer.finish(f"{_quoted(lead)} {start}" if lead else start, place)


class _Writer:
    """Gathers the rules of one grammar."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._parts: list[SchemaPart] = []
        self._nested: list[dict[str, str]] = []

    def finish(self, start: str, place: str) -> GrammarText:
        """The whole grammar."""
        lark = "\n".join([f"start: {start}", *self._rules])
        grammars = [{"lark_grammar": lark}, *self._nested]
        return GrammarText(json.dumps({"grammars": grammars}, ensure_ascii=False), self._parts, place)

    def content(self, form: AnswerForm, opening: str, *, closed: bool = False) -> str:
        """A symbol for text of this form behind `opening`; `closed` adds the end of a response.

        What is a regular expression becomes one terminal with the closing tag: a terminal takes all that it can, so
        one that may hold a newline would swallow the tag's and never end.
        """
        closing = f"\n{END_RESPONSE}\n" if closed else ""
        if form.kind in ("json", "grammar"):
            inner = self._json(form.value, form.place) if form.kind == "json" else self._lark(form)
            self._rules.append(f"content: {_joined(opening, inner, closing)}")
        else:
            self._rules.append(f"FORM: {_regex(form) if form.kind == 'regex' else _choice(form)}")
            self._rules.append(f"CONTENT: {_joined(opening, 'FORM', closing)}")
            self._rules.append("content: CONTENT")
        return "content"

    def free(self, opening: str) -> str:
        """A symbol for a response of any text that the response parser reads as one."""
        self._rules.append(rf"FREE: /(?s:.*)<\/response>/ & ~/\n*{TOOL_CALL}(?s:.*)/")
        self._rules.append("free_text[lazy]: FREE")
        self._rules.append("free: " + _joined(opening, "free_text", "\n"))
        return "free"

    def calls(self, rules: AnswerRules) -> str:
        """A symbol for the calls that may be made, "" if none may. `first` is what stands inside the first one."""
        if not rules.tools:
            return ""
        allowed = [
            (index, tool)
            for index, tool in enumerate(rules.tools)
            if not isinstance(rules.choice, tuple) or tool["function"]["name"] == rules.choice[1]
        ]
        names = [self._call(index, tool["function"], held=rules.must_call) for index, tool in allowed]
        self._rules.append(f"first: ({' | '.join(names)}) {_quoted(f'{chr(10)}{END_TOOL_CALL}{chr(10)}')}")
        self._rules.append(f"call: {_quoted(f'{TOOL_CALL}{chr(10)}')} first")
        self._rules.append(f"calls: call {self.more(rules)}")
        return "calls"

    def more(self, rules: AnswerRules) -> str:
        """What may follow the first call."""
        return "" if rules.one_call or isinstance(rules.choice, tuple) else r'("\n" call)*'

    def _call(self, index: int, function: Mapping[str, Any], *, held: bool) -> str:
        """The JSON of a call; its arguments are held to the tool's schema where that is strict or calling is a duty."""
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        schema = object_schema(function.get("parameters") if held or function.get("strict") else None)
        arguments = self._json(schema, f"tools[{index}].function.parameters", f"arguments_{index}")
        self._rules.append(f"call_{index}: {_joined(head, arguments, '}')}")
        return f"call_{index}"

    def _json(self, schema: object, place: str, name: str = "json_value") -> str:
        checked = check_for_grammar(schema, place)
        self._parts.append(SchemaPart(checked, place))
        self._rules.append(f"{name}: {as_rule(checked)}")
        return name

    def _lark(self, form: AnswerForm) -> str:
        from llguidance.gbnf_to_lark import any_to_lark

        _check_size(form.value, form.place, MAX_GRAMMAR_BYTES)
        try:
            self._nested.append({"name": "given", "lark_grammar": any_to_lark(form.value)})
        except Exception as error:  # the converter raises what it likes
            raise InvalidRequestError(
                f"{form.place} is no grammar in Lark or GBNF ({error!s:.200}): change it.", param=form.place
            ) from None
        return "@given"


def _strict(tool: Mapping[str, Any]) -> bool:
    return bool(tool["function"].get("strict"))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _joined(opening: str, symbol: str, closing: str) -> str:
    return " ".join([*([_quoted(opening)] if opening else []), symbol, *([_quoted(closing)] if closing else [])])


def _regex(form: AnswerForm) -> str:
    from llguidance import regex_to_lark

    pattern: str = form.value
    _check_size(pattern, form.place, MAX_GRAMMAR_BYTES)
    written = regex_to_lark(pattern).replace("\n", "\\n").replace("\r", "\\r")
    return f"/(?:{written})/"


def _choice(form: AnswerForm) -> str:
    choices: list[str] = form.value
    if not choices:
        raise InvalidRequestError(f"{form.place} is an empty list: give at least one text.", param=form.place)
    _check_size("".join(choices), form.place, MAX_CHOICES_BYTES)
    return " | ".join(_quoted(each) for each in dict.fromkeys(choices))


def _check_size(text: str, place: str, limit: int) -> None:
    size = len(text.encode())
    if size > limit or not text:
        way_out = f"a grammar is made of at most {limit}" if text else "give at least one"
        raise InvalidRequestError(f"{place} has {size} bytes: {way_out}.", param=place)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{place} is {text!r:.60}: it must be a JSON Schema.", param=place) from None
