"""The programs that put a server or an engine under load, on small models for seconds."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from benchmarks import fairness, soak, soak_clients, throughput
from benchmarks.soak_clients import Crowd, Question, WrongAnswerError
from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions
from tern.errors import OptionError


def test_pauses_without_and_beside_a_long_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    small = ["--option", "max_model_len=700", "--option", "max_num_batched_tokens=64", "--option", "max_num_seqs=4"]
    fairness.main(["--decoders", "2", "--prompt-tokens", "500", *small, "--json", str(out)])
    assert "beside the prompt" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    for name in ("with the aim", "without one"):
        for where in ("alone", "beside"):
            pauses = found[name][where]
            assert 0 < pauses["p50"] <= pauses["p99"] <= pauses["longest"]
        assert found[name]["prompt_tokens"] == 500
        assert found[name]["prompt_tokens_per_s"] > 0


def test_a_prompt_that_is_read_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(fairness, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    options = EngineOptions(max_model_len=2000, max_num_seqs=2, max_num_batched_tokens=16, enable_prefix_caching=False)
    engine = Engine.open(resolve_model(None), options, progress=False)
    found = fairness.measure(engine, 1, 1900, 20)
    assert 0 < found.prompt_tokens < 1900
    assert not engine.has_work


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    engine = Engine.open(resolve_model(None), EngineOptions(max_model_len=64, max_num_seqs=2), progress=False)
    for decoders, prompt in ((1, 63), (2, 20)):
        with pytest.raises(OptionError, match="do not fit"):
            fairness.measure(engine, decoders, prompt, 60)
    assert not engine.has_work


def test_a_server_beside_the_offline_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    sizes = ["--requests", "3", "--prompt-tokens", "8", "--output-tokens", "8", "--rounds", "1"]
    throughput.main([*sizes, "--json", str(out)])
    assert "median ratio" in capsys.readouterr().out
    [one] = json.loads(out.read_text(encoding="utf-8"))["rounds"]
    assert min(one.values()) > 0


def test_a_server_that_does_not_start_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        soak.main(["--max-model-len", "1"])
    assert ended.value.code == 2
    assert "max_model_len is 1" in capsys.readouterr().err


BEFORE = dict.fromkeys(soak.WATCHED, 10.0) | {"vllm:kv_cache_usage_perc": 0.0}


@pytest.mark.parametrize(
    ("changed", "memory", "problem"),
    [
        ({}, [100e6] * 8, None),
        ({"tern:threads": 18.0}, [100e6] * 6 + [130e6] * 2, None),
        ({"process_open_fds": 60.0}, [100e6] * 8, "file descriptors"),
        ({"tern:asyncio_tasks": 14.0}, [100e6] * 8, "tasks"),
        ({"vllm:kv_cache_usage_perc": 0.01}, [100e6] * 8, "KV blocks"),
        ({"tern:threads": float("nan")}, [100e6] * 8, "threads"),
        ({}, [100e6] * 4 + [120e6] * 2 + [160e6] * 2, "memory"),
    ],
)
def test_what_is_not_given_back_is_named(changed: dict[str, float], memory: list[float], problem: str | None) -> None:
    found = soak.leaks(BEFORE, BEFORE | changed, memory)
    assert [problem in line for line in found if problem] == [True] * bool(problem)
    assert bool(found) == bool(problem)


def crowd_of(answer: Any, question: Question) -> Crowd:
    http = httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(lambda _: answer))
    return Crowd("http://x", http, [question], 64, random.Random(3))


def completion(text: str) -> httpx.Response:
    chunk = json.dumps({"choices": [{"index": 0, "text": text}]})
    return httpx.Response(200, text=chunk)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (completion("right"), "the same answer"),
        (completion("wrong"), WrongAnswerError),
        (httpx.Response(500, text="sorry"), WrongAnswerError),
        (httpx.Response(429, headers={"retry-after": "2"}), "refused"),
    ],
)
def test_an_answer_is_compared_with_what_it_was_alone(
    answer: httpx.Response, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = crowd_of(answer, Question(soak_clients.COMPLETIONS, {"prompt": "x"}, "|right"))
    monkeypatch.setattr(crowd.draw, "random", lambda: 0.9)  # whole, not streamed
    if isinstance(outcome, str):
        assert asyncio.run(soak_clients.ask(crowd)) == outcome
    else:
        with pytest.raises(outcome):
            asyncio.run(soak_clients.ask(crowd))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n', "|a"),
        ('data: {"choices": [{"delta": {"reasoning_content": "a"}}]}\n\n', None),
        ('data: {"error": {"message": "boom"}}\n\ndata: [DONE]\n\n', None),
    ],
)
def test_a_stream_that_is_not_whole_is_wrong(text: str, found: str | None) -> None:
    question = Question(soak_clients.CHAT, {"messages": []})
    crowd = crowd_of(httpx.Response(200, text=text), question)
    if found is None:
        with pytest.raises(WrongAnswerError):
            asyncio.run(soak_clients.text_of(crowd.http, question, stream=True))
    else:
        assert asyncio.run(soak_clients.text_of(crowd.http, question, stream=True)) == found


@pytest.mark.soak
def test_a_sample_of_a_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        soak.main(["--clients", "12", "--minutes", "0.33", "--max-model-len", "512", "--report", str(tmp_path)])
    assert ended.value.code == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "tern-bench.json").read_text(encoding="utf-8"))
    assert report["problems"] == []
    assert {name.split(":")[0] for name in report["done"]} == {errand.__name__ for errand in soak_clients.ERRANDS}
    assert (tmp_path / "tern-bench.svg").stat().st_size > 10_000
