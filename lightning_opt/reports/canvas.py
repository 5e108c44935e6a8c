"""The drawing surface: one size, one axis style, and an SVG that takes its colours and letters from the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_opt.reports.quantities import short
from lightning_opt.reports.style import COLOURS, hexadecimal

WIDTH, HEIGHT = 460, 270
"""Size of a figure in its own units (many rows make it higher); text is 13 of them, readable at phone width."""

_VARIABLES = {light: name for name, (light, _) in COLOURS.items()}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 13,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": hexadecimal("faint"),
    "axes.labelcolor": hexadecimal("muted"),
    "text.color": hexadecimal("ink"),
    "xtick.color": hexadecimal("muted"),
    "ytick.color": hexadecimal("muted"),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": hexadecimal("line"),
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
    "axes.unicode_minus": True,
    "figure.dpi": 72,
}


@dataclass(frozen=True)
class Legend:
    """One entry of a figure's legend, drawn by the page beside the caption.

    Attributes:
        label: what is drawn.
        colour: a colour name of `style`.
        mark: ``line``, ``dashed``, ``area``, ``dot``, ``diamond`` or ``tick``.
    """

    label: str
    colour: str
    mark: str = "line"


@dataclass(frozen=True)
class Figure:
    """A figure as data: the drawing, its words, and its numbers for those who cannot see it.

    Attributes:
        key: identifier in the page.
        title: what it shows.
        svg: the drawing, an ``<svg>`` element that uses the page's colour variables.
        caption: what to read from it.
        legend: its entries.
        header: columns of the table of its numbers.
        numbers: rows of that table.
    """

    key: str
    title: str
    svg: str
    caption: str
    legend: tuple[Legend, ...] = ()
    header: tuple[str, ...] = ()
    numbers: tuple[tuple[str, ...], ...] = ()


class Sheet:
    """An empty drawing with one pair of axes; made by `sheet`."""

    def __init__(self, key: str, left: int = 58, right: int = 14, height: int = HEIGHT):
        self.key, self.height = key, height
        self.drawing = Drawing(figsize=(WIDTH / 72, height / 72))
        FigureCanvasSVG(self.drawing)
        self.drawing.patch.set_visible(False)
        box = (left / WIDTH, 48 / height, (WIDTH - left - right) / WIDTH, (height - 48 - 32) / height)
        self.axes: Axes = self.drawing.add_axes(box)
        self.axes.patch.set_visible(False)

    def label(self, x: str, y: str) -> None:
        """Names the axes with their units: y above its axis (no turned text), x below on the right."""
        self.drawing.text(4 / WIDTH, 1 - 15 / self.height, y, color=hexadecimal("muted"), ha="left")
        self.drawing.text(1 - 14 / WIDTH, 5 / self.height, x, color=hexadecimal("muted"), ha="right")

    def ticks(self, x: int = 5, y: int = 5) -> None:
        """Few round ticks, in short form (1.2M, 300)."""
        self.axes.xaxis.set_major_locator(MaxNLocator(x, steps=[1, 2, 2.5, 5, 10]))
        self.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        if self.axes.get_yscale() == "linear":
            self.axes.yaxis.set_major_locator(MaxNLocator(y, steps=[1, 2, 2.5, 5, 10]))
        tiny = max(map(abs, self.axes.get_ylim())) < 2e-3
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, tiny)))

    def svg(self, description: str) -> str:
        """The drawing as an ``<svg>`` element.

        Args:
            description: one sentence for screen readers.
        """
        text = StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        self.drawing.savefig(text, format="svg", metadata=nothing, transparent=True)
        return _for_page(text.getvalue(), self, description)


@contextmanager
def sheet(key: str, left: int = 58, right: int = 14, height: int = HEIGHT) -> Iterator[Sheet]:
    """A `Sheet` in the house style; the style holds inside the block only.

    Args:
        key: identifier of the figure: what makes its element ids unique in the page, and the same every time.
        left: room for the labels of the y axis.
        right: room on the right.
        height: of the whole figure, for many rows.
    """
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": key}):
        yield Sheet(key, left, right, height)


def tick(value: float, tiny: bool = False) -> str:
    """A tick's label: 0, 0.5, 300, 1.2k; on an axis of ``tiny`` values 2e−4."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return re.sub(r"\.?0+(?=[kMBT]$)", "", short(value)) if "." in short(value) else short(value)
    text = f"{value:.4g}"
    if tiny or "e" in text:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "\N{MINUS SIGN}")


def _for_page(svg: str, drawn: Sheet, description: str) -> str:
    """Cuts the file's prologue, makes colours CSS variables, fonts the page's own, and ids unique."""
    key, svg = drawn.key, svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"""(?:url\(#|xlink:href="#)([^)"]+)""", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = svg.replace('xlink:href="#', f'href="#{key}-')
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], svg)
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]+", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]+;?\s*", "", svg)
    svg = re.sub(r"<g>\s*</g>\s*", "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    size = f"{WIDTH} {drawn.height}"
    start = f'<svg class="figure" role="img" aria-label="{_attribute(description)}" viewBox="0 0 {size}">'
    return start + svg[svg.index(">") + 1 :]


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
