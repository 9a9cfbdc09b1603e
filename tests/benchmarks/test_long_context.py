"""The long sequence: read once, decoded at every depth, ended without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import long_context
from benchmarks.long_context import STEPS, measure, options
from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions
from tern.engine.runner import StepResult
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Sequence as TokenSequence
from tern.errors import OptionError


@pytest.fixture(scope="module")
def engine() -> Engine:
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "max_model_len": 600}
    chosen = EngineOptions(quantization="wint4", speculation="off", **sizes)
    return Engine.open(resolve_model("dummy:tiny"), chosen, progress=False)


def test_a_sequence_is_read_once_and_decoded_at_each_depth(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[tuple[int, int]] = []
    run = engine.runner.run

    def record(step: Sequence[Chunk], follows: Callable[[TokenSequence], bool]) -> StepResult:
        chunks.extend((chunk.sequence.num_computed_tokens, chunk.num_tokens) for chunk in step)
        return run(step, follows)

    monkeypatch.setattr(engine.runner, "run", record)
    found = measure(engine, [100, 121, 500])
    assert [depth.depth for depth in found] == [100, 121, 500]
    assert [depth.read_tokens for depth in found] == [100, 121 - 100 - STEPS, 500 - 121 - STEPS]
    ends = [first + count for first, count in chunks]
    assert [first for first, _ in chunks] == [0, *ends[:-1]], "every token is computed once, in order"
    for depth in (100, 121, 500):
        assert {(depth + step, 1) for step in range(STEPS)} <= set(chunks), "decoded from that depth on"
    assert all(depth.decode_tokens_per_s > 0 and 0.05 < depth.peak_rss_gb < 100 for depth in found)
    assert not engine.has_work
    engine.check_integrity()


@pytest.mark.parametrize("depths", [[], [0], [50, 70], [50, 40], [590]])
def test_depths_that_cannot_be(depths: list[int], engine: Engine) -> None:
    with pytest.raises(OptionError, match="--depths"):
        measure(engine, depths)
    assert not engine.has_work


def test_options_are_passed_on() -> None:
    typed = ["block-size=32", "enable_prefix_caching=false", "quantization=wint4", "kv_cache_memory=10"]
    expected = {"block_size": 32, "enable_prefix_caching": False, "quantization": "wint4", "kv_cache_memory": 10}
    assert options(typed) == expected
    with pytest.raises(OptionError, match="write NAME=VALUE"):
        options(["block_size"])


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    long_context.main(["--model", "dummy:tiny", "--depths", "40", "--option", "max_model_len=80", "--json", str(out)])
    assert "depth      40: read 40 tokens" in capsys.readouterr().out
    assert json.loads(out.read_text(encoding="utf-8"))["options"]["max_model_len"] == 80
    for wrong in (["--depths", "90"], ["--option", "nonsense=1"]):
        with pytest.raises(SystemExit) as ended:
            long_context.main(["--model", "dummy:tiny", "--depths", "40", "--option", "max_model_len=80", *wrong])
        assert ended.value.code == 2
