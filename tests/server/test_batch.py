"""Batches over a scripted engine: what a line may be, what is written for it, and going on after a cut-off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from server_fakes import USER, ScriptedEngine, identity

from tern.chat import ChatProtocol
from tern.errors import EngineUnavailableError, OptionError
from tern.server import AppState, ServerOptions, create_app, running
from tern.server.batch import AnswerFile, Tally, batch_urls, read_lines, run_batch
from tern.server.batch.lines import FaultyLine, Line

CHAT = "/v1/chat/completions"


def line(custom_id: Any, url: Any = CHAT, **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"messages": USER}, **fields}


def raw(*lines: Any) -> list[bytes]:
    return [(each if isinstance(each, str) else json.dumps(each)).encode() + b"\n" for each in lines]


@pytest.fixture
def engine(protocol: ChatProtocol) -> ScriptedEngine:
    return ScriptedEngine(protocol)


@pytest.fixture
def app(engine: ScriptedEngine, protocol: ChatProtocol) -> Iterator[FastAPI]:
    state = AppState.create(engine, protocol, identity(), ServerOptions())
    with running(state):
        yield create_app(state)


def run(app: FastAPI, path: Path, lines: list[bytes], concurrency: int = 2) -> tuple[Tally, list[dict[str, Any]]]:
    """Answer the lines -> what was done, and all of the output."""
    tally, calls = Tally(), []
    with AnswerFile(path) as answers:
        requests = read_lines(lines, batch_urls(app))
        work = run_batch(
            app, requests, answers, tally, concurrency=concurrency, on_line=lambda: calls.append(answers.num_lines)
        )
        asyncio.run(work)
    assert len(calls) == tally.answered + tally.earlier
    return tally, [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]


def test_every_post_below_v1_is_served(app: FastAPI) -> None:
    assert batch_urls(app) >= {CHAT, "/v1/completions", "/v1/responses", "/v1/messages"}
    assert not {"/tokenize", "/v1/models"} & batch_urls(app)


def test_answers_are_those_of_the_routes(app: FastAPI, tmp_path: Path) -> None:
    completion = line("b", "/v1/completions", body={"prompt": ["x", "y"], "max_tokens": 3})
    wrong = line("c", body={"messages": USER, "temperature": 99})
    tally, written = run(app, tmp_path / "out", raw(line("a"), completion, "", wrong))
    found = {each["custom_id"]: each for each in written}
    assert len(found) == len(written) == tally.answered == 3
    assert all(each["error"] is None and each["id"].startswith("batch_req_") for each in written)
    chat, plain, refused = (found[name]["response"] for name in "abc")
    assert chat["status_code"] == plain["status_code"] == 200
    assert chat["body"]["choices"][0]["message"]["content"] == "Hello, 你好!\n\nHow are you?"
    assert chat["request_id"] == chat["body"]["id"]
    assert [choice["index"] for choice in plain["body"]["choices"]] == [0, 1]
    assert refused["status_code"] == 400
    assert refused["body"]["error"]["param"] == "temperature"
    assert refused["request_id"]
    usages = [chat["body"]["usage"], plain["body"]["usage"]]
    assert tally.prompt_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert tally.completion_tokens == sum(usage["completion_tokens"] for usage in usages)


def test_answers_of_the_newer_families_are_counted_too(app: FastAPI, tmp_path: Path) -> None:
    response = line("a", "/v1/responses", body={"input": "How is the weather?"})
    message = line("b", "/v1/messages", body={"messages": USER, "max_tokens": 300})
    wrong = line("c", "/v1/messages", body={"messages": USER})
    tally, written = run(app, tmp_path / "out", raw(response, message, wrong))
    found = {each["custom_id"]: each["response"] for each in written}
    assert [found[name]["status_code"] for name in "abc"] == [200, 200, 400]
    assert found["a"]["body"]["output"][-1]["content"][0]["text"] == "Hello, 你好!\n\nHow are you?"
    assert found["b"]["body"]["content"][0]["text"] == "Hello, 你好!\n\nHow are you?"
    assert [found[name]["request_id"] == found[name]["body"]["id"] for name in "ab"] == [True, True]
    usages = [found[name]["body"]["usage"] for name in "ab"]
    # Anthropic's input tokens are those that were not found in the prefix cache.
    read = sum(usage["input_tokens"] for usage in usages) + usages[1]["cache_read_input_tokens"]
    assert tally.prompt_tokens == read
    assert tally.completion_tokens == sum(usage["output_tokens"] for usage in usages)


@pytest.mark.parametrize(
    ("faulty", "code", "said"),
    [
        ("{", "invalid_json", "Line 2 is not JSON"),
        ("[1]", "invalid_json", "Line 2 must be a JSON object"),
        ("[" * 5000, "invalid_json", "Line 2's JSON is nested too deeply"),
        ('{"custom_id": "\\ud800"}', "invalid_json", "half of a surrogate pair"),
        (line(None), "invalid_custom_id", "The custom_id of line 2 is None"),
        (line(7), "invalid_custom_id", "is 7: it must be text"),
        (line(""), "invalid_custom_id", "1 to 512"),
        (line("x" * 513), "invalid_custom_id", "1 to 512"),
        (line("first"), "duplicate_custom_id", "is that of line 1 too"),
        (line("b", "/v1/embeddings"), "invalid_url", f"must be one of {CHAT}"),
        (line("b", ["/v1"]), "invalid_url", "['/v1']"),
        (line("b", None), "invalid_url", "is None"),
        (line("b", method="GET"), "invalid_method", "must be 'POST'"),
        (line("b", body=[]), "invalid_body", "The body of line 2 is []"),
        (line("b", body={"messages": USER, "stream": True}), "stream_not_supported", "asks for a stream"),
        (line("b", extra=1), "unknown_field", "'extra'"),
    ],
)
def test_a_faulty_line_is_answered_and_stops_nothing(
    app: FastAPI, tmp_path: Path, faulty: Any, code: str, said: str
) -> None:
    lines = raw(line("first"), faulty, line("last"))
    _, written = run(app, tmp_path / "out", lines)
    assert len(written) == 3
    (entry,) = [each for each in written if each["error"]]
    assert entry["response"] is None
    assert entry["error"]["code"] == code
    assert said in entry["error"]["message"]
    assert sum(each["response"] is not None and each["response"]["status_code"] == 200 for each in written) == 2
    again, same = run(app, tmp_path / "out", lines)
    assert (again.answered, again.earlier, same) == (0, 3, written)


def test_a_line_without_method_and_with_a_byte_order_mark_is_good() -> None:
    given = b"\xef\xbb\xbf" + json.dumps({"custom_id": "a", "url": CHAT, "body": {}}).encode()
    assert list(read_lines([given], [CHAT])) == [Line(1, "a", CHAT, b"{}")]


def test_a_batch_goes_on_after_every_place_it_may_be_cut_off_at(app: FastAPI, tmp_path: Path) -> None:
    path = tmp_path / "out"
    lines = raw(line("a"), line("b"), line("c"))
    run(app, path, lines, concurrency=1)
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in [0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1, ends[1], ends[2] - 1, ends[2]]:
        path.write_bytes(whole[:cut])
        tally, written = run(app, path, lines)
        assert tally.earlier == sum(end <= cut for end in ends)
        assert tally.answered == 3 - tally.earlier
        assert sorted(each["custom_id"] for each in written) == ["a", "b", "c"]


def test_no_more_than_so_many_lines_are_open_at_once(app: FastAPI, engine: ScriptedEngine, tmp_path: Path) -> None:
    most = 0
    submit = engine.submit

    def watch(request: Any) -> None:
        nonlocal most
        submit(request)
        most = max(most, engine.num_open)
        if most == 3:  # nothing is answered before, and a fourth line gets its chance
            asyncio.get_running_loop().call_later(0.2, engine.gate.set)

    engine.submit = watch  # type: ignore[method-assign]
    engine.gate.clear()
    run(app, tmp_path / "out", raw(*(line(str(number)) for number in range(12))), concurrency=3)
    assert most == 3


def test_an_engine_that_takes_no_work_ends_the_batch_and_leaves_its_lines(
    app: FastAPI, engine: ScriptedEngine, tmp_path: Path
) -> None:
    path, lines = tmp_path / "out", raw(line("a"), line("b"))
    engine.state = "failed"
    with pytest.raises(EngineUnavailableError, match="The engine is failed"):
        run(app, path, lines)
    assert path.read_bytes() == b""
    engine.state = "ready"
    assert run(app, path, lines)[0].answered == 2


def test_a_line_that_a_defect_of_ours_hits_is_answered_and_stops_nothing(
    app: FastAPI, engine: ScriptedEngine, tmp_path: Path
) -> None:
    submit = engine.submit
    failures = iter([True])

    def fail_once(request: Any) -> None:
        if next(failures, False):
            raise ValueError("a defect")
        submit(request)

    engine.submit = fail_once  # type: ignore[method-assign]
    _, written = run(app, tmp_path / "out", raw(line("a"), line("b")), concurrency=1)
    assert [each["response"]["status_code"] for each in written] == [500, 200]
    assert "a defect" not in json.dumps(written)


def test_leaving_takes_what_is_open_back(app: FastAPI, engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.gate.clear()

    async def leave() -> None:
        with AnswerFile(tmp_path / "out") as answers:
            lines = read_lines(raw(line("a"), line("b")), batch_urls(app))
            work = asyncio.create_task(run_batch(app, lines, answers, Tally(), concurrency=2, on_line=lambda: None))
            while engine.num_open < 2:
                await asyncio.sleep(0)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work

    asyncio.run(leave())
    assert engine.num_open == 0
    engine.gate.set()


@pytest.mark.parametrize("content", ["hello\n", "{}\n", '{"custom_id": "a"}\n{}\n', "[1]\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match=r"something else than answers of a batch \(line 1\)"):
        AnswerFile(path)
    assert path.read_text(encoding="utf-8") == content


def test_a_file_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with AnswerFile(path), pytest.raises(OptionError, match="written by another process"):
        AnswerFile(path)
    with AnswerFile(path) as answers:
        answers.write(FaultyLine(1, None, "code", "message"))
    with AnswerFile(path) as answers:
        assert answers.num_failed == answers.num_lines == 1


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "out"):
        with pytest.raises(OptionError, match="cannot be written"):
            AnswerFile(path)
