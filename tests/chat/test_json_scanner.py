"""JSON in pieces against Python's own reader: what is accepted, where a value ends, what a string says."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tern.chat.json_scanner import MAX_DEPTH, JsonScanner, JsonStringDecoder
from tests.fuzzing import fuzz

property_test = fuzz(300)
FRAGMENTS = [
    *'{}[]",:-+.eE0123 \n\t\\/u',
    "true",
    "false",
    "null",
    "12",
    "0.5",
    '"a"',
    '"b": ',
    "\\u00e9",
    "\x01",
    "你",
]


def accepts(text: str, cuts: list[int]) -> bool:
    """Whether the scanner, fed in pieces, takes exactly `text` (and a space, which ends a number) as one value."""
    text += " "
    scanner = JsonScanner()
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    for a, b in itertools.pairwise(places):
        if scanner.done:
            return not text[a:].strip(" \t\n\r")
        stop = scanner.scan(text[a:b])
        if scanner.failed or (scanner.done and text[a + stop : b].strip(" \t\n\r")):
            return False
    return scanner.done


def reads(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@property_test
@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), cuts=st.lists(st.integers(0, 40), max_size=6)
)
def test_it_accepts_what_json_is(text, cuts):
    assert accepts(text, cuts) == reads(text)
    assert accepts(text, list(range(len(text) + 1))) == reads(text)


@pytest.mark.parametrize(
    "text", ["01", "1.", ".5", "-", "1e", "1e+", "+1", "NaN", "Infinity", "'a'", '"\n"', '"\\x"', "tru"]
)
def test_it_refuses_what_only_looks_like_json(text):
    assert not accepts(text, [])
    assert not accepts(text, list(range(9)))


def test_it_stops_behind_the_value():
    scanner = JsonScanner()
    assert scanner.scan(' {"a": [1, 2]}, more') == len(' {"a": [1, 2]}')
    assert scanner.done
    number = JsonScanner()
    assert number.scan("12") == 2
    assert not number.done
    assert number.scan("3,") == 1
    assert number.done


def test_depth_is_bounded():
    assert accepts("[" * MAX_DEPTH + "]" * MAX_DEPTH, [])
    assert not accepts("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), [])


def decode(body: str, cuts: list[int]) -> tuple[str, bool]:
    decoder = JsonStringDecoder()
    places = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    said = "".join(decoder.decode(body[a:b])[0] for a, b in itertools.pairwise(places))
    assert not decoder.failed
    return said, decoder.done


@property_test
@given(text=st.text(max_size=20), ascii_only=st.booleans(), cuts=st.lists(st.integers(0, 60), max_size=8))
def test_strings_say_what_json_reads(text, ascii_only, cuts):
    body = json.dumps(text, ensure_ascii=ascii_only)[1:]
    assert decode(body, cuts) == (text, True)
    assert decode(body, list(range(len(body)))) == (text, True)


@property_test
@given(units=st.lists(st.sampled_from(["\\ud83d", "\\ude00", "a", "\\n", "\\u0041"]), max_size=6))
def test_lone_surrogates_stay_escaped(units):
    body = "".join(units)
    said, done = decode(body + '"', list(range(len(body) + 1)))
    assert done
    assert json.loads(f'"{body}"') == json.loads(json.dumps(said).replace("\\\\ud", "\\ud"))
    said.encode()


@pytest.mark.parametrize("body", ["\\x", "\\u12g4", "a\nb", "\\u12"])
def test_wrong_strings(body):
    decoder = JsonStringDecoder()
    decoder.decode(body)
    assert not decoder.done
    assert decoder.failed == (body != "\\u12")
