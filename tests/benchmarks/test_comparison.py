"""Comparisons by turns, with stand-ins for the other engines' programs: what is started, read, and divided by what."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from benchmarks import compare_llama_cpp, compare_vllm_cpu, comparison
from benchmarks.comparison import Figures, ProgramError, Tern, Wanted, Work, compare, numbers, run
from tern.bench import MachineLimits
from tern.checkpoint import resolve_model
from tern.cli import main

WANTED = Wanted(prefill=[32, 64], depths=[0, 100], sequences=[2, 4], batch_depth=32, start=True)
NOTHING = Wanted(prefill=[], depths=[], sequences=[], batch_depth=0, start=False)
DECODE, START = Work("decode", depth=10), Work("start")

LLAMA_BENCH = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *"-n 0 --no-warmup") echo "[]" ;;
  *"-n 0") echo '[{{"n_prompt": 32, "n_depth": 0, "avg_ts": 5.5}}, {{"n_prompt": 64, "n_depth": 0, "avg_ts": 6.5}}]' ;;
  *) echo '[{{"n_prompt": 0, "n_depth": 0, "avg_ts": 3.0}}, {{"n_prompt": 0, "n_depth": 100, "avg_ts": 2.0}}]' ;;
esac
"""
BATCHED_BENCH = """#!/bin/sh
echo "$@" >> {log}
echo "loading"
echo '{{"pl": 2, "speed_tg": 7.0}}'
echo '{{"pl": 4, "speed_tg": 9.0}}'
"""
FAKE_VLLM = """
import time
class SamplingParams:
    def __init__(self, max_tokens, **_): self.left = max_tokens
class LLM:
    def __init__(self, model, max_num_seqs, **_):
        import json, os
        assert json.load(open(model + "/config.json"))["quantization_config"]["bits"] == 4
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-1" and max_num_seqs == 4
        self.llm_engine, self.open = self, []
    def add_request(self, name, prompt, params): self.open.append(params)
    def has_unfinished_requests(self): return bool(self.open)
    def step(self):
        for params in self.open: params.left -= 1
        self.open = [params for params in self.open if params.left]
"""


class Scripted:
    """An engine whose figures are known; `log` hears in which order it is asked."""

    def __init__(self, name: str, figures: list[Figures], log: list[str]) -> None:
        self.name, self.figures, self.log = name, figures, log

    def measure(self) -> Figures:
        self.log.append(self.name)
        return self.figures.pop(0)


