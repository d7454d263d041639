"""What the report says and how it writes numbers, in one language at a time.

The sentences are data, both languages side by side in words.toml.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from medllm_pack.pack.card import human_bytes
from medllm_pack.parity.report.details import translate
from medllm_pack.parity.report.markup import Markup, join, tag

Language = Literal["pt", "en"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
TAGS = {"pt": "pt-BR", "en": "en"}

_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MISSING = "–"


@cache
def table() -> dict[str, Any]:
    """Return the content of words.toml."""
    text = Path(__file__).with_name("words.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


class Words:
    """Sentences and numbers of one language."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def __call__(self, key: str, **values: str) -> str:
        """Return a sentence with values filled in."""
        sentence: str = table()[key][self.language]
        return sentence.format(**values)

    def named(self, group: str, key: str) -> str:
        """Return the word for a name, or the name where there is none."""
        entry = table()[group].get(key)
        return str(entry[self.language]) if entry else key

    def number(self, value: Any, form: str = "#.3g") -> str:
        """Return a number as it is written; 1.3e-06 becomes 1.3 × 10⁻⁶."""
        if isinstance(value, str):
            return {"inf": "∞", "-inf": "−∞"}.get(value, _MISSING)
        if value is None:
            return _MISSING
        mantissa, _, power = format(value, form).partition("e")
        written = self._localized(mantissa.removesuffix("."))
        return f"{written} × 10{str(int(power)).translate(_POWERS)}" if power else written

    def size(self, value: int | None) -> str:
        """Return a size in bytes as it is written."""
        return _MISSING if value is None else self._localized(human_bytes(value))

    def data(self, value: Any, form: str = "#.3g") -> Markup:
        """Return a figure of parity.json with its value beside how it is written."""
        written = self.number(value, form)
        if not isinstance(value, int | float):
            return tag("span", written)
        return tag("data", written, value=repr(value))

    def limit(self, text: str) -> str:
        """Return the limit of a check, such as ``<= 0.1`` or ``= 0 differ``."""
        sign, _, rest = text.partition(" ")
        if sign in ("<=", ">="):
            return f"{'≤' if sign == '<=' else '≥'} {self._localized(rest)}"
        if sign == "=":
            amount, _, what = rest.partition(" ")
            return f"= {amount} {self.named('limit_words', what)}".rstrip()
        return self._localized(self.named("limit_words", text))

    def detail(self, text: str) -> Markup:
        """Return what a check found; what there is in English only is marked as such."""
        if self.language == "en":
            return join(text)
        parts = translate(text, self._localized)
        return join(
            *(tag("span", part.text, lang="en") if part.foreign else part.text for part in parts)
        )

    def _localized(self, number: str) -> str:
        minus = number.replace("-", "−")
        return minus.replace(".", ",") if self.language == "pt" else minus
