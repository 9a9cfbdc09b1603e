"""A token's hidden state must not depend on what shares its batch, how its prompt was cut, or where its blocks lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compare import assert_close, rounds_rows_alike
from tests.model.ernie_fixtures import Driver, tern_model, transformers_model

PROMPT = torch.randint(0, 199, (600,), generator=torch.Generator().manual_seed(2)).tolist()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, tolerance=2e-6)
    if rounds_rows_alike():
        assert torch.equal(actual, expected)


@pytest.fixture(scope="module", params=["dense", "moe", "moe-bias"])
def model_and_truth(request: pytest.FixtureRequest) -> tuple:
    kind = request.param
    model = tern_model(transformers_model(kind != "dense", seed=4, use_bias=kind == "moe-bias"))
    driver = Driver(model)
    return model, driver.hidden([(driver.sequence(600), PROMPT)])


@pytest.mark.parametrize("cuts", [[1] * 40, [16, 17, 2, 3, 4], [255, 1, 1, 1, 257, 85], [300, 300]], ids=str)
def test_cutting_a_prompt(model_and_truth: tuple, cuts: list[int]) -> None:
    model, truth = model_and_truth
    driver = Driver(model, block_size=5)
    sequence, parts, start = driver.sequence(600), [], 0
    for size in cuts:
        parts.append(driver.hidden([(sequence, PROMPT[start : start + size])]))
        start += size
    assert_same(torch.cat(parts), truth[:start])


def test_sharing_a_batch(model_and_truth: tuple) -> None:
    """Decodes of very different lengths, a short chunk and a long one, all in one step."""
    model, truth = model_and_truth
    lengths = [1, 30, 255, 256, 257, 511, 530, 7, 290, 0]
    new = [1, 1, 1, 1, 1, 1, 1, 5, 280, 40]
    driver = Driver(model, num_blocks=800, block_size=4)
    sequences = [driver.sequence(length + count) for length, count in zip(lengths, new, strict=True)]
    for sequence, length in zip(sequences, lengths, strict=True):
        if length:
            driver.hidden([(sequence, PROMPT[:length])])
    hidden = driver.hidden(
        [(s, PROMPT[length : length + count]) for s, length, count in zip(sequences, lengths, new, strict=True)]
    )
    for rows, length, count in zip(hidden.split(new), lengths, new, strict=True):
        assert_same(rows, truth[length : length + count])


def test_an_empty_step_is_empty() -> None:
    model = tern_model(transformers_model(True))
    driver = Driver(model)
    batch = driver.batch([(driver.sequence(8), [])])
    assert driver.model.hidden(batch, driver.kv).shape == (0, 64)
    assert model.logits(torch.empty(0, 64)).shape == (0, 199)
