"""Keeps long text work off the event loop: reading one large request must not stall the answers to others."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

LARGE = 8 * 1024
"""Characters (or bytes, or tokens) from which work goes to a thread; below, the hop costs more than the work."""

WORKERS = 4

Result = TypeVar("Result")


class Offload:
    """A small pool of threads for text work."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="tern-text")

    async def run(self, size: int, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call `function` here if its input is small, in a thread if it is large, and return what it returns."""
        if size < LARGE:
            return function(*args, **kwargs)
        loop = asyncio.get_running_loop()
        work = partial(contextvars.copy_context().run, function)  # its log lines are the request's too
        return await loop.run_in_executor(self._pool, partial(work, *args, **kwargs))

    def close(self) -> None:
        """Let running work finish and take no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
