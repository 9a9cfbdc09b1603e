"""Loading a server: what is sent and when, how answers become figures, and a sentence for all that can go wrong."""

from __future__ import annotations

import io
import json
import math
import signal
import socket
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from standin_server import DONE, StandInServer, event

from tern.bench.load import LoadEvents, LoadPlan, arrivals, run_load
from tern.bench.load_report import RequestRecord, Spread, summarise
from tern.bench.prompts import DISTINCT_WORDS, RandomPrompts
from tern.bench.setting import Setting
from tern.cli import main
from tern.errors import OptionError, RemoteServerError

TEXT = event({"choices": [{"text": "a"}]})


def command(*arguments: str) -> int:
    """The exit status of `tern bench` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def plan(stand_in: StandInServer, **fields: Any) -> LoadPlan:
    return LoadPlan(**{"url": stand_in.url, "requests": 6, "prompt_tokens": 100, "output_tokens": 4, **fields})


def test_requests_arrive_as_a_poisson_process_does() -> None:
    moments = arrivals(4.0, 20_000, seed=3)
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert moments[0] == 0
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.03), "exponential gaps deviate by their mean"
    assert moments == arrivals(4.0, 20_000, seed=3) != arrivals(4.0, 20_000, seed=4)
    assert arrivals(math.inf, 3, seed=0) == [0, 0, 0]


def test_prompts_are_the_same_but_for_their_beginning() -> None:
    one, two = RandomPrompts(7).text(40, "1/0").split(), RandomPrompts(7).text(40, "1/0").split()
    assert len(one) == len(two) == 40
    assert one[DISTINCT_WORDS:] == two[DISTINCT_WORDS:]
    assert one[:DISTINCT_WORDS] != two[:DISTINCT_WORDS], "or a cache of the first run would answer the second"
    assert RandomPrompts(7).text(40, "1/1").split()[DISTINCT_WORDS:] != one[DISTINCT_WORDS:]
    assert [len(RandomPrompts(0).text(words, "x").split()) for words in (1, 6, 7)] == [1, 6, 7]


def test_figures_are_made_of_moments() -> None:
    records = [
        RequestRecord(10.0, [10.5, 10.75, 11.5], 12.0, prompt_tokens=8, output_tokens=5),
        RequestRecord(11.0, [13.0], 14.0, prompt_tokens=10, output_tokens=1),
        RequestRecord(11.0, [], 20.0, failure="HTTP 500: why"),
    ]
    result = summarise(2.0, records, sent=4)
    assert (result.label, result.sent, result.answered, result.failed) == ("2", 4, 2, 1)
    assert result.failures == {"HTTP 500: why": 1}
    assert (result.seconds, result.requests_per_s, result.output_tokens_per_s) == (10.0, 0.2, 0.6)
    assert (result.prompt_tokens, result.output_tokens) == (9.0, 3.0)
    assert result.first_token == Spread(1.25, 1.85, pytest.approx(1.985))
    assert result.inter_token == Spread(0.5, pytest.approx(0.7), pytest.approx(0.745))
    assert result.per_token == Spread(0.25, 0.25, 0.25)
    assert result.end_to_end is not None
    assert result.end_to_end.p50 == 2.5


def test_nothing_answered_has_no_percentiles() -> None:
    for records in ([], [RequestRecord(1.0, [], 1.0, failure="no")]):
        result = summarise(None, records, sent=len(records))
        assert (result.label, result.answered, result.requests_per_s, result.first_token) == ("inf", 0, 0.0, None)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_run_sends_what_the_plan_says(endpoint: str, stand_in: StandInServer) -> None:
    ended: list[RequestRecord] = []
    events = LoadEvents(ended=ended.append)
    rates = (500.0, math.inf, math.inf)
    report = run_load(plan(stand_in, endpoint=endpoint, rates=rates, api_key="k", concurrency=2), events=events)
    assert [(result.label, result.answered, result.failed) for result in report.results] == [
        ("500", 6, 0),
        ("inf", 6, 0),
        ("inf", 6, 0),
    ]
    assert len(ended) == 18
    streamed = [body for body in stand_in.bodies if body.get("stream")]
    assert len(streamed) == 18
    assert {body["max_tokens"] for body in streamed} == {4}
    assert all(body["ignore_eos"] and body["model"] == "ernie" for body in streamed)
    assert all(99 <= result.prompt_tokens <= 101 for result in report.results)
    assert [result.output_tokens for result in report.results] == [4, 4, 4]
    assert stand_in.keys == {"Bearer k"}
    assert len(set(stand_in.prompts)) == len(stand_in.prompts), "no prompt is sent twice"
    for result in report.results:
        assert result.first_token is not None
        assert result.end_to_end is not None
        assert 0 < result.first_token.p50 <= result.end_to_end.p50
    json.dumps(report.as_json(), allow_nan=False)
    assert not report.interrupted


def test_a_server_without_ignore_eos_is_loaded_without_it(stand_in: StandInServer) -> None:
    stand_in.refuses_ignore_eos = True
    report = run_load(plan(stand_in))
    assert not report.ignores_eos
    assert report.results[0].answered == 6


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        ((429, '{"error": {"message": "Too many."}}'), "HTTP 429: Too many"),
        ((500, "<html>"), "HTTP 500: Internal Server Error"),
        ((200, TEXT), "the stream broke off"),
        ((200, event({"choices": [], "usage": {"completion_tokens": 3}}) + DONE), "the stream held no text"),
        ((200, TEXT + DONE), "the stream held no usage"),
        ((200, "data: {\n\n"), "the stream held '{', which is not JSON"),
        ((200, "data: 3\n\n"), "the stream held '3', which is no chunk"),
        ((200, event({"error": {"message": "It failed."}})), "the stream held an error: It failed"),
    ],
)
def test_failures_are_counted_with_their_reason(
    script: tuple[int, str], failure: str, stand_in: StandInServer, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.streams = [script, script, None]
    (result,) = run_load(plan(stand_in, concurrency=1)).results
    assert (result.sent, result.answered, result.failed, result.failures) == (6, 4, 2, {failure: 2})
    stand_in.streams = [script]
    assert command("--url", stand_in.url, "--requests", "2", "--prompt-tokens", "9", "--output-tokens", "2") == 1
    assert f"2 failed: {failure}" in capsys.readouterr().out


def test_a_server_that_cannot_be_used_is_one_sentence(
    stand_in: StandInServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        status = command("--url", *arguments)
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert said.startswith("tern: ")
        return f"{status} {said}"

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert f"1 tern: {nobody} cannot be reached" in refused(nobody)
    assert "give a server's address" in refused("127.0.0.1:8000")
    assert "give a server's address" in refused("http://")
    assert "--model is 'gpt', which the server" in refused(stand_in.url, "--model", "gpt")
    stand_in.counts = False
    assert "1 tern: The server" in (said := refused(stand_in.url))
    assert "does not say how many tokens" in said
    stand_in.models = []
    assert "lists no models" in refused(stand_in.url)
    stand_in.status = 401
    assert "HTTP 401: Unauthorized): give its key with --api-key." in refused(stand_in.url)


def test_a_prompt_that_does_not_fit_is_said_before_the_run(stand_in: StandInServer) -> None:
    stand_in.models = ["ernie"]

    def refuse(body: dict[str, Any]) -> tuple[int, str]:  # noqa: ARG001
        return 400, '{"error": {"message": "Too long."}}'

    stand_in.answer = refuse  # type: ignore[method-assign]
    with pytest.raises(RemoteServerError, match=r"HTTP 400: Too long\): lower --prompt-tokens"):
        run_load(plan(stand_in))


def test_ctrl_c_leaves_what_was_measured(
    stand_in: StandInServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates: list[float] = []
    seen: list[RequestRecord] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio turns to no other handler's place

    def interrupt(record: RequestRecord) -> None:
        seen.append(record)
        if len(seen) == 8:
            signal.raise_signal(signal.SIGINT)

    events = LoadEvents(begin=rates.append, ended=interrupt)
    report = run_load(plan(stand_in, rates=(800.0, 900.0, 1000.0), concurrency=1), events=events)
    signal.signal(signal.SIGINT, before)
    assert report.interrupted
    assert rates == [800.0, 900.0]
    assert [result.answered for result in report.results] == [6, 2]

    monkeypatch.setattr("tern.bench.load.run_load", lambda *_, **__: report)
    assert command("--url", stand_in.url, "--json") == 130
    shown = capsys.readouterr()
    assert json.loads(shown.out)["interrupted"] is True
    assert "interrupted" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rates", "1"], "--rates needs --url."),
        (["--prompt-tokens", "1"], "--prompt-tokens needs --url."),
        (["--url", "http://x", "--depth", "1"], "--depth times a model here, and --url loads a server"),
        (["--url", "http://x", "--rates", "1,0"], "--rates is '1,0': give numbers above 0 or inf"),
        (["--url", "http://x", "--rates", "nan"], "--rates is 'nan'"),
        (["--url", "http://x", "--rates", ""], "--rates is ''"),
        (["--url", "http://x", "--requests", "0"], "--requests is 0: it must be from 1"),
        (["--url", "http://x", "--concurrency", "-1"], "--concurrency is -1"),
        (["--url", "http://x", "--endpoint", "embeddings"], "--endpoint is 'embeddings'"),
    ],
)
def test_wrong_plans(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "flags"), [("httpx", ["--url", "http://x"]), ("matplotlib", ["--report", "x.svg"])]
)
def test_an_absent_package_is_one_sentence(
    package: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert command(*flags) == 2
    assert capsys.readouterr().err == (
        f"tern: {flags[0]} needs {package}, which is not installed: pip install 'tern-llm[bench]'.\n"
    )


def test_the_table_and_the_pictures(
    stand_in: StandInServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rates", "400,inf", "--requests", "3", "--prompt-tokens", "30", "--output-tokens", "3"]
    assert command("--url", stand_in.url, *flags, "--report", str(tmp_path / "load")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["rate", "answered", "failed", "req/s", "tok/s"]
    assert [line.split()[:3] for line in lines[2:4]] == [["400", "3", "0"], ["inf", "3", "0"]]
    assert "3 out" in lines[4]
    written = json.loads((tmp_path / "load" / "tern-bench.json").read_text(encoding="utf-8"))
    assert [result["rate"] for result in written["results"]] == [400.0, None]
    drawn = (tmp_path / "load" / "tern-bench.svg").read_text(encoding="utf-8")
    for label in (
        "ernie under load",
        "measured from ",
        "Time to first token",
        "milliseconds",
        "requests arriving a second",
        "p99",
    ):
        assert label in drawn


def test_keys_stay_out_of_the_report() -> None:
    command = Setting.now(["tern", "bench", "--api-key", "secret", "--url", "http://x", "--api-key=secret"]).command
    assert command == "tern bench --api-key ... --url http://x --api-key=..."


def test_plans_are_checked() -> None:
    with pytest.raises(OptionError, match="--rates must be numbers above 0"):
        LoadPlan("http://x", rates=())


def test_a_bar_on_the_terminal_leaves_the_table_alone(
    stand_in: StandInServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    flags = ["--rates", "inf,inf", "--requests", "2", "--prompt-tokens", "20", "--output-tokens", "2"]
    assert command("--url", stand_in.url, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["rate", "p50", "inf", "inf", "ernie"]
    assert "inf requests/s" in screen.getvalue()
