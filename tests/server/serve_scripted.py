"""A process that serves the scripted engine with `run_server`, for tests that send it signals.

Arguments: the tokenizer's directory, the shutdown timeout and perhaps a port. Prints the URL when it serves. It is
loading as long as there is a file `loading` in the directory, and the engine answers nothing until a file `open`
appears there. With a file `elsewhere` its signals reach other threads than the main one. When it serves, `frozen` has
the number of objects that the garbage collector does not look at.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from pathlib import Path

from server_fakes import ScriptedEngine, identity

from tern.chat import ChatProtocol
from tern.server import Loaded, ServerOptions, run_server


def main() -> None:
    directory = Path(sys.argv[1])
    protocol = ChatProtocol.from_directory(directory)
    engine = ScriptedEngine(protocol, queue_limit=1000)
    engine.gate.clear()

    def open_gate() -> None:
        while not (directory / "open").exists():
            time.sleep(0.02)
        engine.gate.set()

    threading.Thread(target=open_gate, daemon=True).start()
    port = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    options = ServerOptions(port=port, metrics_port=0, shutdown_timeout=float(sys.argv[2]))

    def load() -> Loaded:
        while (directory / "loading").exists():
            time.sleep(0.02)
        return Loaded(engine, protocol, identity())

    def ready(model: str, url: str) -> None:  # noqa: ARG001
        if (directory / "elsewhere").exists():
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        (directory / "frozen").write_text(str(gc.get_freeze_count()), encoding="utf-8")
        print(url, flush=True)

    run_server(load, options, on_ready=ready)
    print("ended", flush=True)


if __name__ == "__main__":
    main()
