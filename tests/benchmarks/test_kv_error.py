"""The error of KV caches: int8 more than bfloat16, both small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import kv_error


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("How is the weather in Beijing? 今天天气怎么样？ " * 20, encoding="utf-8")
    kv_error.main(["--text", str(text), "--tokens", "150"])
    assert "int8      hidden states" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        kv_error.main(["--text", str(tmp_path / "none.txt")])
    assert ended.value.code == 2


def test_int8_errs_more_than_bfloat16_and_little() -> None:
    source = kv_error.resolve_model(None)
    errors = kv_error.measure(kv_error.load_model(source, progress=False), list(range(300, 500)))
    narrow, bytes_ = errors[torch.bfloat16], errors[torch.int8]
    assert 0 < narrow.hidden < bytes_.hidden < 0.05
    assert bytes_.divergence < 0.05
    assert bytes_.same_token > 0.9
