"""A process that serves the scripted engine with `run_server`, for tests that send it signals.

Arguments: the tokenizer's directory and the shutdown timeout. Prints the URL when it serves. The engine answers nothing
until a file `open` appears in the directory.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from server_fakes import ScriptedEngine, identity

from tern.chat import ChatProtocol
from tern.server import ServerOptions, run_server


def main() -> None:
    directory = Path(sys.argv[1])
    protocol = ChatProtocol.from_directory(directory)
    engine = ScriptedEngine(protocol)
    engine.gate.clear()

    def open_gate() -> None:
        while not (directory / "open").exists():
            time.sleep(0.02)
        engine.gate.set()

    threading.Thread(target=open_gate, daemon=True).start()
    options = ServerOptions(port=0, metrics_port=0, shutdown_timeout=float(sys.argv[2]))
    run_server(engine, protocol, identity(), options, on_ready=lambda url: print(url, flush=True))
    print("ended", flush=True)


if __name__ == "__main__":
    main()
