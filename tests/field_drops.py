"""Every field of docs/api.md is ignored in turn, and one of the tests that its row names must fail.

`python -m tests.field_drops` does so for all fields, or for those that it is given, such as `chat.seed`. It lists the
fields that no test holds, and the tests that hold none of the fields beside which they stand.

Ignored is a field whose value is checked as ever and then left out, so that its default counts. Of a field that the
document calls ignored the opposite is tried: that it is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from tern.errors import InvalidRequestError
from tern.server.schemas import fields
from tests.field_table import Field, Row, places_of_tests, rows

STAND_INS: Mapping[str, Any] = {
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "x",
    "input": "x",
    "tokens": [5],
    "max_tokens": 1000,
}
"""What counts for a field that has no default when it is ignored."""

CONTROLS = ("before", "after")
"""Runs of a test with every field served: it must pass, and pass again after it has failed."""

SECONDS = 60
"""A test that takes longer without its field has failed."""


def change(field: Field, patch: pytest.MonkeyPatch, *, refused: bool) -> None:
    """Let the server ignore a field that it serves or refuses; `refused`: refuse one that it ignores."""
    if field.name.split(".")[0] in field.schema.model_fields:
        _change_served(field, patch, refused)
    elif not refused:
        check = fields._check_foreign
        patch.setattr(fields, "_check_foreign", lambda name, *rest: None if name == field.name else check(name, *rest))
    elif field.name == "metadata":
        patch.setattr(fields, "_check_metadata", lambda _: _refuse(field))
    else:
        ignored = fields.IGNORED if field.name in fields.IGNORED else field.schema.ignored
        patch.delitem(ignored, field.name)  # type: ignore[arg-type]


def _change_served(field: Field, patch: pytest.MonkeyPatch, refused: bool) -> None:
    validate = field.schema.model_validate.__func__  # type: ignore[attr-defined]

    def changed(schema: type[fields.Schema], body: dict[str, Any]) -> Any:
        found = validate(schema, body)
        if schema is not field.schema:
            return found
        if not refused:
            return validate(schema, without(body, field))
        return _refuse(field) if without(body, field) != body else found

    patch.setattr(field.schema, "model_validate", classmethod(changed))


def without(body: Mapping[str, Any], field: Field) -> dict[str, Any]:
    """A body in which the field is not given; an object that cannot be without it goes too."""
    outer, _, inner = field.name.partition(".")
    rest = {name: value for name, value in body.items() if name != outer}
    if inner and isinstance(body.get(outer), Mapping):
        described = fields.schema_of(field.schema.model_fields[outer].annotation)
        assert described is not None
        if not described.model_fields[inner].is_required():
            rest[outer] = {name: value for name, value in body[outer].items() if name != inner}
    if field.schema.model_fields[outer].is_required():
        rest[outer] = STAND_INS[outer]
    return rest


def _refuse(field: Field) -> None:
    raise InvalidRequestError(f"{field.name} is refused.", param=field.name)


class Trial:
    """A plugin of pytest that runs each test once for every field that `chosen` rows set beside it, and twice with all.

    `failed` has the name of the test and of the field, or one of `CONTROLS`.
    """

    def __init__(self, chosen: Sequence[Row]) -> None:
        self.rows = chosen
        self.failed: set[tuple[str, str]] = set()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        name = metafunc.function.__name__
        without = [(str(field), row, field) for row in self.rows if name in row.tests for field in row.fields]
        before, after = ((which, None, None) for which in CONTROLS)
        cases = [before, *without, after]
        metafunc.parametrize("ignored_field", cases, ids=[case[0] for case in cases], indirect=True)

    @pytest.fixture(autouse=True)
    def ignored_field(self, request: pytest.FixtureRequest) -> Iterator[None]:
        which, row, field = request.param
        if (request.function.__name__, which) in self.failed:
            pytest.skip("another case of this test has failed")
        with pytest.MonkeyPatch.context() as patch:
            if field is not None:
                change(field, patch, refused=row.ignored)
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Any:
        report = yield
        if report.failed:
            self.failed.add((item.function.__name__, item.callspec.params["ignored_field"][0]))
        return report


def try_without(chosen: Sequence[Row]) -> set[tuple[str, str]]:
    """The tests of these rows that fail without a field, and with all: see `Trial.failed`."""
    trial = Trial(chosen)
    places = [
        place
        for test in dict.fromkeys(test for row in chosen for test in row.tests)
        for place in places_of_tests()[test]
    ]
    options = ["-p", "no:cacheprovider", "--tb=no", "--no-summary", f"--timeout={SECONDS}", "-W", "default"]
    code = pytest.main([*options, *places], plugins=[trial])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with {code}.")
    return trial.failed


def complaints(chosen: Sequence[Row], failed: set[tuple[str, str]]) -> Iterator[str]:
    """What is wrong: fields without a test that fails, tests that hold no field, tests that fail with every field."""
    for test, which in sorted(failed):
        if which in CONTROLS:
            yield f"{test} fails with every field served, {which} the others"
    for row in chosen:
        for field in row.fields:
            if not any((test, str(field)) in failed for test in row.tests):
                yield f"{field} is held by none of {', '.join(row.tests)}"
    holding = {test for test, which in failed if which not in CONTROLS}
    for test in sorted({test for row in chosen for test in row.tests} - holding):
        yield f"{test} holds no field beside which it stands"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ignore each field of docs/api.md; its tests must fail.")
    parser.add_argument("fields", nargs="*", help="such as chat.seed; default: all of them")
    wanted = set(parser.parse_args(arguments).fields)
    if missing := wanted - {str(field) for row in rows() for field in row.fields}:
        sys.exit(f"docs/api.md has no {', '.join(sorted(missing))}.")
    chosen = [
        Row(kept, row.ignored, row.tests)
        for row in rows()
        if (kept := tuple(field for field in row.fields if not wanted or str(field) in wanted))
    ]
    failed = try_without(chosen)
    for row in chosen:
        for field in row.fields:
            print(
                f"{field}: {', '.join(test for test in row.tests if (test, str(field)) in failed) or 'NO TEST FAILS'}"
            )
    found = list(complaints(chosen, failed))
    print(f"{sum(len(row.fields) for row in chosen)} fields, {len(found)} complaints", *found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
