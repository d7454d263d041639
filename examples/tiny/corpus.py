"""Write the texts of the tiny model from the hand-written material beside this file.

The material is a small grammar: sections in brackets, one alternative a line, slots in braces.
The texts are synthetic from the first word to the last; no corpus and no record was read. This
script knows nothing about tokenizers or models. It needs only the standard library.

    python corpus.py                # writes texts/ beside this file, the same bytes every time

Slots: ``{section}`` an alternative of that section, ``{3-9}`` a whole number, ``{a|b}`` masculine
or feminine, ``{a/b}`` one side or the other, ``{caso.x}`` section x of the case of this note.
A line "a | b" of a section gives a to the masculine and b to the feminine. A line that opens
with "!" is held out: it occurs in the test texts only.
"""

from __future__ import annotations

import argparse
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20240
GENERAL_BYTES = 720_000
CLINICAL_BYTES = 640_000
PHRASE_BYTES = 120_000
TEST_BYTES = 48_000
HELD_OUT_SHARE = 0.2  # how often a test text takes a held-out line where there is one
FORM_SHARE = 0.3  # general documents that are a letter, a recipe, a notice and not a paragraph
# Word lists teach the base the clinic's words; without them an adapter of query and value
# projections, which cannot change an embedding, has no way to write "mmHg".
LIST_SHARE = 0.2
SHORT_SHARE = 0.25  # clinical documents that are one part of a note

_SLOT = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)-(\d+)")
_SENTENCE_START = re.compile(r"(^|[.!?] |\n|\n— |^— )([a-zà-ú])")
_SENTENCE_END = re.compile(r"(?<=[.!?]) |\n")

_CLAUSE_END = re.compile(r"[.,;:]\s+|[.\n]|$")
_JOINTS = ("; ", "\n- ", ", ", ". ", " / ")

NOTES = ("admissao", "evolucao", "alta", "ambulatorio")
# What makes a note a note stays out of the general texts.
NOTE_FORM = ("caso", "ef", "prescricao", "abertura", "vitais", "vitais_mal", "hemograma", "bioq")


@dataclass(frozen=True)
class Line:
    """One alternative of a section."""

    text: str
    held_out: bool


Grammar = dict[str, list[Line]]


@dataclass
class Document:
    """What stays the same within one document, and what it has already said."""

    feminine: bool
    left: bool
    case: str = ""
    said: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Writer:
    """Expands a grammar; with ``test`` the held-out lines may be used too."""

    grammar: Grammar
    rng: random.Random
    test: bool = False

    def document(self, case: str = "") -> Document:
        """Open a document of a random sex and side."""
        return Document(self.rng.random() < 0.5, self.rng.random() < 0.5, case)

    def expand(self, text: str, doc: Document) -> str:
        """Fill every slot of ``text``."""
        return _SLOT.sub(lambda match: self._fill(match[1], doc), text)

    def draw(self, section: str, doc: Document) -> str:
        """Return one alternative of ``section``, filled, new to ``doc`` where that is possible."""
        fresh = [line for line in self.grammar[section] if line.text not in doc.said]
        usual = [line for line in fresh if not line.held_out]
        reserved = [line for line in fresh if line.held_out]
        if self.test and reserved and self.rng.random() < HELD_OUT_SHARE:
            usual = reserved
        line = self.rng.choice(usual or self.grammar[section][:1])
        doc.said.add(line.text)
        masculine, _, feminine = line.text.partition(" | ")
        return self.expand(feminine if feminine and doc.feminine else masculine, doc)

    def _fill(self, slot: str, doc: Document) -> str:
        if numbers := _NUMBERS.fullmatch(slot):
            return str(self.rng.randint(int(numbers[1]), int(numbers[2])))
        if "|" in slot:
            return slot.split("|")[doc.feminine]
        if "/" in slot:
            return slot.split("/")[doc.left]
        return self.draw(slot.replace("caso.", f"{doc.case}."), doc)


def read_grammar(path: Path) -> Grammar:
    """Return the sections of a material file."""
    grammar: Grammar = {}
    lines: list[Line] = []
    for raw in path.read_text(encoding="utf-8").splitlines():
        if raw.startswith("["):
            lines = grammar.setdefault(raw.strip("[]"), [])
        elif raw and not raw.startswith("#"):
            lines.append(Line(raw.lstrip("!").replace("\\n", "\n"), raw.startswith("!")))
    return grammar


def sentences(document: str) -> set[str]:
    """Return the sentences of a document, for the comparison of train and test."""
    return {part for part in _SENTENCE_END.split(document) if len(part) > 30}


