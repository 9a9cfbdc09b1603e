"""What the tests of the server share: one small tokenizer, and a server over a scripted engine for each test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_fakes import Live, ScriptedEngine, serve, write_tokenizer

from tern.chat import ChatProtocol


@pytest.fixture(scope="session")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> ChatProtocol:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return ChatProtocol.from_directory(directory)


@pytest.fixture(scope="module")
def module_server(protocol: ChatProtocol) -> Iterator[Live]:
    with serve(ScriptedEngine(protocol), protocol) as live:
        yield live


@pytest.fixture
def server(module_server: Live) -> Live:
    """A server whose engine has no script, no gate and no memory of earlier tests."""
    engine = module_server.engine
    engine.answers.clear()
    engine.seen.clear()
    engine.cancelled.clear()
    engine.queue_limit, engine.capacity, engine.fail_with, engine.age = 64, 1024, None, 0.0
    engine.gate.set()
    return module_server
