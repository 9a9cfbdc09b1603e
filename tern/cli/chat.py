"""`tern chat`: talk to a model in the terminal. The thought is shown dimmed while it grows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tern.cli.flags import size_in_bytes
from tern.errors import InvalidRequestError

if TYPE_CHECKING:
    from tern.chat import ParsedMessage
    from tern.cli.session import Answer, Session

_HELP = """/clear  forget the conversation      /think on|off  think before answering, or not
/help   this                         /exit           leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id or dummy:PRESET.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Tools, a JSON list in OpenAI form.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of the distribution to sample from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, thought included.")] = None,
    reasoning_max_tokens: Annotated[int | None, typer.Option(help="Longest thought.")] = None,
    thinking: Annotated[bool, typer.Option(help="Think before answering.")] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="wint4, wint8, on a GPU fp8; none: floats.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bfloat16, int8 (CPU) or fp8 (GPU).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or split (experts on the CPU).")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest conversation, tokens.")] = None,
    kv_cache_dir: Annotated[str | None, typer.Option(help="Directory where prefixes outlive the process.")] = None,
    kv_cache_dir_size: Annotated[float | None, typer.Option(help="Most that it may hold, GB; default 20.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Talk to a model. Type /help for what can be typed beside messages."""
    from tern.cli.session import Session

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
    params = {
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "max_tokens": max_tokens,
        "reasoning_max_tokens": reasoning_max_tokens,
    }
    session.sampling(**params)
    conversation = _Conversation(session, params, system, _read_tools(tools), thinking)
    if sys.stdin.isatty():
        typer.echo(f"{session.name}: /help says what can be typed.", err=True)
    while (line := _ask()) is not None:
        if line.startswith("/"):
            if not conversation.command(line):
                return
        elif line.strip():
            conversation.say(line)


class _Conversation:
    """The messages so far and what is done with the next line."""

    def __init__(
        self,
        session: Session,
        params: dict[str, Any],
        system: str | None,
        tools: list[dict[str, Any]] | None,
        thinking: bool,
    ) -> None:
        self._session = session
        self._params = params
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, Any]] = list(self._opening)
        self._tools = tools
        self._thinking = thinking

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash asks; False to leave."""
        match line.split():
            case ["/exit" | "/quit"]:
                return False
            case ["/clear"]:
                self._messages = list(self._opening)
            case ["/think", "on" | "off" as state]:
                self._thinking = state == "on"
            case ["/help"]:
                typer.echo(_HELP, err=True)
            case _:
                typer.echo(f"There is no command {line!r}.\n{_HELP}", err=True)
        return True

    def say(self, text: str) -> None:
        """Send a message and print the answer; each tool call's result is asked for, and the model goes on from there.

        A message that is refused, and input that ends before a result, leave the conversation as it was.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        calling = True
        while calling:
            try:
                message = self._answer(messages)
            except InvalidRequestError as error:
                typer.echo(f"tern: {error}", err=True)
                return
            messages.append(message.as_message())
            for call in message.tool_calls:
                if (result := _ask(f"result of {call.name}> ")) is None:
                    return
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            calling = bool(message.tool_calls)
        self._messages = messages

    def _answer(self, messages: list[dict[str, Any]]) -> ParsedMessage:
        from tern.cli.terminal import AnswerPrinter

        printer = AnswerPrinter(sys.stdout, sys.stdout)
        answer = self._session.chat(
            messages,
            self._session.sampling(**self._params),
            printer,
            tools=self._tools,
            template_kwargs=None if self._thinking else {"enable_thinking": False},
        )
        printer.end()
        if sys.stdout.isatty():
            typer.echo(typer.style(_figures(answer), dim=True))
        return answer.message


def _ask(prompt: str = "> ") -> str | None:
    """The next line, None at the end of input. Ctrl-C starts a new line."""
    while True:
        try:
            return input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            typer.echo("")


def _figures(answer: Answer) -> str:
    decoding = max(answer.seconds - answer.first_token_seconds, 1e-9)
    speed = (answer.completion_tokens - 1) / decoding
    return (
        f"[{answer.prompt_tokens} tokens in, {answer.cached_tokens} cached; {answer.completion_tokens} out, "
        f"{answer.reasoning_tokens} of them thought; {speed:.1f} tokens/s; {answer.finish_reason}]"
    )


def _read_tools(path: Path | None) -> list[dict[str, Any]] | None:
    if path is None:
        return None
    import json

    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequestError(f"--tools {path} is not JSON: {error}.", param="tools") from None
    if not isinstance(tools, list):
        raise InvalidRequestError(f"--tools {path} must hold a JSON list of tools in OpenAI form.", param="tools")
    return tools