def write_general(writer: Writer, avoid: frozenset[str], size: int) -> list[str]:
    """Return general documents of ``size`` bytes in all, none with a sentence of ``avoid``."""
    topics = [name for name in writer.grammar if name.startswith("tema.")]
    forms = [name for name in writer.grammar if name.startswith("forma.")]
    lists = [name for name in writer.grammar if name.startswith("lista.")]
    found: list[str] = []
    while _bytes(found) < size:
        # A list of chance words measures nothing, so the test has none.
        if writer.rng.random() < LIST_SHARE and not writer.test:
            text = _capitalise(writer.draw(writer.rng.choice(lists), writer.document()))
        elif writer.rng.random() < FORM_SHARE:
            form = _capitalise(writer.draw(writer.rng.choice(forms), writer.document()))
            text = "" if avoid & sentences(form) else form
        else:
            text = _paragraph(writer, writer.rng.choice(topics), avoid)
        if text and text not in found[-50:]:
            found.append(text)
    return found


def _paragraph(writer: Writer, topic: str, avoid: frozenset[str]) -> str:
    said: set[str] = set()
    parts = []
    for _ in range(writer.rng.randint(2, 6)):
        doc = writer.document()
        doc.said = said  # sex and side change with the sentence, the memory does not
        sentence = _capitalise(writer.draw(topic, doc))
        if sentence not in avoid:
            parts.append(sentence)
    return " ".join(parts)


def write_phrases(general: Writer, clinical: Writer, size: int) -> list[str]:
    """Return ``size`` bytes of general documents that list clinical clauses in a chance order.

    The base learns how the clauses run, and from no text what follows what in a note.
    """
    sections = [
        name for name in clinical.grammar if not name.startswith("nota.") and name not in NOTE_FORM
    ]
    found: list[str] = []
    while _bytes(found) < size:
        doc = clinical.document()
        texts = [clinical.draw(clinical.rng.choice(sections), doc) for _ in range(9)]
        clauses = [part for text in texts for part in _CLAUSE_END.split(text) if part]
        clinical.rng.shuffle(clauses)
        head = _capitalise(general.draw("frases", general.document()))
        joint = clinical.rng.choice(_JOINTS)
        found.append(head + ("\n- " if joint == "\n- " else " ") + joint.join(clauses[:9]))
    return found


def write_clinical(writer: Writer, avoid: frozenset[str], size: int) -> list[str]:
    """Return clinical notes of ``size`` bytes in all, none of them in ``avoid``.

    Each case keeps one kind of note for the test, so that half of the test notes are a
    combination of case and kind that training never showed.
    """
    cases = [line.text for line in writer.grammar["caso"]]
    found: list[str] = []
    seen = set(avoid)
    while _bytes(found) < size:
        index = writer.rng.randrange(len(cases))
        kind = _kind(writer, index)
        text = _capitalise(writer.draw(f"nota.{kind}", writer.document(cases[index])))
        if text not in seen:
            seen.add(text)
            found.append(text)
    return found


def _kind(writer: Writer, index: int) -> str:
    reserved = NOTES[index % len(NOTES)]
    if writer.test and writer.rng.random() < 0.5:
        return reserved
    if writer.rng.random() < SHORT_SHARE:
        return "curta"
    return writer.rng.choice([kind for kind in NOTES if kind != reserved])


def _capitalise(text: str) -> str:
    return _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


def _bytes(documents: list[str]) -> int:
    return sum(len(text.encode()) + 2 for text in documents)


def save(path: Path, documents: list[str]) -> None:
    """Write documents with a blank line between them; the name appears when they are whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text("\n\n".join(documents) + "\n", encoding="utf-8", newline="\n")
    os.replace(partial, path)


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description="write the texts of the tiny model")
    parser.add_argument("--out", type=Path, default=HERE / "texts", help="folder to write")
    out: Path = parser.parse_args().out
    general = read_grammar(HERE / "material" / "geral.txt")
    clinical = read_grammar(HERE / "material" / "clinico.txt")

    def writer(grammar: Grammar, offset: int, *, test: bool) -> Writer:
        return Writer(grammar, random.Random(SEED + offset), test=test)

    train = write_general(writer(general, 0, test=False), frozenset(), GENERAL_BYTES)
    known = frozenset().union(*map(sentences, train))
    save(out / "geral_treino.txt", train)
    save(
        out / "geral_teste.txt",
        write_general(writer(general, 1, test=True), known, TEST_BYTES),
    )
    save(
        out / "geral_frases.txt",
        write_phrases(
            writer(general, 4, test=False), writer(clinical, 5, test=False), PHRASE_BYTES
        ),
    )
    notes = write_clinical(writer(clinical, 2, test=False), frozenset(), CLINICAL_BYTES)
    save(out / "clinico_treino.txt", notes)
    save(
        out / "clinico_teste.txt",
        write_clinical(writer(clinical, 3, test=True), frozenset(notes), TEST_BYTES),
    )


if __name__ == "__main__":
    main()
