"""A report as a picture: the page, its colours and fonts, and how it is written. Knows files; knows no figures.

matplotlib comes with the `bench` extra; it is imported when a report is written, and no display is needed.
"""

from __future__ import annotations

import json
import os
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tern.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tern.bench.setting import Setting

PICTURES = (".svg", ".png")
COLOURS = ("#1f5fa8", "#d1602b", "#2b8a5f", "#8a4fa0", "#b08a00", "#4a4a4a")
MARKS = ("o", "s", "^", "D", "v", "P")
CHINESE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Droid Sans Fallback"),
)
"""Fonts with Chinese characters that systems have; the first that is installed is used."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the reader's fonts have the characters that ours may lack
    "svg.hashsalt": "tern",
    "text.parse_math": False,  # a model may be called $1_000
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
}
_WIDTH, _HEIGHT = 12.0, 4.6  # inches
_DPI = 144


@dataclass(frozen=True)
class Destination:
    """Where a report goes: one picture, or a `folder` for `tern-bench.svg`, `.png` and `.json`."""

    path: Path
    folder: bool

    @classmethod
    def of(cls, text: str) -> Destination:
        """What `--report` names, made ready to be written to.

        Raises `OptionError` if it cannot be written, is no known kind of picture, or matplotlib is not installed: all
        that is known before the first measurement.
        """
        path = Path(text).expanduser()
        folder = os.path.isdir(path) or not path.suffix
        if not folder and path.suffix.lower() not in PICTURES:
            raise OptionError(f"--report is {text[:200]!r}: give a file that ends in .svg or .png, or a directory.")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise OptionError(
                "--report needs matplotlib, which is not installed: pip install 'tern-llm[bench]'."
            ) from None
        try:
            (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
            for file in cls(path, folder).pictures:
                _check_writable(file)
        except OSError as error:
            raise OptionError(f"--report is {text[:200]!r}, which cannot be written ({error.strerror}).") from None
        return cls(path, folder)

    @property
    def pictures(self) -> list[Path]:
        """The pictures to write."""
        return [self.path / f"tern-bench{kind}" for kind in PICTURES] if self.folder else [self.path]

    def write(self, draw: Callable[[], Figure], report: dict[str, Any]) -> list[Path]:
        """Draw and write the pictures, and beside those in a folder the figures themselves; the files written."""
        import matplotlib

        fonts = _installed_fonts()
        for path in self.pictures:
            kind = path.suffix.lower().lstrip(".")
            with matplotlib.rc_context({**_STYLE, "font.family": fonts}), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing")  # in an SVG the reader's fonts have it
                figure = draw()
                if kind != "svg":
                    _spell_out(figure, fonts)
                metadata = {"Date": None} if kind == "svg" else None  # a report carries its own date
                figure.savefig(path, format=kind, dpi=_DPI, metadata=metadata)
        if not self.folder:
            return self.pictures
        figures = self.path / "tern-bench.json"
        figures.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return [*self.pictures, figures]


def page(
    title: str, subtitle: str, setting: Setting, panels: int, *, measured: str = "on"
) -> tuple[Figure, list[Axes]]:
    """An empty page of some panels, with what was measured above them, and where, when and how below.

    `measured` "on" a machine, or "from" one.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    between = ConstrainedLayoutEngine(rect=(0.0, 0.1, 1.0, 0.76), w_pad=0.12)
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout=between)
    figure.text(0.01, 0.965, _one_line(title[:120]), fontsize=13, fontweight="bold", va="top")
    figure.text(0.01, 0.905, _one_line(subtitle), color="#555555", va="top")
    command = textwrap.shorten(setting.command, 190, placeholder=" ...")
    machine = f"measured {measured} {setting.machine}   tern {setting.tern}   {setting.date}"
    figure.text(0.01, 0.065, _one_line(machine), fontsize=8, color="#555555", va="top")
    figure.text(0.01, 0.03, _one_line(command), fontsize=8, color="#555555", va="top")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _check_writable(file: Path) -> None:
    """Raise `OSError` unless the file can be written; leaves none behind."""
    existed = file.exists()
    file.open("ab").close()
    if not existed:
        file.unlink()


def number(value: float) -> str:
    """Three figures at least, thousands apart, no exponent."""
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:.3g}"


def ticks(axes: Axes, values: list[str]) -> None:
    """Even steps along x, with these labels: depths and rates lie orders of magnitude apart."""
    axes.set_xticks(range(len(values)), values)
    axes.margins(x=0.08)


def finish(axes: Axes, *, title: str, x: str, y: str) -> None:
    """A panel's labels; speeds and times begin at zero, so that lengths compare as the figures do."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _installed_fonts() -> list[str]:
    """matplotlib's own font, and a Chinese one if there is any."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[name for name in CHINESE_FONTS if name in installed][:1]]


def _spell_out(figure: Figure, fonts: list[str]) -> None:
    """Spell characters that no font here has as `\\uXXXX`: a picture of pixels would show boxes."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    known = {ord("\n")}
    for font in fonts:
        known |= font_manager.get_font(font_manager.findfont(font)).get_charmap().keys()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        shown = text.get_text()
        text.set_text("".join(c if ord(c) in known else c.encode("ascii", "backslashreplace").decode() for c in shown))


def _one_line(text: str) -> str:
    """Text from outside as one line: what is not printable would break the line, or the file."""
    return "".join(character if character.isprintable() else " " for character in text)
