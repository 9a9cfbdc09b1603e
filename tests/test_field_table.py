"""Every field of every request stands in a table of docs/api.md beside tests that exist, and can be taken away.

That the tests fail then is for `python -m tests.field_drops`, which takes longer.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from tern.errors import InvalidRequestError
from tern.server.schemas import fields
from tern.server.schemas.fields import IGNORED, NEUTRAL, Schema
from tests.field_drops import change, complaints
from tests.field_table import ANY, DOCUMENT, FAMILIES, TESTS, Field, Row, fields_of, places_of_tests, rows

USER = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {"chat": {"messages": USER}, "message": {"messages": USER, "max_tokens": 30}}


def field_of(name: str) -> Field:
    family, _, rest = name.partition(".")
    return next(field for row in rows() for field in row.fields if (field.family, field.name) == (family, rest))


@pytest.mark.parametrize(("family", "schema"), FAMILIES.values(), ids=str)
def test_every_field_stands_in_its_table(family: str, schema: type[Schema]) -> None:
    stand = [field.name for row in rows() for field in row.fields if field.family == family]
    assert len(stand) == len(set(stand))
    assert set(fields_of(schema)) - set(stand) == set()
    assert set(stand) - {*fields_of(schema), *IGNORED, *NEUTRAL} == set()


def test_every_row_names_tests() -> None:
    assert len(list(rows())) > 80
    assert [row for row in rows() if not row.fields or not row.tests] == []


def test_every_test_that_the_document_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert len(named) > 100
    assert named - places_of_tests().keys() == set()


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("chat.temperature", 0.5, None),
        ("chat.n", 3, 1),
        ("chat.messages", [*USER, *USER], [{"role": "user", "content": "x"}]),
        ("message.max_tokens", 5, 1000),
    ],
)
def test_a_field_is_taken_away(monkeypatch: pytest.MonkeyPatch, name: str, value: Any, default: Any) -> None:
    field = field_of(name)
    body = {**BODIES[field.family], field.name: value}
    assert getattr(fields.read_fields(field.schema, body), field.name) == value
    change(field, monkeypatch, refused=False)
    assert getattr(fields.read_fields(field.schema, body), field.name) == default
    with pytest.raises(InvalidRequestError):
        fields.read_fields(field.schema, {**body, field.name: {"no": "value"}})


def test_a_field_inside_another_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    thinking = {"type": "enabled", "budget_tokens": 20, "display": "omitted"}
    for name, left in (("display", {**thinking, "display": None}), ("type", None)):
        with monkeypatch.context() as patch:
            field = field_of(f"message.thinking.{name}")
            change(field, patch, refused=False)
            found: Any = fields.read_fields(field.schema, {**BODIES["message"], "thinking": thinking})
            assert (found.thinking and found.thinking.model_dump()) == left


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("any.user", {"user": "u"}),
        ("any.metadata", {"metadata": {"a": "b"}}),
        ("chat.stream_options.include_obfuscation", {"stream": True, "stream_options": {"include_obfuscation": True}}),
    ],
)
def test_an_ignored_field_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, body: dict[str, Any]) -> None:
    schema = FAMILIES["`/v1/chat/completions`"][1]
    fields.read_fields(schema, {**BODIES["chat"], **body})
    change(field_of(name), monkeypatch, refused=True)
    fields.read_fields(schema, BODIES["chat"])
    with pytest.raises(InvalidRequestError, match=name.split(".")[-1]):
        fields.read_fields(schema, {**BODIES["chat"], **body})


def test_an_unserved_field_is_taken_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = FAMILIES["`/v1/chat/completions`"][1]
    change(field_of(f"{ANY}.best_of"), monkeypatch, refused=False)
    fields.read_fields(schema, {**BODIES["chat"], "best_of": 3})
    with pytest.raises(InvalidRequestError, match="suffix"):
        fields.read_fields(schema, {**BODIES["chat"], "suffix": "x"})


def test_what_holds_no_field_is_complained_of() -> None:
    held, loose = field_of("chat.logprobs"), field_of("chat.priority")
    chosen = [Row((held, loose), False, ("test_logprobs", "test_version"))]
    failed = {("test_logprobs", "chat.logprobs")}
    assert list(complaints(chosen, failed)) == [
        "chat.priority is held by none of test_logprobs, test_version",
        "test_version holds no field beside which it stands",
    ]
    assert list(complaints([Row((held,), False, ("test_logprobs",))], failed)) == []
    broken = {*failed, ("test_logprobs", "before")}
    (complaint,) = complaints([Row((held,), False, ("test_logprobs",))], broken)
    assert "test_logprobs fails with every field served, before the others" in complaint


@pytest.mark.parametrize(
    ("field", "status", "said"),
    [("chat.logprobs", 0, "chat.logprobs: test_logprobs"), ("chat.logprob", 1, "docs/api.md has no chat.logprob.")],
)
def test_the_program_takes_a_field_away(field: str, status: int, said: str) -> None:
    command = [sys.executable, "-m", "tests.field_drops", field]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    assert done.returncode == status, done.stdout
    assert said in done.stdout + done.stderr
