"""The index of a text's runs against a plain search through it."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tern.engine.ngram import MOST_PLACES, NgramIndex


def searched(tokens: list[int], shortest: int, longest: int, count: int) -> tuple[int, ...]:
    """The continuation by definition: of the latest places that match, the longest match, the latest of equals."""
    run = tokens[-shortest:]
    places = [end for end in range(shortest, len(tokens)) if tokens[end - shortest : end] == run]
    best, best_length = 0, 0
    for place in places[::-1][:MOST_PLACES]:
        length = shortest
        while length < min(longest, place) and tokens[place - length - 1] == tokens[-length - 1]:
            length += 1
        if length > best_length:
            best, best_length = place, length
    text = list(tokens)
    for offset in range(count if best else 0):
        text.append(text[best + offset])
    return tuple(text[len(tokens) :])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=60),
    shortest=st.integers(1, 4),
    more=st.integers(0, 4),
    count=st.integers(1, 6),
    steps=st.lists(st.integers(1, 9), max_size=12),
)
def test_a_growing_text_is_continued_as_a_search_would(
    tokens: list[int], shortest: int, more: int, count: int, steps: list[int]
) -> None:
    index = NgramIndex(shortest, shortest + more)
    end = 0
    for size in [*steps, 60]:
        end = min(len(tokens), end + size)
        found = index.continuation(array("q", tokens[:end]), count)
        assert found == searched(tokens[:end], shortest, shortest + more, count)


def test_the_longest_match_wins_and_of_equals_the_latest() -> None:
    text = array("q", [9, 1, 2, 3, 50, 8, 1, 2, 3, 60, 7, 1, 2, 3, 70, 8, 1, 2, 3])
    assert NgramIndex(2, 6).continuation(text, 2) == (60, 7)  # after 8 1 2 3
    assert NgramIndex(2, 3).continuation(text, 2) == (70, 8)  # after 1 2 3, said last


def test_a_period_goes_on_beyond_the_end() -> None:
    assert NgramIndex(2, 4).continuation(array("q", [1, 2, 3, 1, 2]), 7) == (3, 1, 2, 3, 1, 2, 3)
    assert NgramIndex(3, 4).continuation(array("q", [5] * 4), 3) == (5, 5, 5)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [3, 2, 1, 1, 2]])
def test_without_an_earlier_match_nothing_follows(tokens: list[int]) -> None:
    assert NgramIndex(2, 4).continuation(array("q", tokens), 3) == ()


def test_a_token_is_filed_once() -> None:
    index, filed = NgramIndex(2, 4), []

    class Counting(dict[bytes, int]):
        def __setitem__(self, key: bytes, value: int) -> None:
            filed.append(value)
            super().__setitem__(key, value)

    index._latest = Counting()
    text = array("q")
    for token in [1, 2, 3] * 50:
        text.append(token)
        index.continuation(text, 3)
    assert filed == list(range(2, 150))
