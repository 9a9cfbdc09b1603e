"""`tern serve`: the OpenAI-compatible server. Takes vLLM's and FastDeploy's flags."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tern.cli.engine_flags import EngineFlags, with_engine_flags
from tern.cli.flags import check_parallelism, check_parser, names_in
from tern.cli.more_help import MORE_HELP
from tern.errors import OptionError

logger = logging.getLogger("tern.serve")

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
    api_key_file: Annotated[
        Path | None, typer.Option(hidden=True, help="File of API keys, one a line; # begins a comment.")
    ] = None,
    allow_public: Annotated[bool, typer.Option(help="Serve other machines although there is no --api-key.")] = False,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(hidden=True, help="Web pages of this origin may use the server; * for all. A JSON list is fine."),
    ] = None,
    allow_credentials: Annotated[
        bool, typer.Option("--allow-credentials", hidden=True, help="Those pages may send cookies.")
    ] = False,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(hidden=True, help="Name, such as a proxy's, under which a server for this machine is asked."),
    ] = None,
    max_connections: Annotated[int, typer.Option(hidden=True, help="Most connections open at once.")] = 1024,
    *,
    engine: EngineFlags,
    target_step_seconds: Annotated[
        float | None, typer.Option(help="Most pause for others' prompts; default 1.")
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Most requests waiting; more get 429.")] = None,
    max_queue_tokens: Annotated[int | None, typer.Option(help="Most tokens of their prompts; more get 429.")] = None,
    request_timeout: Annotated[
        float | None, typer.Option(hidden=True, help="Most seconds for a request; default: none.")
    ] = None,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get on SIGTERM.")
    ] = 30.0,
    keep_volatile_lines: Annotated[
        bool, typer.Option("--keep-volatile-lines", hidden=True, help="Keep agents' billing lines in system prompts.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text, or json: one object a line.")] = "text",
    uvicorn_log_level: Annotated[
        str | None, typer.Option(hidden=True, help="The level of uvicorn's own lines.")
    ] = None,
    disable_uvicorn_access_log: Annotated[
        bool, typer.Option("--disable-uvicorn-access-log", hidden=True, help="No line for each request.")
    ] = False,
    enable_log_requests: Annotated[
        bool, typer.Option("--enable-log-requests", hidden=True, help="Log what each request asks for, no texts.")
    ] = False,
    max_log_len: Annotated[
        int | None, typer.Option(hidden=True, help="With it, log so many characters of each prompt too.")
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(hidden=True, help="URL of an OpenTelemetry collector (OTLP over HTTP).")
    ] = None,
    reasoning_parser: Annotated[str | None, typer.Option(help="ernie_x1; always on.")] = None,
    tool_call_parser: Annotated[str | None, typer.Option(help="ernie_x1; always on.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(hidden=True)] = 1,
    more_help: Annotated[bool, MORE_HELP] = False,  # noqa: ARG001
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

    from tern.server import ServerOptions, run_server
    from tern.server.auth import keys_from_file
    from tern.server.logs import configure_logging

    configure_logging(log_level, log_format, uvicorn_log_level)

    limits = {
        "target_step_seconds": target_step_seconds,
        "max_queue": max_queue,
        "max_queue_tokens": max_queue_tokens,
    }
    engine_options = engine.options(**{name: value for name, value in limits.items() if value is not None})
    server_options = ServerOptions(
        host=host,
        port=port,
        metrics_port=metrics_port,
        api_keys=(*(api_key or ()), *(keys_from_file(api_key_file) if api_key_file else ())),
        allow_public=allow_public,
        served_model_name=served_model_name,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        drop_volatile_lines=not keep_volatile_lines,
        allowed_origins=names_in("--allowed-origins", allowed_origins),
        allow_credentials=allow_credentials,
        allowed_hosts=names_in("--allowed-hosts", allowed_hosts),
        max_connections=max_connections,
        access_log=not disable_uvicorn_access_log,
        log_requests=enable_log_requests,
        max_log_len=max_log_len,
        otlp_traces_endpoint=otlp_traces_endpoint,
    )
    key = server_options.curl_key
    run_server(
        lambda: engine.load(model_tag or model, engine_options),
        server_options,
        on_ready=lambda name, url: _say(_TRY.format(name=name, url=url, key=key)),
    )


def _say(text: str) -> None:
    """Print, if standard output takes it: a full disk or a reader that is gone is no reason not to serve."""
    try:
        typer.echo(text)
    except OSError as error:
        logger.warning("standard output cannot be written: %s", error.strerror or error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer goes there
