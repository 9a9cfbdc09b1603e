"""How often properties are tried: always the same examples, or with `TERN_FUZZ=100` so many times as many, new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("TERN_FUZZ", "1"))


def fuzz(examples: int, *tolerated: HealthCheck) -> settings:
    """Settings for a property that the suite tries with so many examples."""
    return settings(
        max_examples=examples * TIMES, deadline=None, derandomize=TIMES == 1, suppress_health_check=tolerated
    )