def program(path: Path, text: str) -> str:
    path.write_text(text.format(log=path.with_suffix(".log")), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_rounds_alternate_and_ratios_are_made_within_them() -> None:
    log: list[str] = []
    mine = [{DECODE: speed, START: 2.0, Work("prefill", tokens=9): 1.0} for speed in (20.0, 10.0, 30.0)]
    other = [{DECODE: speed, START: 6.0} for speed in (10.0, 10.0, 10.0)]
    found = compare(Scripted("A", mine, log), Scripted("B", other, log), 3)
    assert log == ["A", "B"] * 3
    decode, start = found.rows
    assert (decode.work, decode.first, decode.second, decode.ratio) == (DECODE.label, 20.0, 10.0, 2.0)
    assert (start.first, start.second, start.ratio) == (2.0, 6.0, 3.0), "a start is faster when it is shorter"
    assert [each["A"][DECODE.label] for each in found.rounds] == [20.0, 10.0, 30.0]


def test_labels_tell_works_apart() -> None:
    works = [START, DECODE, Work("decode", sequences=2, depth=10), Work("prefill", tokens=9), Work("decode", depth=11)]
    assert len({work.label for work in works}) == len(works)


def test_tern_is_timed_by_its_own_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def in_this_process(command: list[str], _: object = None) -> str:
        assert command[1:3] == ["-m", "tern"]
        with pytest.raises(SystemExit) as ended:
            main(command[3:])
        assert ended.value.code == 0
        return capsys.readouterr().out

    monkeypatch.setattr(comparison, "run", in_this_process)
    monkeypatch.setattr("tern.bench.report.measure_device", lambda _: MachineLimits("none", 1, 10.0, 1.0))
    wanted = Wanted(prefill=[8], depths=[0, 4], sequences=[2], batch_depth=3, start=True)
    figures = Tern("dummy:tiny", ["--quantization", "wint4"], wanted).measure()
    assert list(figures) == [
        Work("prefill", tokens=8),
        Work("decode"),
        Work("decode", depth=4),
        Work("decode", sequences=2, depth=3),
        START,
    ]
    assert all(figure > 0 for figure in figures.values())
    assert Tern("dummy:tiny", [], NOTHING).measure() == {}


def test_llama_cpp_is_asked_and_read(tmp_path: Path) -> None:
    bench = program(tmp_path / "llama-bench", LLAMA_BENCH)
    batched = program(tmp_path / "llama-batched-bench", BATCHED_BENCH)
    engine = compare_llama_cpp.LlamaCpp(bench, batched, "m.gguf", 2, ["-fa", "0"], WANTED)
    figures = engine.measure()
    assert 0 < figures.pop(START) < 60
    assert figures == {
        Work("prefill", tokens=32): 5.5,
        Work("prefill", tokens=64): 6.5,
        Work("decode"): 3.0,
        Work("decode", depth=100): 2.0,
        Work("decode", sequences=2, depth=32): 7.0,
        Work("decode", sequences=4, depth=32): 9.0,
    }
    asked = (tmp_path / "llama-bench.log").read_text(encoding="utf-8").splitlines()
    assert asked == [
        "-m m.gguf -t 2 -fa 0 -r 1 -o json -p 32,64 -n 0",
        "-m m.gguf -t 2 -fa 0 -r 1 -o json -p 0 -n 32 -d 0,100",
        "-m m.gguf -t 2 -fa 0 -r 1 -o json -p 1 -n 0 --no-warmup",
    ]
    (line,) = (tmp_path / "llama-batched-bench.log").read_text(encoding="utf-8").splitlines()
    assert line == "-m m.gguf -t 2 -fa 0 -c 192 -npp 16 -ntg 32 -npl 2,4 --output-format jsonl"
    assert compare_llama_cpp.LlamaCpp(bench, batched, "m.gguf", 2, [], NOTHING).measure() == {}


def test_vllm_is_timed_inside_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = tmp_path / "vllm" / "model_executor" / "layers" / "fused_moe" / "experts"
    experts.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text(FAKE_VLLM, encoding="utf-8")
    (experts / "cpu_moe.py").write_text("class CPUExpertsInt4: pass", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = compare_vllm_cpu.VllmCpu(sys.executable, resolve_model("dummy:tiny"), "0-1", 1, WANTED)
    figures = engine.measure()
    assert figures.keys() == {
        START,
        *(Work("prefill", tokens=tokens) for tokens in (32, 64)),
        *(Work("decode", depth=depth) for depth in (0, 100)),
        *(Work("decode", sequences=count, depth=32) for count in (2, 4)),
    }
    assert all(figure > 0 for figure in figures.values())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo first >&2; echo last words >&2; exit 3", "ended with 3 and said last: last words"),
        ("exit 1", "said last: nothing"),
    ],
)
def test_a_program_that_fails_is_quoted(script: str, said: str) -> None:
    with pytest.raises(ProgramError, match=said):
        run(["/bin/sh", "-c", script])
    with pytest.raises(ProgramError, match="cannot be started"):
        run(["/nowhere/llama-bench"])


def test_the_table_and_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = program(tmp_path / "llama-bench", LLAMA_BENCH)
    monkeypatch.setattr(Tern, "measure", lambda _: {Work("prefill", tokens=32): 11.0})
    files = [
        "--gguf",
        "m.gguf",
        "--llama-bench",
        bench,
        "--llama-batched-bench",
        bench,
        "--json",
        str(tmp_path / "out"),
    ]
    flags = ["--model", "M", "--prefill", "32", "--depths", "", "--sequences", "", "--no-start", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["compare_llama_cpp", *files, *flags])
    compare_llama_cpp.main()
    assert "2.00" in capsys.readouterr().out
    written = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    assert [(row["work"], row["ratio"]) for row in written["rows"]] == [("prefill 32, tokens/s", 2.0)]
    assert len(written["rounds"]) == 2
    flags[-1] = "1"
    monkeypatch.setattr(
        sys, "argv", ["compare_llama_cpp", "--gguf", "m", "--llama-bench", "/nowhere", *files[4:], *flags]
    )
    with pytest.raises(SystemExit, match="/nowhere cannot be started"):
        compare_llama_cpp.main()


def test_lists_of_numbers() -> None:
    assert numbers("128, 512") == [128, 512]
    assert numbers("") == []
    for wrong in ("a", "1,-2", "1.5"):
        with pytest.raises(ArgumentTypeError, match="no list of whole numbers"):
            numbers(wrong)
