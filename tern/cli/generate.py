"""`tern generate`: one prompt, one answer, for pipes and programs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tern.cli.flags import size_in_bytes
from tern.errors import OptionError

if TYPE_CHECKING:
    from tern.cli.session import Answer


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; - or nothing reads standard input.")] = None,
    model: Annotated[str | None, typer.Option(help="Directory, .gguf file, hub id or dummy:PRESET.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself: no template, no thought.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    show_thinking: Annotated[bool, typer.Option(help="Print the thought too, on standard error.")] = True,
    thinking: Annotated[bool, typer.Option(help="Think before answering.")] = True,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of the distribution to sample from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, thought included.")] = None,
    reasoning_max_tokens: Annotated[int | None, typer.Option(help="Longest thought.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="wint4, wint8, on a GPU fp8; none: floats.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bfloat16, int8 (CPU) or fp8 (GPU).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or split (experts on the CPU).")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer, tokens.")] = None,
    kv_cache_dir: Annotated[str | None, typer.Option(help="Directory where prefixes outlive the process.")] = None,
    kv_cache_dir_size: Annotated[float | None, typer.Option(help="Most that it may hold, GB; default 20.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Answer one prompt: the answer on standard output, the thought on standard error."""
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text:
        raise OptionError("There is no prompt: give one as argument or on standard input.")

    from tern.cli.session import Session
    from tern.cli.terminal import AnswerPrinter

    session = Session(
        model,
        revision=revision,
        dtype=dtype,
        quantization=quantization,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        device=device,
        kv_cache_dir=kv_cache_dir,
        kv_cache_dir_size=size_in_bytes("--kv-cache-dir-size", kv_cache_dir_size, unit="GB"),
    )
    params = session.sampling(
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        reasoning_max_tokens=reasoning_max_tokens,
    )
    printer = None if as_json else AnswerPrinter(sys.stdout, sys.stderr if show_thinking else None)
    on_events = printer or (lambda _: None)
    if raw:
        answer = session.complete(text, params, on_events)
    else:
        messages = [{"role": "system", "content": system}] if system else []
        kwargs = None if thinking else {"enable_thinking": False}
        answer = session.chat([*messages, {"role": "user", "content": text}], params, on_events, template_kwargs=kwargs)
    if printer is None:
        typer.echo(json.dumps(_as_json(answer), ensure_ascii=False))
    else:
        printer.end()
    if answer.finish_reason == "cancelled":
        raise KeyboardInterrupt  # what there was has been printed; a pipe must not take it for the whole


def _as_json(answer: Answer) -> dict[str, Any]:
    return {
        **answer.message.as_message(),
        "finish_reason": str(answer.finish_reason),
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "completion_tokens": answer.completion_tokens,
            "reasoning_tokens": answer.reasoning_tokens,
        },
        "seconds": round(answer.seconds, 3),
    }
