"""What every figure of the report is drawn of: an SVG of one width, an axis, lines, dots and words.

Colours are classes; the page's style gives them, light and dark. Knows no figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from medllm_pack.parity.report.markup import Markup, tag

WIDTH: Final = 720.0


def svg(
    name: str, *children: Markup, height: float, title: str, described: Iterable[str]
) -> Markup:
    """Return a figure with a title and a description in words."""
    return tag(
        "svg",
        tag("title", title, id=f"{name}-t"),
        tag("desc", "; ".join(described) + ".", id=f"{name}-d"),
        *children,
        viewBox=f"0 0 {WIDTH:g} {height:g}", role="img",
        aria_labelledby=f"{name}-t {name}-d",
    )  # fmt: skip


class Scale:
    """A linear axis."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        """Return where a value lies, a little outside at most."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, -0.1), 1.1) * (self.end - self.start), 2)


def is_number(value: Any) -> bool:
    """Say whether a figure is there to be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def grid(x: float, top: float, bottom: float) -> Markup:
    """Return a line of the grid."""
    return tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid")


def dot(x: float, y: float, kind: str) -> Markup:
    """Return a point."""
    return tag("circle", cx=x, cy=y, r=6, class_=f"dot {kind}")


def text(x: float, y: float, words: str, anchor: str, kind: str) -> Markup:
    """Return words at a place."""
    return tag("text", words, x=round(x, 2), y=round(y, 2), text_anchor=anchor, class_=kind)
