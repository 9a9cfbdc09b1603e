"""One OpenAI-compatible server as its clients see it: models, counted prompts, streamed answers. Knows HTTP and SSE.

httpx comes with the `bench` extra; it is imported when a server is first opened.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from tern.bench.load_report import RequestRecord
from tern.errors import OptionError, RemoteServerError

if TYPE_CHECKING:
    import httpx

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 600.0
"""How long a server may send nothing before a request counts as failed."""
LONGEST_REASON = 200
_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")


class StreamError(Exception):
    """A streamed answer that is not whole, in words for the report."""


def base_url(url: str) -> str:
    """The server's address without `/v1`. Raises `OptionError` unless it is an http or https URL."""
    import_httpx()
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise OptionError(f"--url is {url[:200]!r}: give a server's address, such as http://127.0.0.1:8000.")
    return str(parsed).rstrip("/").removesuffix("/v1")


def import_httpx() -> None:
    """Raise `OptionError` unless httpx is installed."""
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise OptionError("--url needs httpx, which is not installed: pip install 'tern-llm[bench]'.") from None


class LoadClient:
    """A server at `url`, of which `endpoint` ("completions" or "chat") is used, with `api_key` where it wants one."""

    def __init__(self, url: str, endpoint: str, api_key: str | None) -> None:
        self.url, self.endpoint = base_url(url), endpoint
        import httpx

        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._transport_error = httpx.HTTPError
        self.model = ""
        self.ignores_eos = True

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def choose_model(self, wanted: str | None) -> None:
        """Use the model called `wanted`, or the first that the server lists.

        Raises `RemoteServerError` if the server cannot be asked, `OptionError` if it has no such model.
        """
        response = await self._send("GET", "/v1/models")
        if response.status_code == 404 and wanted:  # some servers list nothing
            self.model = wanted
            return
        self._refuse_failure(response, "list its models")
        listed = _object(response).get("data")
        entries = listed if isinstance(listed, list) else []
        names = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if wanted is None and not names:
            raise RemoteServerError(f"The server at {self.url} lists no models: name one with --model.")
        if wanted is not None and wanted not in names:
            raise OptionError(
                f"--model is {wanted[:200]!r}, which the server at {self.url} does not serve: it serves "
                f"{', '.join(names)[:LONGEST_REASON] or 'nothing'}."
            )
        self.model = names[0] if wanted is None else wanted

    async def count(self, prompt: str) -> int:
        """The tokens of a prompt as the server counts them, by an answer of one token; learns if it ignores eos.

        Raises `RemoteServerError` if it does not answer, or does not count.
        """
        response = await self._send("POST", ENDPOINTS[self.endpoint], self._body(prompt, 1))
        if response.status_code in (400, 422) and self.ignores_eos:
            self.ignores_eos = False
            response = await self._send("POST", ENDPOINTS[self.endpoint], self._body(prompt, 1))
        self._refuse_failure(response, f"answer a prompt of {len(prompt.split())} words")
        usage = _object(response).get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(tokens, int) or tokens < 1:
            raise RemoteServerError(
                f"The server at {self.url} does not say how many tokens a prompt has (usage.prompt_tokens): "
                "without that no load can be made."
            )
        return tokens

    async def ask(self, prompt: str, max_tokens: int) -> RequestRecord:
        """One streamed answer; whatever goes wrong is in the record."""
        record = RequestRecord(sent=time.perf_counter())
        body = {**self._body(prompt, max_tokens), "stream": True, "stream_options": {"include_usage": True}}
        try:
            await self._stream(body, record)
        except StreamError as failure:
            record.failure = str(failure)
        except self._transport_error as error:
            record.failure = f"the connection failed ({type(error).__name__})"
        record.ended = time.perf_counter()
        return record

    async def _stream(self, body: dict[str, Any], record: RequestRecord) -> None:
        async with self._http.stream("POST", ENDPOINTS[self.endpoint], json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise StreamError(f"HTTP {response.status_code}: {_reason(response)}")
            done = False
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    done = _take(line.removeprefix("data:").strip(), record) or done
        if not done:
            raise StreamError("the stream broke off")
        if not record.pieces or record.output_tokens < 1:
            raise StreamError("the stream held no text" if record.output_tokens else "the stream held no usage")

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """A request. Not greedy: an answer that repeats itself reads the same experts again and again."""
        chat = {"messages": [{"role": "user", "content": prompt}]}
        return {
            **(chat if self.endpoint == "chat" else {"prompt": prompt}),
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 1.0,
            **({"ignore_eos": True} if self.ignores_eos else {}),
        }

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, json=body)
        except self._transport_error as error:
            reason = str(error).strip() or type(error).__name__
            raise RemoteServerError(
                f"{self.url} cannot be reached ({reason[:LONGEST_REASON]}): start a server there, or mend --url."
            ) from None

    def _refuse_failure(self, response: httpx.Response, what: str) -> None:
        """Raise `RemoteServerError` unless the answer is a success."""
        status = response.status_code
        if status == 200:
            return
        way_out = {
            401: "give its key with --api-key.",
            403: "give its key with --api-key.",
            404: "check --url, --endpoint and --model.",
            400: "lower --prompt-tokens, or check --endpoint.",
        }.get(status, "see its log.")
        raise RemoteServerError(
            f"The server at {self.url} did not {what} (HTTP {status}: {_reason(response)}): {way_out}"
        )


def _take(data: str, record: RequestRecord) -> bool:
    """Note what one event says; whether it was the last."""
    if data == "[DONE]":
        return True
    now = time.perf_counter()
    try:
        chunk = json.loads(data)
    except ValueError:
        raise StreamError(f"the stream held {data[:40]!r}, which is not JSON") from None
    if not isinstance(chunk, dict):
        raise StreamError(f"the stream held {data[:40]!r}, which is no chunk")
    if chunk.get("error"):
        raise StreamError(f"the stream held an error: {_message(chunk)}")
    if _has_text(chunk):
        record.pieces.append(now)
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        record.prompt_tokens = _count(usage, "prompt_tokens")
        record.output_tokens = _count(usage, "completion_tokens")
    return False


def _has_text(chunk: dict[str, Any]) -> bool:
    """Whether a chunk brings any of the answer, thoughts and calls included."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if not isinstance(choice, dict):
            continue
        delta = choice.get("delta")
        if choice.get("text") or (isinstance(delta, dict) and any(delta.get(name) for name in _TEXTS)):
            return True
    return False


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


def _object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer; an empty one for anything else."""
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _reason(response: httpx.Response) -> str:
    """Why a server refused, in its own words, on one line."""
    return _message(_object(response)) or response.reason_phrase or "no reason given"


def _message(answer: dict[str, Any]) -> str:
    error = answer.get("error", answer.get("detail", answer.get("message")))
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(said).split())[:LONGEST_REASON].rstrip(".") if said else ""
