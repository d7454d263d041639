"""What a check says that it found, in another language: by the sentences of details.toml.

parity.json holds it as the terminal says it, in English. What is not one of the known sentences,
such as a complaint of llama.cpp, stays as it is and is told apart, so that a page can mark it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

_PLACE = re.compile(r"{(\w+)}")
# Names of files and stops are anyone's: what is longer than any sentence here stays as it is.
_LONGEST, _MOST, _DEPTH = 2000, 12, 3  # characters, pieces between semicolons, reasons in reasons
_AS_IT_IS = ("found", "expected")  # what a file says, and should say
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?%?")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a detail.

    Attributes:
        text: words.
        foreign: whether they are still in English.
    """

    text: str
    foreign: bool = False


def translate(detail: str, number: Callable[[str], str]) -> list[Part]:
    """Return a detail in Portuguese.

    Args:
        detail: what a check says.
        number: writes a number as the language does.
    """
    return list(_merged(_translated(detail, number)))


def _translated(detail: str, number: Callable[[str], str], depth: int = _DEPTH) -> list[Part]:
    """Return the parts of sentences that semicolons separate; some hold one themselves.

    Of all ways to cut, the one that leaves least in English, and of these the one with most cuts.
    """
    pieces = detail.split("; ")
    if len(pieces) > _MOST or len(detail) > _LONGEST or not depth:
        return [Part(detail, foreign=True)]
    best: list[list[Part]] = [[]]  # of the last pieces: none, one, two, …
    for start in reversed(range(len(pieces))):
        ways = []
        for stop in range(start + 1, len(pieces) + 1):
            text = "; ".join(pieces[start:stop])
            first = _sentence(text, number, depth) or [Part(text, foreign=True)]
            rest = best[len(pieces) - stop]
            ways.append([*first, Part("; "), *rest] if rest else first)
        best.append(min(ways, key=lambda way: sum(part.foreign for part in way)))
    return best[-1]


def _sentence(text: str, number: Callable[[str], str], depth: int) -> list[Part] | None:
    for pattern, target in _sentences():
        if match := pattern.fullmatch(text):
            return list(_filled(target, match.groupdict(), number, depth))
    return None


def _filled(
    target: str, values: dict[str, str], number: Callable[[str], str], depth: int
) -> Iterator[Part]:
    for i, piece in enumerate(_PLACE.split(target)):
        if i % 2 == 0:
            yield Part(piece)
        elif piece == "reason":
            yield from _translated(values[piece], number, depth - 1)
        else:
            value = values[piece]
            measured = piece not in _AS_IT_IS and _NUMBER.fullmatch(value)
            yield Part(number(value) if measured else value)


def _merged(parts: list[Part]) -> Iterator[Part]:
    for foreign, group in groupby(parts, key=lambda part: part.foreign):
        if text := "".join(part.text for part in group):
            yield Part(text, foreign)


@cache
def _sentences() -> tuple[tuple[re.Pattern[str], str], ...]:
    text = Path(__file__).with_name("details.toml").read_text(encoding="utf-8")
    entries = tomllib.loads(text)["details"]
    return tuple((_pattern(entry["en"]), entry["pt"]) for entry in entries)


def _pattern(sentence: str) -> re.Pattern[str]:
    """Return what fits a sentence; a place ends where the words after it first stand.

    Nothing is tried twice (atomic groups), so that no text takes longer than its length.
    """
    begin, *pieces = _PLACE.split(sentence)
    pairs = list(zip(pieces[::2], map(re.escape, pieces[1::2]), strict=True))
    places = [f"(?>(?P<{place}>.+?){words})" for place, words in pairs[:-1]]
    places += [f"(?P<{place}>.+){words}" for place, words in pairs[-1:]]
    return re.compile(re.escape(begin) + "".join(places), re.DOTALL)
