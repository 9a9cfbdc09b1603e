"""The HTTP front door: routes by API family, their schemas, metrics. Knows HTTP; knows no tensors.

`create_app(AppState.create(engine, protocol, model, options))` makes the application, `run_server` loads a model and
serves it until a signal ends it.
"""

from __future__ import annotations

from tern.server.app import create_app
from tern.server.engine_door import EngineDoor, ModelIdentity
from tern.server.options import ServerOptions
from tern.server.run import Loaded, run_server, running
from tern.server.state import AppState

__all__ = ["AppState", "EngineDoor", "Loaded", "ModelIdentity", "ServerOptions", "create_app", "run_server", "running"]
