"""`tern run-batch` as a user types it, on the embedded model: answers, interruption and going on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tern.cli import main
from tern.server.batch import AnswerFile

QUESTIONS = ["What is 12 + 34?", "Who are you?", "你好", "What is 5 - 3?"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """An input of four chats, a completion and a faulty line, and the output's name."""
    chats: list[dict[str, Any]] = [
        {
            "custom_id": f"chat-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 60},
        }
        for number, text in enumerate(QUESTIONS)
    ]
    scored = {"prompt": "Tern is", "echo": True, "logprobs": 1, "max_tokens": 0}
    completion = {"custom_id": "scored", "method": "POST", "url": "/v1/completions", "body": scored}
    source = tmp_path / "requests.jsonl"
    lines = [json.dumps(each, ensure_ascii=False) for each in (*chats, completion)]
    source.write_text("\n".join([*lines, "{ half"]) + "\n", encoding="utf-8")
    return source, tmp_path / "answers.jsonl"


def tern(files: tuple[Path, Path], *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run-batch", "-i", str(files[0]), "--output_file", str(files[1]), *more])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def answers(path: Path) -> dict[str | None, dict[str, Any]]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({entry["custom_id"] for entry in entries}) == len(entries)
    return {entry["custom_id"]: entry for entry in entries}


def said(entry: dict[str, Any]) -> Any:
    """What an answer says, without what differs from run to run."""
    return [
        (choice.get("message") or choice.get("text"), choice["finish_reason"], choice["logprobs"])
        for choice in entry["response"]["body"]["choices"]
    ]


def test_a_batch_is_answered(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert tern(files, "--json") == 1, "a faulty line is no success"
    summary = json.loads(capsys.readouterr().out)
    found = answers(files[1])
    assert (summary["lines"], summary["answered"], summary["failed"]) == (6, 6, 1)
    assert found[None]["error"]["code"] == "invalid_json"
    assert "46" in found["chat-0"]["response"]["body"]["choices"][0]["message"]["content"]
    logprobs = found["scored"]["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    bodies = [entry["response"]["body"] for name, entry in found.items() if name]
    assert summary["completion_tokens"] == sum(body["usage"]["completion_tokens"] for body in bodies) > 40


def test_an_interrupted_batch_goes_on_and_says_the_same(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files[1].with_name("whole.jsonl")
    tern((files[0], whole))
    capsys.readouterr()
    write = AnswerFile.write

    def write_and_interrupt(self: AnswerFile, *answer: Any) -> None:
        write(self, *answer)
        if self.num_lines == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(AnswerFile, "write", write_and_interrupt)
            assert tern(files, "--max-num-seqs", "1") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "goes on from here" in capsys.readouterr().err
    assert 2 <= len(answers(files[1])) < 6
    with files[1].open("ab") as output:
        output.write(b'{"id": "batch_req_1", "custom_id": "chat-3", "respo')
    done = len(files[1].read_text(encoding="utf-8").splitlines()) - 1
    assert tern(files, "--json") == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answered_earlier"], summary["answered"]) == (done, 6 - done)
    one, other = answers(files[1]), answers(whole)
    assert one.keys() == other.keys()
    assert {name: said(one[name]) for name in one if name} == {name: said(other[name]) for name in other if name}


def test_a_batch_without_faults_ends_with_0(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = files[0].read_text(encoding="utf-8").splitlines()
    files[0].write_text(lines[4] + "\n\n", encoding="utf-8")
    assert tern(files, "--served-model-name", "small") == 0
    assert "1 of 1 lines answered: 0 tokens" in capsys.readouterr().err
    assert answers(files[1])["scored"]["response"]["body"]["model"] == "small"
    assert tern(files) == 0
    assert "0 of 1 lines answered, 1 had been before" in capsys.readouterr().err


def test_files_that_cannot_be_used(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for pair, sentence in (
        ((files[0], files[0]), "is both input and output"),
        ((files[0].with_name("none"), files[1]), "cannot be read: No such file"),
        ((files[0].parent, files[1]), "cannot be read: Is a directory"),
        ((files[0], files[0].parent), "cannot be written"),
    ):
        assert tern(pair) == 2
        assert sentence in capsys.readouterr().err
