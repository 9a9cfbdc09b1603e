"""`tern serve`: the OpenAI-compatible server. Takes vLLM's and FastDeploy's flags."""

from __future__ import annotations

from typing import Annotated

import typer

from tern.cli.engine_flags import EngineFlags, configure_logging, with_engine_flags
from tern.cli.flags import check_parallelism, check_parser
from tern.errors import OptionError

_TRY = """
{name} answers at {url}. Try it:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
    -d '{{"messages": [{{"role": "user", "content": "What is 1958 + 4783?"}}]}}'
"""


@with_engine_flags
def serve(
    model_tag: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id or dummy:PRESET.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same, as a flag.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in the API; default: MODEL as given.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="A port of its own for /metrics.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(envvar="TERN_API_KEY", help="Required of clients.")] = None,
    allow_public: Annotated[bool, typer.Option(help="Serve other machines although there is no --api-key.")] = False,
    *,
    engine: EngineFlags,
    max_queue: Annotated[int | None, typer.Option(help="Most requests waiting; more get 429.")] = None,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get on SIGTERM.")
    ] = 30.0,
    keep_volatile_lines: Annotated[
        bool, typer.Option("--keep-volatile-lines", help="Keep agents' billing lines in system prompts.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    reasoning_parser: Annotated[str | None, typer.Option(help="ernie_x1; always on.")] = None,
    tool_call_parser: Annotated[str | None, typer.Option(help="ernie_x1; always on.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(hidden=True)] = 1,
) -> None:
    """Serve a model over HTTP, as OpenAI, vLLM and FastDeploy do.

    Without MODEL the small embedded model is served. Flags that only another engine's process layout needs are
    accepted and do nothing; underscores and dashes are the same.
    """
    check_parser("--reasoning-parser", reasoning_parser)
    check_parser("--tool-call-parser", tool_call_parser)
    check_parallelism("--tensor-parallel-size", tensor_parallel_size)
    if model_tag is not None and model is not None and model_tag != model:
        raise OptionError(f"The model is named twice, {model_tag!r} and --model {model!r}: name it once.")
    configure_logging(log_level)

    from tern.server import ServerOptions, run_server

    engine_options = engine.options(**({} if max_queue is None else {"max_queue": max_queue}))
    server_options = ServerOptions(
        host=host,
        port=port,
        metrics_port=metrics_port,
        api_keys=tuple(api_key or ()),
        allow_public=allow_public,
        served_model_name=served_model_name,
        shutdown_timeout=shutdown_timeout,
        drop_volatile_lines=not keep_volatile_lines,
    )
    key = server_options.curl_key
    run_server(
        lambda: engine.load(model_tag or model, engine_options),
        server_options,
        on_ready=lambda name, url: typer.echo(_TRY.format(name=name, url=url, key=key)),
    )
