"""What a caller may ask of sampling: every wrong value is one sentence that names its field."""

from __future__ import annotations

from typing import Any

import pytest

from tern.engine import SamplingParams
from tern.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-45),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", [7]),
        ("seed", 1.5),
        ("seed", 2**70),
        ("stop", 5),
        ("stop", ""),
        ("stop", ["x" * 5000]),
        ("stop", [None]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [None]),
        ("stop_token_ids", "7"),
        ("ignore_eos", "yes"),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", 1),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", 21),
        ("logprobs", -1),
        ("reasoning_max_tokens", -1),
    ],
)
def test_a_wrong_value_names_its_field(field: str, value: object) -> None:
    values: dict[str, Any] = {field: value}
    with pytest.raises(InvalidRequestError, match=field) as caught:
        SamplingParams(**values)
    assert caught.value.param == field
    assert len(str(caught.value)) < 600


def test_the_first_fields_may_be_given_by_place_as_in_vllm() -> None:
    params = SamplingParams(2, 0.5, 0.1, 1.2, 0.7, 0.9, 40, 0.05, 7, ["end"], [3], True, 99, 4, 5)
    assert params == SamplingParams(
        n=2, presence_penalty=0.5, frequency_penalty=0.1, repetition_penalty=1.2, temperature=0.7, top_p=0.9, top_k=40,
        min_p=0.05, seed=7, stop=["end"], stop_token_ids=[3], ignore_eos=True, max_tokens=99, min_tokens=4, logprobs=5,
    )  # fmt: skip


def test_fields_can_be_set_and_are_checked_then() -> None:
    params = SamplingParams(max_tokens=50)
    copy = params.clone()
    params.max_tokens, params.stop = 5, "end"
    assert (params.max_tokens, params.stop) == (5, ("end",))
    for name, value in (("max_tokens", 0), ("min_tokens", 6), ("stop", [7])):
        with pytest.raises(InvalidRequestError, match=name):
            setattr(params, name, value)
    assert params == SamplingParams(max_tokens=5, stop="end"), "what was refused changed nothing"
    assert copy == SamplingParams(max_tokens=50)
    with pytest.raises(AttributeError, match="temprature"):
        params.temprature = 0.5  # type: ignore[attr-defined]


def test_none_and_a_single_stop_string_are_understood() -> None:
    params = SamplingParams(stop="end", stop_token_ids=None, bad_words=None, logit_bias=None)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, params.bad_words, params.logit_bias) == (("end",), (), (), {})
    assert SamplingParams(stop=None).stop == ()


def test_the_smallest_repetition_penalty_keeps_logits_finite() -> None:
    assert SamplingParams(repetition_penalty=0.01).repetition_penalty == 0.01
