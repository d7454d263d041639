"""Elements of HTML and SVG as text, everything foreign escaped by construction.

A child that is a plain string is text; only what ``tag`` made is markup. Knows nothing of reports.
"""

from __future__ import annotations

import html
import unicodedata

_VOID = ("meta", "br", "input", "line", "rect", "circle", "path")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Markup | None


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """Return an element; ``class_`` is class, ``_`` in a name is ``-``, None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{given}>" if name in _VOID[:3] else f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Return children one after the other, text escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(child)
            for child in children
            if child is not None
        )
    )


def escape(text: str) -> str:
    """Return text for an element or an attribute; what nobody can see is shown as a mark."""
    return html.escape("".join(_visible(c) for c in text), quote=True)


def _visible(c: str) -> str:
    # Control characters are not valid in HTML; invisible ones can turn a name around.
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"
