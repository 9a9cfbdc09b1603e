"""A server over a scripted engine, as the tests of the server have it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tern.chat import ChatProtocol
from tests.server.server_fakes import Live, ScriptedEngine, serve, write_tokenizer


@pytest.fixture(scope="session")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> ChatProtocol:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return ChatProtocol.from_directory(directory)


@pytest.fixture
def server(protocol: ChatProtocol) -> Iterator[Live]:
    with serve(ScriptedEngine(protocol), protocol) as live:
        yield live
