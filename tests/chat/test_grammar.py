"""Grammars of answers: what passes and what does not, with every kind of tokenizer; faults named by their place."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammar_fakes import bits, read

from benchmarks.random_schemas import Schema, random_schema
from tern.chat import AnswerForm, AnswerRules, GrammarCompiler, ParserState, Tokenizer, parse_held_response
from tern.chat.grammar_matcher import AnswerGrammar, GrammarError
from tern.chat.grammar_vocabulary import GrammarVocabulary
from tern.errors import InvalidRequestError

THINK, REPLY, CALL = ParserState.REASONING, ParserState.RESPONSE, ParserState.CALL
OPEN = "Hm.\n</think>\n\n<response>\n"
CLOSE = "\n</response>\n"
SCHEMA: Schema = {
    "type": "object",
    "properties": {"城市": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["城市"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Schema | None = None, *, strict: bool | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


WEATHER = tool("get_weather", {"type": "object", "properties": {"unit": {"enum": ["c", "f"]}}, "required": ["unit"],
                               "additionalProperties": False}, strict=True)  # fmt: skip
SEARCH = tool("搜索", {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]})


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'


def compiler_for(tokenizer: Tokenizer) -> GrammarCompiler:
    ends = [i for name in ("</s>", "<|im_end|>") if (i := tokenizer.id_of(name)) is not None]
    return GrammarCompiler(tokenizer, ends)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return compiler_for(tokenizer)


@pytest.fixture(scope="module")
def one(byte_level: Tokenizer) -> GrammarCompiler:
    """A compiler for one kind of tokenizer, where the kind does not matter."""
    return compiler_for(byte_level)


def form(kind: Any, value: Any) -> AnswerForm:
    return AnswerForm(kind, value, "f")


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        (form("json", SCHEMA), '{"城市": "北京"}', '{"城市": 1'),
        (form("json", SCHEMA), '{"城市":"a < b </response>", "n":-12}', '{"n": 1'),
        (form("json", SCHEMA), '{\n  "城市": "x",\n  "n": 3\n}', '{"城市": "x",  "n": 3}'),
        (form("json", {"type": "integer"}), "42", "4x"),
        (form("regex", r"^\d{2}/[a-c\n]+$"), "12/ab\nc", "1a"),
        (form("regex", "(.|\n)*"), "a\n</response>\nb", None),
        (form("choice", ["ja", "jawohl", "</response>"]), "jawohl", "jaw!"),
        (form("choice", ["ja", "jawohl", "</response>"]), "</response>", "<r"),
        (form("grammar", 'start: sum\nsum: N ("+" N)*\nN: /[0-9]{1,3}/'), "1+22+333", "1+a"),
        (form("grammar", 'root ::= "a" [0-9] "z"?'), "a7z", "aa"),
    ],
    ids=str,
)
def test_a_form_lets_through_what_has_it(
    compiler: GrammarCompiler, tokenizer: Tokenizer, asked: AnswerForm, good: str, bad: str | None
) -> None:
    grammar = compiler.for_answer(AnswerRules(asked), "<think>\n", THINK)
    plain = compiler.for_text(asked)
    assert grammar is not None
    assert plain is not None
    assert read(grammar, tokenizer, OPEN + good + CLOSE)[:2] == (OPEN + good + CLOSE, True)
    assert read(plain, tokenizer, good)[:2] == (good, True)
    assert parse_held_response(OPEN + good + CLOSE).content == good
    if bad is not None:
        reached, may_end, _ = read(grammar, tokenizer, OPEN + bad + CLOSE)
        assert len(reached) < len(OPEN + bad)
        assert not may_end


def test_an_answer_of_a_form_ends_by_itself(one: GrammarCompiler, byte_level: Tokenizer) -> None:
    grammar = one.for_answer(AnswerRules(form("json", SCHEMA)), "", THINK)
    assert grammar is not None
    assert read(grammar, byte_level, OPEN + '{"城市": "x"}' + CLOSE) == (OPEN + '{"城市": "x"}' + CLOSE, True, True)


CALLS = call("get_weather", '{"unit": "c"}')
ANY = call("搜索", '{"x": [1, {"y": "</tool_call>"}]}')
ASKED = call("搜索", '{"q": "</response>"}')


@pytest.mark.parametrize(
    ("rules", "good", "bad"),
    [
        (AnswerRules(tools=[WEATHER, SEARCH]), [CALLS, ANY, f"{CALLS}\n{ANY}", "<response>\nA<b\n</response>\n",
            f"<response>\nA\n</response>\n\n{CALLS}", f"{ANY}\n<response>\n</response>\n"],
            [call("get_weather", '{"unit": "k"}'), call("other", "{}"), "bare", "<response>\n<tool_call>x",
             f"{CALLS}{CALLS}"]),
        (AnswerRules(tools=[WEATHER], one_call=True), [CALLS, f"<response>\nx\n</response>\n\n{CALLS}"],
            [f"{CALLS}\n{CALLS}"]),
        (AnswerRules(tools=[WEATHER, SEARCH], choice="required"), [CALLS, ASKED, f"{CALLS}\n{ASKED}"],
            [ANY, "<response>\nx\n</response>\n"]),
        (AnswerRules(tools=[WEATHER, SEARCH], choice="required", one_call=True), [ASKED], [f"{CALLS}\n{ASKED}"]),
        (AnswerRules(tools=[WEATHER, SEARCH], choice=("named", "搜索")), [ASKED], [CALLS, f"{ASKED}\n{ASKED}"]),
        (AnswerRules(form("json", SCHEMA), [SEARCH]), ['<response>\n{"城市": "x"}\n</response>\n', f"{ANY}\n{ANY}"],
            ["<response>\nfree\n</response>\n", f'<response>\n{{"城市": "x"}}\n</response>\n\n{ANY}']),
    ],
)  # fmt: skip
def test_calls(
    compiler: GrammarCompiler, tokenizer: Tokenizer, rules: AnswerRules, good: list[str], bad: list[str]
) -> None:
    grammar = compiler.for_answer(rules, "", THINK)
    assert grammar is not None
    head = "I <b>think</b>, </thin king.\n</think>\n\n"
    for text in good:
        assert read(grammar, tokenizer, head + text)[:2] == (head + text, True), text
    for text in bad:
        assert read(grammar, tokenizer, head + text)[0] != head + text, text


@pytest.mark.parametrize(
    ("prompt", "state", "text"),
    [
        ("…</think>\n\n", ParserState.BETWEEN, CALLS),
        ("…</think>", ParserState.BETWEEN, f"\n\n{CALLS}"),
        ("…</think>\n", ParserState.BETWEEN, f"\n{CALLS}"),
        ("…<response>\n", REPLY, CALLS),
        ("…<tool_call>\n", CALL, CALLS.removeprefix("<tool_call>\n")),
    ],
)
def test_a_grammar_begins_where_the_prompt_ends(
    one: GrammarCompiler, byte_level: Tokenizer, prompt: str, state: ParserState, text: str
) -> None:
    grammar = one.for_answer(AnswerRules(tools=[WEATHER], choice="required"), prompt, state)
    assert grammar is not None
    assert read(grammar, byte_level, text)[:2] == (text, True)


def test_a_response_that_the_prompt_opened_is_held_too(one: GrammarCompiler, byte_level: Tokenizer) -> None:
    grammar = one.for_answer(AnswerRules(form("choice", ["\nx</response>", "b"])), "<response>\n", REPLY)
    assert grammar is not None
    text = "\nx</response>\n</response>\n"
    assert read(grammar, byte_level, text)[0] == text
    assert parse_held_response(text, start=REPLY).content == "\nx</response>"
    with pytest.raises(InvalidRequestError, match="opens a tool call"):
        one.for_answer(AnswerRules(form("json", SCHEMA)), "<tool_call>\n", CALL)


def test_nothing_binds_without_a_rule(one: GrammarCompiler) -> None:
    assert one.for_answer(AnswerRules(tools=[SEARCH]), "", THINK) is None
    assert one.for_answer(AnswerRules(one_call=True), "", THINK) is None
    assert one.for_text(None) is None


class TestThought:
    """The thought is free, but for what would end the answer in it or mix it with the grammar's text."""

    @pytest.fixture
    def vocabulary(self, tokenizer: Tokenizer) -> GrammarVocabulary:
        return compiler_for(tokenizer)._vocabulary

    def test_masks_against_the_definition(self, vocabulary: GrammarVocabulary) -> None:
        tag = b"</think>"
        for matched, mask in enumerate(vocabulary.thought_masks):
            allowed = bits(mask)
            for token_id in range(vocabulary.size):
                if token_id in vocabulary.special_ids:
                    assert (token_id in allowed) == (matched == 0 and token_id not in vocabulary.end_ids)
                    continue
                text = tag[:matched] + vocabulary.bytes[token_id]
                _, found, rest = text.partition(tag)
                assert (token_id in allowed) == (not found or not rest.strip(b"\n"))

    def test_tags_are_found_across_any_border(self, vocabulary: GrammarVocabulary) -> None:
        single = {text: token_id for token_id, text in enumerate(vocabulary.bytes) if len(text) == 1}
        for thought in (b"<</think>", b"</thin</think>", b"</think </think>", b"a<b></think>"):
            matched, found = 0, []
            for byte in thought:
                matched, follows = vocabulary.read_thought(matched, single[bytes([byte])])
                found.append(follows)
            assert found == [None] * (len(thought) - 1) + [b""]

    def test_no_end_inside_it(self, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
        grammar = compiler.for_answer(AnswerRules(form("json", SCHEMA)), "", THINK)
        assert grammar is not None
        assert read(grammar, tokenizer, "I think <response> {\n") == ("I think <response> {\n", False, False)
        state = grammar.start()
        with pytest.raises(GrammarError, match="may not come"):
            state.accept(min(compiler._end_ids))


def test_looking_ahead_changes_nothing(byte_level: Tokenizer, one: GrammarCompiler) -> None:
    grammar = one.for_answer(AnswerRules(form("json", SCHEMA)), "", THINK)
    assert grammar is not None
    text = byte_level.encode_continuation(OPEN + '{"城市": "x", "n": 1}' + CLOSE)
    rng = random.Random(3)
    seen, plain = grammar.start(), grammar.start()

    def row(state: AnswerGrammar, ahead: list[int]) -> list[int] | None:
        mask = np.zeros(one._vocabulary.num_words, np.uint32)
        return mask.tolist() if state.fill(mask, ahead) else None

    expected = []
    for token_id in text:
        expected.append(row(plain, []))
        plain.accept(token_id)
    expected.append(row(plain, []))
    for place, token_id in enumerate(text):
        for _ in range(6):
            length = rng.randint(0, min(9, len(text) - place))
            ahead = text[place : place + length]
            assert row(seen, ahead) == expected[place + length]
            if length and rng.random() < 0.5:
                wrong = [*ahead[:-1], byte_level.id_of("<s>") or 0]
                assert row(seen, wrong) is None or place + length <= text.index(byte_level.id_of("</think>"))
        assert not seen.ended
        seen.accept(token_id)
    assert seen.ended
    assert plain.ended
    assert row(seen, [4]) == expected[-1]  # the end token ahead


@pytest.mark.parametrize(
    ("schema", "place", "why"),
    [
        ({"type": "array", "uniqueItems": True}, "f.uniqueItems", "cannot be held"),
        ({"properties": {"a": {"items": {"not": {}}}}}, "f.properties.a.items.not", "cannot be held"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "f.properties.a", "look-around"),
        ({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(a"}]}, "f.anyOf[1]", "unclosed group"),
        ({"$ref": "#/$defs/no"}, "f.$ref", "not there"),
        ({"$ref": "https://example.com/s.json"}, "f.$ref", "only references into the schema"),
        ({"$ref": "#"}, "f.$ref", "leads back to itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
         "f.$defs.b.allOf[0].$ref", "leads back to itself"),
        ({"properties": {"a": {"minProperties": 2, "type": "object"}}}, "f.properties.a.minProperties", "required"),
        ({"enum": [["a\x01"]]}, "f.enum", "U\\+0001"),
        ({"type": "array", "minItems": 10**9, "items": {}}, "f.minItems", "65536"),
        ({"type": "string", "format": "colour"}, "f", "Unknown format"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]}, "f", "oneOf"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "f", "minimum \\(5\\)"),
        ({"description": "x" * 300_000}, "f", "262144"),
        ({"anyOf": [{"properties": {f"p{j}": {"type": "integer"} for j in range(i, i + 20)}, "type": "object"}
                    for i in range(300)]}, "f", "too many items|Too many items"),
    ],
)  # fmt: skip
def test_what_a_grammar_cannot_hold_is_refused_by_its_place(
    one: GrammarCompiler, schema: Schema, place: str, why: str
) -> None:
    for _ in range(2):  # a fault is remembered, too
        with pytest.raises(InvalidRequestError, match=why) as refused:
            one.for_text(form("json", schema))
        assert refused.value.param == place
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "asked",
    [
        form("regex", "(a"), form("regex", "(?<=a)b"), form("regex", ""), form("regex", "a" * 70_000),
        form("choice", []), form("grammar", "start: nothing"), form("grammar", "root ::= ((("), form("grammar", ""),
        form("grammar", "start: <|im_end|>"), form("json", {"type": "thing"}), form("json", False), form("json", [1]),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_forms_are_refused(one: GrammarCompiler, asked: AnswerForm) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        one.for_text(asked)
    assert (refused.value.param or "").startswith("f")
    assert len(str(refused.value)) < 500


def test_schemas_of_tools_count_only_where_they_bind(one: GrammarCompiler) -> None:
    odd = tool("odd", {"type": "object", "properties": {"a": {"not": {}}}})
    assert one.for_answer(AnswerRules(tools=[WEATHER, odd]), "", THINK) is not None
    with pytest.raises(InvalidRequestError) as refused:
        one.for_answer(AnswerRules(tools=[WEATHER, odd], choice="required"), "", THINK)
    assert refused.value.param == "tools[1].function.parameters.properties.a.not"


def test_a_disguised_key_is_no_way_around_its_schema(one: GrammarCompiler, byte_level: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    grammar = one.for_text(form("json", schema))
    assert grammar is not None
    assert read(grammar, byte_level, '{"b": 1, "\\u0061": 1}')[0] == '{"b": 1, "\\'


def test_grammars_are_kept_and_shared(byte_level: Tokenizer) -> None:
    compiler = compiler_for(byte_level)
    wanted = form("choice", ["a", "b"])
    threads = [threading.Thread(target=compiler.for_text, args=(wanted,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.num_compiled == 1
    for number in range(64):
        compiler.for_text(form("choice", [str(number)]))
    assert compiler.num_compiled == 65
    compiler.for_text(form("choice", ["0"]))
    assert compiler.num_compiled == 65
    compiler.for_text(wanted)  # was the longest unused
    assert compiler.num_compiled == 66
    assert compiler.compile_seconds > 0


def test_a_grammar_that_takes_too_long_is_refused(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(byte_level, [4], seconds=0.01)
    free = threading.Event()
    monkeypatch.setattr(compiler, "_compile", lambda _: free.wait(30))
    with pytest.raises(InvalidRequestError, match=r"more than 0\.01 seconds"):
        compiler.for_text(form("choice", ["a"]))
    free.set()


def test_bombs_end_within_their_fuel(one: GrammarCompiler) -> None:
    bombs = ["(a{1,1000}){1,1000}", "(.*a){50}", "|".join(f"(x.{{{i}}}y)" for i in range(1, 200)), "(((a*)*)*)*b"]
    for pattern in bombs:
        try:
            grammar = one.for_text(form("regex", pattern))
        except InvalidRequestError:
            continue
        assert grammar is not None
        grammar.start().fill(np.zeros(one._vocabulary.num_words, np.uint32), ())


def test_random_walks_through_random_schemas_are_valid(one: GrammarCompiler, byte_level: Tokenizer) -> None:
    rng = random.Random(11)
    finished = 0
    for _ in range(40):
        schema = random_schema(rng)
        grammar = one.for_answer(AnswerRules(form("json", schema)), "<response>\n", REPLY)
        assert grammar is not None
        state, text = grammar.start(), b""
        for _ in range(600):
            if state.ended:
                break
            mask = np.zeros(one._vocabulary.num_words, np.uint32)
            assert state.fill(mask, ())
            token_id = rng.choice(sorted(bits(mask)))
            state.accept(token_id)
            text += byte_level.token_bytes(token_id)
        if state.ended:
            finished += 1
            content = parse_held_response(text.decode(), start=REPLY).content
            jsonschema.validate(json.loads(content or ""), schema)
    assert finished >= 38


def test_the_tokenizer_of_any_kind_is_read_once(directory: Path) -> None:
    vocabulary = compiler_for(Tokenizer.from_directory(directory))._vocabulary
    assert len(vocabulary.bytes) == vocabulary.size == vocabulary.library.vocab_size
    assert bits(vocabulary.end_mask) == vocabulary.end_ids
