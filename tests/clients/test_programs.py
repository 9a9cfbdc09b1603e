"""Programs from the package index that measure a server: `lm_eval` on a task of local data, `guidellm` for its load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tern.checkpoint import embedded_model_directory
from tests.clients.conftest import MODEL, Served, program_environment

SUMS = [("What is 12 + 30?", "42"), ("What is 100 + 23?", "123"), ("What is 58 + 21?", "79")]
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
}
GENERATE = {
    "task": "sums",
    "output_type": "generate_until",
    "generation_kwargs": {"until": [], "max_gen_toks": 400, "temperature": 0},
    "filter_list": [
        {
            "name": "number",
            "filter": [{"function": "regex", "regex_pattern": "= (-?[0-9]+)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOOSE = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_choice": ["{{answer}}", "{{question}}"],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder: Path, task: dict[str, Any]) -> None:
    """A task of the harness and its questions, as files in `folder` with its name."""
    data = folder / f"{task['task']}.jsonl"
    data.write_text("\n".join(json.dumps({"question": question, "answer": answer}) for question, answer in SUMS))
    written = {**TASK, **task, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{task['task']}.yaml").write_text(json.dumps(written))  # JSON is YAML


def lm_eval(folder: Path, task: dict[str, Any], model: str, arguments: str, *more: str) -> dict[str, Any]:
    """The results of one task, run by the program itself."""
    pytest.importorskip("lm_eval")
    write_task(folder, task)
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", task["task"], "--include_path", str(folder), "--output_path", str(folder / "out"), *more]
    done = subprocess.run(command, env=program_environment(folder), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = (folder / "out").rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"][task["task"]]
    return found


def test_lm_eval_on_chats(served: Served, tmp_path: Path) -> None:
    arguments = f"base_url={served.v1}/chat/completions,model={MODEL},num_concurrent=2,max_retries=1"
    found = lm_eval(tmp_path, GENERATE, "local-chat-completions", arguments, "--apply_chat_template")
    assert found["exact_match,number"] == 1.0


def test_lm_eval_by_the_likelihood_of_choices(served: Served, tmp_path: Path) -> None:
    tokenizer = embedded_model_directory()
    arguments = f"base_url={served.v1}/completions,model={MODEL},tokenizer={tokenizer},max_retries=1"
    found = lm_eval(tmp_path, CHOOSE, "local-completions", arguments)
    assert 0.0 <= found["acc,none"] <= 1.0
    assert found["sample_len"] == len(SUMS)


def test_guidellm(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("guidellm")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={served.url}", "--profile", "kind=concurrent,streams=4"]
    command += ["--constraint", "kind=max_requests,count=12"]
    command += ["--tokenizer", f"kind=hf_auto,model={embedded_model_directory()}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=32"]
    command += ["--output", f"kind=json,path={report}"]
    done = subprocess.run(command, env=program_environment(tmp_path), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 12
    assert totals["errored"] == totals["incomplete"] == 0
