"""The texts that a parity check runs over.

By default the held-out notes of the tiny model, which are synthetic. Users' own may be records of
patients: they are read, counted, and never copied, named or digested. A digest would let anyone who
guesses a sentence confirm it, and one keyed with a key that is thrown away would say nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllm_pack import resources
from medllm_pack.errors import SourceError, shown
from medllm_pack.files import read_small

_SHIPPED = "clinico_teste"
_LIMIT = 256 << 20  # bytes of a file of texts


@dataclass(frozen=True)
class Texts:
    """Notes to predict, and what may be said about them.

    Attributes:
        name: of the shipped texts, or ``user``.
        notes: the texts; not shown by repr().
        sha256: of the shipped notes that are used; None for users' texts.
    """

    name: str
    notes: tuple[str, ...]
    sha256: str | None

    def __repr__(self) -> str:
        return f"Texts({self.name!r}, {len(self.notes)} notes)"

    def document(self) -> dict[str, Any]:
        """Return what pack.json says about the texts."""
        return {"name": self.name, "count": len(self.notes), "sha256": self.sha256}


def shipped_texts(*, count: int) -> Texts:
    """Return the first held-out notes of the tiny model."""
    path = resources.folder("examples/tiny/texts") / f"{_SHIPPED}.txt"
    notes = tuple(_paragraphs(path.read_text(encoding="utf-8")))[:count]
    digest = hashlib.sha256("\n\n".join(notes).encode()).hexdigest()
    return Texts(_SHIPPED, notes, digest)


def read_texts(path: Path, *, count: int) -> Texts:
    """Read a user's texts: notes between blank lines, or JSON lines with ``text``.

    Raises:
        SourceError: if there is nothing to read; no message quotes a text.
    """
    try:
        content = read_small(path, limit=_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError(f"{shown(path.name)} is not UTF-8; save it as UTF-8") from None
    found = _lines(content, path.name) if path.suffix == ".jsonl" else _paragraphs(content)
    notes = tuple(found)[:count]
    if not notes:
        raise SourceError(f"{shown(path.name)} holds no text; notes are separated by blank lines")
    return Texts("user", notes, None)


def _paragraphs(content: str) -> Iterator[str]:
    note: list[str] = []
    for line in [*content.replace("\r\n", "\n").split("\n"), ""]:
        if line.strip():
            note.append(line)
        elif note:
            yield "\n".join(note)
            note = []


def _lines(content: str, name: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        text = _text_of(line)
        if text is None:
            raise SourceError(f"{shown(name)}, line {number}: not a JSON object with a text")
        yield text


def _text_of(line: str) -> str | None:
    try:
        document = json.loads(line)
    except ValueError:
        return None
    text = document.get("text") if isinstance(document, dict) else None
    return text if isinstance(text, str) and text.strip() else None
