"""`tern serve`: the OpenAI-compatible server. Takes vLLM's and FastDeploy's flags."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Annotated

import typer

from tern.cli.flags import check_parallelism, check_parser, size_in_bytes
from tern.errors import OptionError

if TYPE_CHECKING:
    from tern.engine import EngineOptions
    from tern.server import ServerOptions

logger = logging.getLogger("tern.serve")

_TRY = """
{name} answers at {url}. Try it:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
    -d '{{"messages": [{{"role": "user", "content": "What is 1958 + 4783?"}}]}}'
"""


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
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="wint4 or wint8: pack weights while loading; none: never.")
    ] = None,
    speculation: Annotated[str | None, typer.Option(help="auto (default), ngram, mtp or off: who drafts.")] = None,
    num_speculative_tokens: Annotated[int | None, typer.Option(help="Most drafts of a sequence in a step.")] = None,
    speculative_config: Annotated[str | None, typer.Option(help="The same as vLLM's JSON, with a method.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer together, tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences running at once.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens computed in one step.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Most requests waiting; more get 429.")] = None,
    kv_cache_memory: Annotated[float | None, typer.Option(help="Memory for the KV cache, GiB.")] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto, bfloat16 or int8: half the memory at long contexts.")
    ] = "auto",
    block_size: Annotated[int | None, typer.Option(help="Tokens in a KV block.")] = None,
    prefix_caching: Annotated[
        bool,
        typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse the KV of shared prefixes."),
    ] = True,
    kv_cache_dir: Annotated[str | None, typer.Option(help="Directory where prefixes outlive the server.")] = None,
    kv_cache_dir_size: Annotated[float | None, typer.Option(help="Most that it may hold, GB; default 20.")] = None,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    hf_token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Token for private hub models.")] = None,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get on SIGTERM.")
    ] = 30.0,
    drop_volatile_lines: Annotated[
        bool,
        typer.Option(
            "--drop-volatile-lines/--keep-volatile-lines", help="Leave agents' billing lines out of system prompts."
        ),
    ] = True,
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

    from tern.engine import EngineOptions
    from tern.server import ServerOptions

    chosen = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_queue": max_queue,
        "block_size": block_size,
        "speculation": speculation,
        "num_speculative_tokens": num_speculative_tokens,
        "speculative_config": speculative_config,
    }
    engine_options = EngineOptions.from_keywords(
        dtype=dtype,
        device=device,
        quantization=quantization,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=size_in_bytes("--kv-cache-memory", kv_cache_memory, unit="GiB"),
        enable_prefix_caching=prefix_caching,
        kv_cache_dir=kv_cache_dir,
        kv_cache_dir_size=size_in_bytes("--kv-cache-dir-size", kv_cache_dir_size, unit="GB"),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    server_options = ServerOptions(
        host=host,
        port=port,
        metrics_port=metrics_port,
        api_keys=tuple(api_key or ()),
        allow_public=allow_public,
        served_model_name=served_model_name,
        shutdown_timeout=shutdown_timeout,
        drop_volatile_lines=drop_volatile_lines,
    )
    _open_and_run(model_tag or model, revision, hf_token, engine_options, server_options)


def _open_and_run(
    model: str | None,
    revision: str | None,
    hf_token: str | None,
    engine_options: EngineOptions,
    server_options: ServerOptions,
) -> None:
    from tern.chat import ChatProtocol
    from tern.checkpoint import resolve_model
    from tern.engine import Engine, EngineService
    from tern.server import Loaded, run_server

    def load() -> Loaded:
        started = time.perf_counter()
        source = resolve_model(model, revision=revision, token=hf_token)
        logger.info("model %s: found after %.1f s", source.name, time.perf_counter() - started)
        engine = Engine.open(source, engine_options)
        logger.info("weights loaded, KV cache reserved: %.1f s", time.perf_counter() - started)
        return Loaded(EngineService(engine), ChatProtocol.from_directory(source.directory, source.text_files), source)

    key = server_options.curl_key
    run_server(load, server_options, on_ready=lambda name, url: typer.echo(_TRY.format(name=name, url=url, key=key)))


def configure_logging(level: str) -> None:
    """Plain log lines on standard error."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise OptionError(f"--log-level is {level!r}: it must be debug, info, warning or error.")
    logging.basicConfig(level=number, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
