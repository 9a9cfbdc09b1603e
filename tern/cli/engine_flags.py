"""The flags that say which model is opened and how its engine is sized, shared by commands that take all of them.

Knows options and what they mean to the engine; heavy imports wait until a command runs.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tern.cli.flags import size_in_bytes

if TYPE_CHECKING:
    from tern.engine import EngineOptions
    from tern.server import Loaded

logger = logging.getLogger("tern.serve")


@dataclass(frozen=True)
class EngineFlags:
    """What the flags were given; a command that is registered by `with_engine_flags` gets one."""

    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    quantization: Annotated[str | None, typer.Option(help="wint4, wint8, on a GPU fp8; none: floats.")] = None
    speculation: Annotated[str | None, typer.Option(help="auto (default), ngram, mtp or off: who drafts.")] = None
    num_speculative_tokens: Annotated[
        int | None, typer.Option(hidden=True, help="Most drafts of a sequence in a step.")
    ] = None
    speculative_config: Annotated[
        str | None, typer.Option(hidden=True, help="The same as vLLM's JSON, with a method.")
    ] = None
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer together, tokens.")] = None
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences running at once.")] = None
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens computed in one step.")] = None
    kv_cache_memory: Annotated[float | None, typer.Option(help="Memory for the KV cache, GiB.")] = None
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto, bfloat16, or half its memory: int8 (CPU) or fp8 (GPU).")
    ] = "auto"
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(hidden=True, help="Share of a GPU's memory to use; default 0.9.")
    ] = None
    attention_backend: Annotated[
        str, typer.Option(hidden=True, help="Who attends prompts on a GPU: auto, tern, flash-attn or flashinfer.")
    ] = "auto"
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", hidden=True, help="On a GPU: no CUDA graphs.")] = (
        False
    )
    async_scheduling: Annotated[
        bool | None,
        typer.Option("--async-scheduling/--no-async-scheduling", hidden=True, help="Begin a step early, as on a GPU."),
    ] = None
    block_size: Annotated[int | None, typer.Option(hidden=True, help="Tokens in a KV block.")] = None
    prefix_caching: Annotated[
        bool,
        typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse the KV of shared prefixes."),
    ] = True
    kv_cache_dir: Annotated[str | None, typer.Option(help="Directory where prefixes outlive the process.")] = None
    kv_cache_dir_size: Annotated[float | None, typer.Option(help="Most that it may hold, GB; default 20.")] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or split (experts on the CPU).")] = "auto"
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None
    hf_token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Token for private hub models.")] = None

    def options(self, **settled: Any) -> EngineOptions:
        """The engine's options: `settled` by the command, else as the flags say, else the engine's defaults."""
        from tern.engine import EngineOptions

        chosen = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "async_scheduling": self.async_scheduling,
            "block_size": self.block_size,
            "speculation": self.speculation,
            "num_speculative_tokens": self.num_speculative_tokens,
            "speculative_config": self.speculative_config,
        }
        return EngineOptions.from_keywords(
            dtype=self.dtype,
            device=self.device,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            kv_cache_dtype=self.kv_cache_dtype,
            attention_backend=self.attention_backend,
            enforce_eager=self.enforce_eager,
            kv_cache_memory=size_in_bytes("--kv-cache-memory", self.kv_cache_memory, unit="GiB"),
            enable_prefix_caching=self.prefix_caching,
            kv_cache_dir=self.kv_cache_dir,
            kv_cache_dir_size=size_in_bytes("--kv-cache-dir-size", self.kv_cache_dir_size, unit="GB"),
            **{name: value for name, value in chosen.items() if value is not None},
            **settled,
        )

    def load(self, model: str | None, options: EngineOptions) -> Loaded:
        """Open the model with an engine on it, not started yet."""
        from tern.chat import ChatProtocol
        from tern.checkpoint import resolve_model
        from tern.engine import Engine, EngineService
        from tern.server import Loaded

        laps = [time.perf_counter()]
        source = resolve_model(model, revision=self.revision, token=self.hf_token)
        laps.append(time.perf_counter())
        engine = Engine.open(source, options)
        laps.append(time.perf_counter())
        protocol = ChatProtocol.from_directory(source.directory, source.text_files)
        laps.append(time.perf_counter())
        found, opened, read = (after - before for before, after in pairwise(laps))
        logger.info(
            "%s is loaded after %.1f s: files %.1f s, engine %.1f s, tokenizer and template %.1f s",
            source.name,
            laps[-1] - laps[0],
            found,
            opened,
            read,
        )
        return Loaded(EngineService(engine), protocol, source)


def with_engine_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, which takes an `engine: EngineFlags`, as typer reads it: with the flags in that place."""
    hints = typing.get_type_hints(EngineFlags, include_extras=True)
    flags = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(EngineFlags)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        parameters += flags if parameter.name == "engine" else own

    @functools.wraps(command)
    def typed(**given: Any) -> None:
        engine = EngineFlags(**{each.name: given.pop(each.name) for each in flags})
        command(engine=engine, **given)

    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    typed.__annotations__ = {each.name: each.annotation for each in parameters}
    return typed
