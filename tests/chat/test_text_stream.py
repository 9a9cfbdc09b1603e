"""Tokens to text with stop strings, a budget for the thought and the loop guard."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tern.chat import TextStream, ThinkingControl, parse_response
from tern.chat.loop_guard import CHECK_EVERY, MAX_PERIOD, MIN_LENGTH, LoopGuard, repeats
from tern.chat.stop_strings import StopStrings
from tern.chat.text_stream import CLOSE_THOUGHT, CLOSING_SENTENCE
from tests.fuzzing import fuzz

property_test = fuzz(120, HealthCheck.function_scoped_fixture)


def drive(stream, tokenizer, text, *, tokens=None):
    """Run a model that wants to write `text`, obeying the stream: (text out, ids, whether it stopped, forced texts)."""
    out, forced, ids = [], [], []
    queue = list(tokens if tokens is not None else tokenizer.encode(text))
    while queue:
        token_id = queue.pop(0)
        ids.append(token_id)
        step = stream.push(token_id)
        out.append(step.text)
        if step.stop:
            return "".join(out) + stream.finish(), ids, True, forced
        if step.force:
            forced.append(tokenizer.decode(step.force, continuation=True))
            for token_id in step.force:
                ids.append(token_id)
                later = stream.push(token_id)
                assert not later.force
                out.append(later.text)
            queue = tokenizer.encode("42\n</response>\n")
    return "".join(out) + stream.finish(), ids, False, forced


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What stop strings mean, by brute force."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@property_test
@given(
    text=st.text(alphabet="aab你\n", max_size=30),
    stops=st.lists(st.text(alphabet="aab你\n", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_in_any_split(text, stops, cuts):
    expected, found = first_stop(text, stops)
    for include in (False, True):
        watch = StopStrings(stops, include=include)
        places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
        said = "".join(watch.push(text[a:b]) for a, b in itertools.pairwise(places))
        if watch.found is None:
            said += watch.finish()
        assert watch.found == found
        assert said == expected + (found or "" if include else "")


@property_test
@given(text=st.text(alphabet="ab", max_size=30), stop=st.text(alphabet="ab", min_size=1, max_size=6))
def test_stop_strings_hold_back_only_what_may_become_one(text, stop):
    watch = StopStrings([stop])
    said = ""
    for at, char in enumerate(text):
        said += watch.push(char)
        if watch.found:
            break
        held = text[len(said) : at + 1]
        assert stop.startswith(held)
        longer = text[len(said) - 1 : at + 1] if said else None
        assert held != stop
        assert longer is None or not stop.startswith(longer)


@pytest.mark.parametrize("include", [False, True])
def test_stop_across_tokens(tokenizer, include):
    stream = TextStream(tokenizer, stop=["in Bei", "zzz"], include_stop=include)
    text, _, stopped, _ = drive(stream, tokenizer, "The weather in Beijing today")
    assert stopped
    assert stream.stop_string == "in Bei"
    assert text.lstrip() == "The weather " + ("in Bei" if include else "")
    assert stream.push(5).text == ""


def test_without_a_stop_the_held_text_comes_at_the_end(tokenizer):
    stream = TextStream(tokenizer, stop=["today!"])
    text, _, stopped, _ = drive(stream, tokenizer, "The weather today")
    assert (text.lstrip(), stopped, stream.stop_string) == ("The weather today", False, None)


def test_stops_count_only_behind_the_marker(byte_level):
    written = "stop in the thought\n</think>\n\n<response>\nnow stop here"
    stream = TextStream(byte_level, stop=["stop", "think>"], thinking=ThinkingControl())
    text, _, stopped, _ = drive(stream, byte_level, written)
    assert stopped
    assert text == "stop in the thought\n</think>\n\n<response>\nnow "


def test_stops_behind_a_marker_of_many_tokens(byte_level):
    ids = [i for char in "xx</think>xx" for i in byte_level.encode(char)]
    stream = TextStream(byte_level, stop=["x"], thinking=ThinkingControl())
    text, _, stopped, _ = drive(stream, byte_level, "", tokens=ids)
    assert (text, stopped) == ("xx</think>", True)


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, "a"), (2, "a"), (3, "axa"), (4, "axa"), (5, "axaxa")])
def test_a_stop_string_counts_once_there_are_enough_tokens(byte_level, min_tokens, expected):
    ids = [i for char in "axaxa" for i in byte_level.encode(char)]
    stream = TextStream(byte_level, stop=["x"], min_tokens=min_tokens)
    text, taken, stopped, _ = drive(stream, byte_level, "", tokens=ids)
    assert (text, stopped) == (expected, expected != "axaxa")
    assert len(taken) >= min_tokens


@pytest.mark.parametrize(
    ("thought", "language"), [("I should think about this. " * 20, "en"), ("我应该先想一想，然后再回答。" * 20, "zh")]
)
def test_a_spent_budget_closes_the_thought_in_its_language(byte_level, thought, language):
    stream = TextStream(byte_level, thinking=ThinkingControl(max_tokens=30))
    text, ids, _, forced = drive(stream, byte_level, thought)
    assert forced == [CLOSING_SENTENCE[language] + CLOSE_THOUGHT]
    message = parse_response(text)
    assert message.content == "42"
    assert message.reasoning_content.endswith(CLOSING_SENTENCE[language])
    assert thought.startswith(message.reasoning_content.removesuffix(CLOSING_SENTENCE[language]))
    closing = byte_level.encode(CLOSING_SENTENCE[language] + "\n</think>")
    assert 30 <= stream.num_reasoning_tokens - len(closing) <= 33
    assert stream.num_reasoning_tokens < len(ids)


def test_a_thought_within_its_budget_is_left_alone(byte_level):
    written = "short\n</think>\n\n<response>\n" + "a long answer. " * 30
    stream = TextStream(byte_level, thinking=ThinkingControl(max_tokens=20))
    text, _, _, forced = drive(stream, byte_level, written)
    assert forced == []
    assert text == written
    assert stream.num_reasoning_tokens == len(byte_level.encode("short\n</think>"))


def test_a_closing_tag_under_way_is_not_doubled(byte_level):
    for budget in range(1, 14):
        ids = [i for char in "ab\n</think>\n\n" for i in byte_level.encode(char)]
        stream = TextStream(byte_level, thinking=ThinkingControl(max_tokens=budget))
        text, _, _, forced = drive(stream, byte_level, "", tokens=ids)
        assert text.count("</think>") == 1
        assert len(forced) == (1 if budget < 4 else 0)


def test_a_tag_that_comes_to_nothing_only_delays_the_close(byte_level):
    ids = [i for char in "ab </thin air and more" for i in byte_level.encode(char)]
    stream = TextStream(byte_level, thinking=ThinkingControl(max_tokens=5))
    text, _, _, forced = drive(stream, byte_level, "", tokens=ids)
    assert len(forced) == 1
    assert text.startswith("ab </thin ")


def test_a_character_under_way_is_finished_first(byte_level):
    ids = byte_level.encode("😀😀😀")
    assert len(ids) == 12
    for budget in range(1, 12):
        stream = TextStream(byte_level, thinking=ThinkingControl(max_tokens=budget))
        text, _, _, forced = drive(stream, byte_level, "", tokens=ids)
        assert len(forced) == 1
        assert "\ufffd" not in text


def test_own_closing_text(byte_level):
    control = ThinkingControl(max_tokens=2, closing_text="\n</think>\n\n")
    text, _, _, forced = drive(TextStream(byte_level, thinking=control), byte_level, "one two three four")
    assert forced == ["\n</think>\n\n"]
    assert "</think>\n\n42" in text


@pytest.mark.parametrize("period", [1, 2, 7, 40, 100, 250, MAX_PERIOD])
def test_the_loop_guard_sees_a_loop(period):
    rng = random.Random(period)
    block = [rng.randrange(1000) for _ in range(period)]
    guard = LoopGuard()
    start = [rng.randrange(1000) for _ in range(500)]
    fired = [at for at, token in enumerate(start + block * (3000 // period)) if guard.push(token)]
    assert fired
    assert 500 + max(MIN_LENGTH, 4 * period) - 2 <= fired[0] <= 500 + max(MIN_LENGTH, 4 * period) + CHECK_EVERY + period


@property_test
@given(period=st.integers(1, 60), length=st.integers(1, 700), noise=st.integers(0, 100), seed=st.integers(0, 2**16))
def test_repeats_means_what_it_says(period, length, noise, seed):
    rng = random.Random(seed)
    block = [rng.randrange(3) for _ in range(period)]
    tokens = [9] * 0 + [10 + rng.randrange(3) for _ in range(noise)] + [block[i % period] for i in range(length)]
    expected = any(
        all(tokens[-i - 1] == tokens[-i - 1 - p] for i in range(max(MIN_LENGTH, 4 * p) - p))
        for p in range(1, MAX_PERIOD + 1)
        if len(tokens) >= max(MIN_LENGTH, 4 * p)
    )
    assert repeats(tokens) == expected


def test_the_loop_guard_lets_ordinary_work_pass(byte_level):
    rng = random.Random(3)
    sums = "\n".join(f"{a} + {b} = {a + b}, carry {(a + b) // 10}" for a, b in
                     ((rng.randrange(1000), rng.randrange(1000)) for _ in range(80)))  # fmt: skip
    table = "| a | b |\n| --- | --- |\n" + "\n".join(f"| {i} | {i * i} |" for i in range(120))
    code = "\n".join(f"    if x == {i}:\n        return {i * 7 % 10}" for i in range(80))
    counting = " ".join(map(str, range(400)))
    rule = "-" * 200 + "\n" + "=" * 200
    for text in (sums, table, code, counting, rule):
        guard = LoopGuard()
        assert not any(guard.push(token) for token in byte_level.encode(text))


def test_a_thought_that_loops_is_closed(byte_level):
    stream = TextStream(byte_level, thinking=ThinkingControl())
    text, _, _, forced = drive(stream, byte_level, "Let me see. " + "Wait, I should check that again. " * 300)
    assert len(forced) == 1
    assert parse_response(text).content == "42"
    unguarded = TextStream(byte_level, thinking=ThinkingControl(loop_guard=False))
    assert drive(unguarded, byte_level, "Wait, I should check that again. " * 300)[3] == []


SECOND = "short\n</think>\n\n<think>\n"


@pytest.mark.parametrize("split", [False, True])
def test_a_second_thought_has_the_same_bounds(byte_level, split):
    written = SECOND + "Wait, I should check that again. " * 300
    ids = [i for char in written for i in byte_level.encode(char)] if split else None
    for control in (ThinkingControl(max_tokens=60, loop_guard=False), ThinkingControl()):
        stream = TextStream(byte_level, thinking=control)
        text, taken, _, forced = drive(stream, byte_level, written, tokens=ids)
        assert len(forced) == 1
        message = parse_response(text)
        assert message.content == "42"
        assert message.reasoning_content.startswith("short\nWait")
        assert 60 <= stream.num_reasoning_tokens < len(taken)


def test_stops_do_not_count_inside_a_second_thought(byte_level):
    written = SECOND + "stop\n</think>\n\n<response>\nnow stop"
    for text in (written, written.replace("</think>\n\n<think>", "</think>\n\n<response>\na\n</response>\n<think>")):
        ids = [i for char in text for i in byte_level.encode(char)]
        stream = TextStream(byte_level, stop=["stop", "<x"], thinking=ThinkingControl())
        assert drive(stream, byte_level, "", tokens=ids)[0] == text.removesuffix("stop")


@pytest.mark.parametrize(
    ("prompt_end", "text", "thinks"),
    [
        ("</think>\n\n", "<think>\nhm", True),
        ("</think>\n\n", "\n\n<think>\nhm", True),
        ("</think>\n\n", "So: <think>\nhm", False),
        ("<response>\n", "<think>\nhm", False),
        ("<response>\n", "a\n</response>\n<think>\nhm", True),
        ("<think>\n", "<think>\nhm", True),
    ],
)
def test_a_response_that_does_not_begin_inside_a_thought_may_open_one(byte_level, prompt_end, text, thinks):
    stream = TextStream(byte_level, thinking=ThinkingControl(max_tokens=1), prompt_end=prompt_end)
    _, _, _, forced = drive(stream, byte_level, "", tokens=[i for char in text for i in byte_level.encode(char)])
    assert bool(forced) == thinks


def test_an_answer_may_repeat_itself(byte_level):
    stream = TextStream(byte_level, thinking=ThinkingControl())
    assert drive(stream, byte_level, "ok</think>" + "la " * 2000)[3] == []
