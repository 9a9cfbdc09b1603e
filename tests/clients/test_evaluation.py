"""`tern eval` on tasks of local data: the answers behind thoughts, and likelihoods beside those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tern import LLM
from tern.checkpoint import embedded_model_directory
from tern.cli import main
from tests.clients.test_programs import CHOOSE, GENERATE, write_task

ROLLING = {
    "task": "texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


@pytest.fixture(autouse=True)
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def evaluated(folder: Path, task: dict[str, Any], capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The only score of a task, as the command prints it."""
    write_task(folder, task)
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--tasks-dir", str(folder), "--tasks", task["task"], "--json", *more])
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    (score,) = json.loads(printed.out)["scores"]
    assert isinstance(score, dict)
    return score


def test_answers_in_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.jsonl"
    score = evaluated(tmp_path, GENERATE, capsys, "--chat", "--limit", "2", "--samples", str(samples))
    assert score == {
        "task": "sums",
        "metric": "exact_match",
        "filter": "number",
        "value": 1.0,
        "stderr": 0.0,
        "samples": 2,
        "num_fewshot": 0,
    }
    asked = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert [sample["doc"]["question"] for sample in asked] == ["What is 12 + 30?", "What is 100 + 23?"]
    assert all("think" not in sample["resps"][0][0] for sample in asked)


def test_a_limit_of_tokens_cuts_the_thought(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(tmp_path, GENERATE, capsys, "--chat", "--max-tokens", "2")["value"] == 0.0


def test_without_chat_a_task_continues_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.jsonl"
    task = {**GENERATE, "generation_kwargs": {"until": ["a"], "max_gen_toks": 40, "temperature": 0}}
    evaluated(tmp_path, task, capsys, "--samples", str(samples))
    (first, *_) = [json.loads(line)["resps"][0][0] for line in samples.read_text(encoding="utf-8").splitlines()]
    assert first
    assert "a" not in first


@pytest.mark.parametrize("length", [2048, 48])
def test_likelihoods_are_those_of_transformers(length: int) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tern.evaluation.harness_model import HarnessModel

    engine = {"dtype": "float32", "progress": False, "max_model_len": length}
    ours = HarnessModel(LLM(**engine), "embedded", chat=False)
    directory = str(embedded_model_directory())
    theirs = HFLM(pretrained=directory, dtype="float32", device="cpu", batch_size=1, max_length=length - 1)
    long = "One two three, 四五六. Seven eight nine, ten and eleven! " * 4
    pairs = [("What is 12 + 30?", " It is 42."), ("The weather in", " Paris"), ("", "中文也可以。"), (long, " Done.")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for mine, reference in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine[0] == pytest.approx(reference[0], abs=1e-2)
        assert mine[1] == reference[1]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (long, "三加四等于七。")]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=2e-2)


def test_scores_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(tmp_path, ROLLING, capsys)["value"] > 0
    assert 0.0 <= evaluated(tmp_path, CHOOSE, capsys)["value"] <= 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name --tasks"),
        (["--tasks", "sumz"], "or sums"),
        (["--tasks", "sums", "--limit", "0"], "--limit is 0"),
        (["--tasks", "sums", "--system", "x"], "add --chat"),
        (["--tasks", "sums", "--no-thinking"], "--no-thinking is for conversations"),
        (["--tasks", "sums", "--samples", "no/where"], "its directory does not exist"),
        (["--tasks", "sums", "--temperature", "-1"], "temperature"),
        (["--tasks", "choices", "--chat"], "leave out --chat"),
        (["--tasks", "gone"], "cannot be loaded"),
    ],
)
def test_what_cannot_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    for task in (GENERATE, CHOOSE, {**GENERATE, "task": "gone"}):
        write_task(tmp_path, task)
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--tasks-dir", str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
