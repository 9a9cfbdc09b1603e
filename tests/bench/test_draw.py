"""Pictures of a report: every label on it, any model's name, and a sentence where they cannot be written."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tern.bench import BenchReport, BenchResult, MachineLimits, Setting
from tern.bench import draw as draw_module
from tern.bench.draw import Destination, number
from tern.bench.draw_steps import steps_figure
from tern.cli import main
from tern.errors import OptionError

SETTING = Setting("tern bench --decode 1,8", "2026-11-24 10:00 UTC", "Some Processor", 24.0, "0.1.0", "3.12")
LIMITS = MachineLimits("avx2", 2, 36.0, 2.0)
RESULTS = [
    BenchResult("prefill", 512, 1, 0, 120.0, 0.4),
    BenchResult("decode", 1, 1, 0, 20.0, 0.8, 0.02),
    BenchResult("decode", 1, 8, 0, 48.0, 0.6, 0.02),
    BenchResult("decode", 1, 1, 4096, 16.0, 0.5, 0.02),
]
PNG = b"\x89PNG\r\n\x1a\n"


def report(model: str = "ernie", results: list[BenchResult] | None = None) -> BenchReport:
    return BenchReport(model, "wint4", SETTING, LIMITS, RESULTS if results is None else results, 1.0, 12.0)


def drawn(to: Path, made: BenchReport) -> str:
    """The report as SVG, read back as XML: all its text."""
    Destination.of(str(to)).write(lambda: steps_figure(made), made.as_json())
    return "\n".join(ElementTree.parse(to).getroot().itertext())


def test_a_page_says_what_was_measured_where_and_how(tmp_path: Path) -> None:
    text = drawn(tmp_path / "steps.svg", report())
    for label in (
        *("ernie", "wint4", "avx2, 2 threads, reads 36.0 GB/s", "Some Processor, 24 GB", "2026-11-24 10:00 UTC"),
        *("tern bench --decode 1,8", "Decode by depth", "Decode by sequences", "Prefill by length", "tokens/s"),
        *("8 sequences", "1 sequence", "depth 4 096", "48 (60%)", "120 (40%)", "tokens of the prompt"),
    ):
        assert label in text, label


def test_the_limit_stands_beside_each_speed() -> None:
    figure = steps_figure(report())
    lines = {tuple(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert lines == {(20.0, 16.0), (25.0, 32.0), (48.0,), (80.0,)}


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    assert [
        axes.get_title(loc="left") or axes.get_title() for axes in steps_figure(report(results=RESULTS[:1])).axes
    ] == ["Prefill by length"]
    drawn(tmp_path / "none.svg", report(results=[]))


@pytest.mark.parametrize("name", ["文心-4.5-模型", "a_$b_{c}$", "two\nlines", "<&>\x00\x1b", "x" * 5000, "\ud800"])
def test_any_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    made = report(name)
    text = drawn(tmp_path / "any.svg", made)
    assert "".join(c if c.isprintable() else " " for c in name)[:120] in text
    Destination.of(str(tmp_path / "any.png")).write(lambda: steps_figure(made), made.as_json())
    assert (tmp_path / "any.png").read_bytes().startswith(PNG)


def test_characters_without_a_font_are_spelt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_module, "CHINESE_FONTS", ())
    figures = []

    def draw() -> object:
        figures.append(steps_figure(report("文心 é")))
        return figures[-1]

    Destination.of(str(tmp_path / "a.png")).write(draw, {})  # type: ignore[arg-type]
    assert figures[0].texts[0].get_text() == "\\u6587\\u5fc3 é: speed of its steps"


def test_the_same_report_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        drawn(tmp_path / name, report())
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("report.pdf", "give a file that ends in .svg or .png, or a directory"),
        ("file/report.svg", "cannot be written"),
        ("file/more/report.svg", "cannot be written"),
        ("x" * 300 + ".svg", "cannot be written"),
    ],
)
def test_where_nothing_can_be_written(path: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=re.escape(said)):
        Destination.of(str(tmp_path / path))


def test_checking_leaves_nothing_behind_and_spoils_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.svg").write_text("old", encoding="utf-8")
    Destination.of(str(tmp_path / "old.svg"))
    Destination.of(str(tmp_path / "new.svg"))
    Destination.of(str(tmp_path / "folder"))
    assert (tmp_path / "old.svg").read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "old.svg"]


def test_the_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tern.bench.report.measure_device", lambda _: LIMITS)
    flags = ["--model", "dummy:tiny", "--quantization", "wint4", "--prefill", "", "--decode", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", *flags, "--report", str(tmp_path / "pictures")])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert "outside the network" in shown.out
    assert "Wrote" in shown.err
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "tern-bench.json",
        "tern-bench.png",
        "tern-bench.svg",
    ]


def test_figures_are_written_plainly() -> None:
    assert [number(value) for value in (0, 2.94, 20, 131000, 1.5e6)] == ["0", "2.94", "20", "131 000", "1 500 000"]


def test_loading_a_server_needs_no_torch_and_timing_no_matplotlib() -> None:
    code = (
        "import sys, tern.bench.load, tern.bench.draw_load; heavy = {'torch', 'matplotlib'} & sys.modules.keys(); "
        "import tern.bench.report; heavy |= {'matplotlib', 'httpx'} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_line_is_left_out() -> None:
    many = [BenchResult("decode", 1, 2**power, 0, 10.0 * power, 0.5, 0.1) for power in range(9)]
    figure = steps_figure(report(results=many))
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == 9
