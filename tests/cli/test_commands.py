"""`tern generate` and `tern chat` as a user types them, on the embedded model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tern.cli import main
from tern.engine import Engine

GREEDY = ["--temperature", "0"]
INTRODUCTION = "Give me a short introduction to large language model."
WEATHER = {
    "name": "get_weather",
    "description": "Determine weather in my location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}},
        "required": ["location", "unit"],
    },
}


def tern(arguments: list[str]) -> None:
    """Run a command that succeeds."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Give these lines, and the end of input, to the next command."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `tern generate --json` prints."""
    tern(["generate", *arguments, "--json", *GREEDY])
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_generate_prints_the_answer_and_the_thought_apart(capsys: pytest.CaptureFixture[str]) -> None:
    tern(["generate", INTRODUCTION, *GREEDY])
    shown = capsys.readouterr()
    said = generated(capsys, INTRODUCTION)
    assert shown.out == said["content"] + "\n"
    assert shown.err == said["reasoning_content"] + "\n"
    assert said["finish_reason"] == "stop"
    assert 0 < said["usage"]["reasoning_tokens"] < said["usage"]["completion_tokens"]
    tern(["generate", INTRODUCTION, "--no-show-thinking", *GREEDY])
    assert capsys.readouterr() == (shown.out, "")


def test_generate_finds_a_prompt_that_an_earlier_command_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--kv-cache-dir", str(tmp_path / "kv"), "--kv-cache-dir-size", "0.1", "--max-tokens", "8"]
    said = [generated(capsys, INTRODUCTION * 8, *kept) for _ in range(2)]
    assert said[0]["usage"].pop("cached_tokens") == 0
    assert said[1]["usage"].pop("cached_tokens") > 64
    assert all(one.pop("seconds") > 0 for one in said)
    assert said[0] == said[1]


def test_generate_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generated(capsys, "你好", "--max-tokens", "30")
    for prompt in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("你好"))
        read = generated(capsys, *prompt, "--max-tokens", "30")
        assert (read["reasoning_content"], read["content"]) == (whole["reasoning_content"], whole["content"])


def test_generate_without_a_thought_and_without_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    silent = generated(capsys, INTRODUCTION, "--no-thinking")
    assert silent["reasoning_content"] is None
    assert silent["content"]
    raw = generated(capsys, "Tern is", "--raw", "--max-tokens", "5")
    assert raw["reasoning_content"] is None
    assert raw["usage"]["completion_tokens"] <= 5


def test_generate_with_a_budget_for_the_thought(capsys: pytest.CaptureFixture[str]) -> None:
    said = generated(capsys, "What is 1234 + 4321?", "--reasoning-max-tokens", "4")
    assert said["usage"]["reasoning_tokens"] < generated(capsys, "What is 1234 + 4321?")["usage"]["reasoning_tokens"]


def test_an_interrupted_answer_is_not_passed_off_as_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def interrupt(engine: Engine) -> bool:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return step(engine)

    step = Engine.step
    monkeypatch.setattr(Engine, "step", interrupt)
    for form in ([], ["--json"]):
        steps = 0
        with pytest.raises(SystemExit) as ended:
            main(["generate", INTRODUCTION, *GREEDY, *form])
        assert ended.value.code == 130
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "cancelled"


def test_a_terminal_without_the_characters_shows_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", screen)
    tern(["generate", "你是谁？", "--no-thinking", *GREEDY])
    screen.flush()
    assert b"?" in screen.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_same_seed_samples_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    def sampled(seed: str) -> str:
        tern(["generate", "Hello", "--temperature", "5", "--seed", seed, "--max-tokens", "40"])
        shown = capsys.readouterr()
        return shown.out + shown.err

    assert sampled("1") == sampled("1") != sampled("2")


def test_chat_remembers_and_forgets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "Who are you?", "/clear", "", "Who are you?", "Who are you?", "/exit", "not reached")
    tern(["chat", *GREEDY, "--max-tokens", "200"])
    lines = capsys.readouterr().out.splitlines()
    third = len(lines) // 3
    assert lines[:third] == lines[third : 2 * third], "cleared, the conversation begins anew"


def test_chat_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "/help", "/dance", "/think off", INTRODUCTION)
    tern(["chat", *GREEDY])
    shown = capsys.readouterr()
    assert shown.err.count("/clear") == 2
    assert "There is no command '/dance'" in shown.err
    assert len(shown.out.splitlines()) == 1, "the answer, and no thought"


def test_chat_asks_for_results_and_goes_on_from_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": WEATHER}]), encoding="utf-8")
    result = '{"temperature": 21, "unit": "c", "condition": "sunny"}'
    type_in(monkeypatch, "How's the weather in Beijing today?", result)
    tern(["chat", *GREEDY, "--tools", str(tools)])
    out = capsys.readouterr().out
    call = out.index("-> get_weather")
    assert "Beijing" in out[call:]
    assert "21" in out[call:]


def test_chat_survives_a_message_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(monkeypatch, "long " * 200, INTRODUCTION)
    tern(["chat", *GREEDY, "--max-model-len", "128"])
    shown = capsys.readouterr()
    assert "128" in shown.err
    assert shown.out.strip()


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ('{"type": "function"}', "a JSON list")])
def test_tools_that_are_none(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--tools", str(tools)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
