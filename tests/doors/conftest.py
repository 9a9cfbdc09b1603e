"""The embedded model, opened once for the tests of the front doors."""

from __future__ import annotations

import pytest

from tern import LLM


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM(max_model_len=2048, progress=False)
