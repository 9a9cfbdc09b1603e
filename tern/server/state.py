"""Everything that the routes of one server share, made once and handed to each family of routes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request
from prometheus_client import CollectorRegistry

from tern.chat import ChatProtocol, GrammarCompiler
from tern.errors import EngineUnavailableError, UnknownModelError
from tern.server.body import Body, read_json
from tern.server.engine_door import EngineDoor, ModelIdentity
from tern.server.metrics import Metrics
from tern.server.offload import Offload
from tern.server.options import ServerOptions

WHICHEVER_MODEL = frozenset({"default", "null"})
"""Names that FastDeploy's examples and clients send for the one model there is."""


@dataclass(frozen=True)
class AppState:
    """The engine, the text protocol and the model behind a server, its options, metrics, grammars and text threads.

    `created` is the time, in seconds since 1970, that the model's entry in /v1/models shows.
    """

    engine: EngineDoor
    protocol: ChatProtocol
    model: ModelIdentity
    options: ServerOptions
    metrics: Metrics
    grammars: GrammarCompiler
    offload: Offload = field(default_factory=Offload)
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def create(
        cls,
        engine: EngineDoor,
        protocol: ChatProtocol,
        model: ModelIdentity,
        options: ServerOptions | None = None,
        registry: CollectorRegistry | None = None,
    ) -> AppState:
        """The state of a new server, its metrics in `registry` (default: one of their own)."""
        metrics = Metrics(engine, CollectorRegistry() if registry is None else registry)
        grammars = GrammarCompiler(protocol.tokenizer, model.generation.eos_token_ids)
        return cls(engine, protocol, model, options or ServerOptions(), metrics, grammars)

    @property
    def model_name(self) -> str:
        """The name of the model in the API."""
        return self.options.served_model_name or self.model.name

    async def read_json(self, request: Request) -> Body:
        """The request's body as a JSON object, within the server's limit."""
        return await read_json(request, self.options.max_body_bytes, self.offload)

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served; a request that names none means the one there is."""
        if name is not None and name != self.model_name and name not in WHICHEVER_MODEL:
            raise UnknownModelError(f"There is no model {name[:100]!r} here: this server serves {self.model_name!r}.")

    def check_ready(self) -> None:
        """Refuse work while the engine takes none."""
        state = self.engine.state
        if state != "ready":
            raise EngineUnavailableError(f"The engine is {state} and takes no requests now: try again later.")
