"""The tables of docs/api.md: each field of a request, what is said of it, and the tests that hold it.

Knows the document's form and the schemas; what happens when a field is ignored, `field_drops` knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tern.server.schemas.chat import ChatRequest
from tern.server.schemas.completion import CompletionRequest
from tern.server.schemas.fields import IGNORED, NEUTRAL, Schema, schema_of
from tern.server.schemas.messages import CountTokensRequest, MessagesRequest
from tern.server.schemas.responses import ResponsesRequest
from tern.server.schemas.tokenization import DetokenizeRequest, TokenizeRequest

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "api.md"
ANY = "any"
"""The family of fields that no schema has and all of them treat alike."""

FAMILIES: dict[str, tuple[str, type[Schema]]] = {
    "`/v1/chat/completions`": ("chat", ChatRequest),
    "`/v1/completions`": ("completion", CompletionRequest),
    "`/v1/responses`": ("response", ResponsesRequest),
    "`/v1/messages`": ("message", MessagesRequest),
    "`/v1/messages/count_tokens`": ("count", CountTokensRequest),
    "`/tokenize`": ("tokenize", TokenizeRequest),
    "`/detokenize`": ("detokenize", DetokenizeRequest),
    "any request": (ANY, Schema),
}
"""By the words of a table's head: the short name that stands before a field's, and the schema."""

_HEAD = re.compile(r"^\| field of (.+?) \|")
_FIELD = re.compile(r"`([a-z_]+(?:\.[a-z_]+)?)`")
_TEST = re.compile(r"`(test_\w+)`")


@dataclass(frozen=True)
class Field:
    """A field of one family's requests; `name` has a dot where it lies in an object that has a schema of its own."""

    family: str
    name: str
    schema: type[Schema]

    def __str__(self) -> str:
        return f"{self.family}.{self.name}"


@dataclass(frozen=True)
class Row:
    """What a row says: these fields are `ignored` or served, and these tests fail where that is not so."""

    fields: tuple[Field, ...]
    ignored: bool
    tests: tuple[str, ...]


def rows() -> Iterator[Row]:
    """Every row of the tables whose head says of which requests they are."""
    family: tuple[str, type[Schema]] | None = None
    before: tuple[str, ...] = ()
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if head := _HEAD.match(line):
            family = FAMILIES[head[1]]
        elif not line.startswith("|"):
            family = None
        elif family is not None and "---" not in line:
            names, meaning, tests = (cell.strip() for cell in line.strip("|").split(" | "))
            named = tuple(_TEST.findall(tests))
            before = (*before, *named) if tests.startswith("the same") else named
            short, schema = family
            fields = tuple(Field(short, name, schema) for name in _FIELD.findall(names))
            yield Row(fields, meaning.startswith("ignored"), before)


def fields_of(schema: type[Schema]) -> Iterator[str]:
    """The names of a schema's fields, of an object with a schema those inside it, and of those that are not served."""
    for name, field in schema.model_fields.items():
        inner = schema_of(field.annotation)
        if inner is None:
            yield name
        else:
            yield from (f"{name}.{each}" for each in fields_of(inner))
    yield from ({*IGNORED, *NEUTRAL} if schema is Schema else {*schema.ignored, *schema.neutral})


@cache
def places_of_tests() -> dict[str, list[str]]:
    """By the name of a test of the server: where it stands, as pytest is told it."""
    found: dict[str, list[str]] = {}
    for path in sorted((TESTS / "server").glob("test_*.py")):
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, []).append(f"{path.relative_to(TESTS.parent)}::{name}")
    return found
