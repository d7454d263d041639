"""Rung *tokens*: the vocabulary in the header, and how llama.cpp cuts text into ids.

SentencePiece reads tokenizer.model itself and is the judge. What neither it nor the JSON files know
of must not stand in the header: llama.cpp would go by it. The strings are what clinical Portuguese
is made of, and what breaks tokenizers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import TokenType

from medllm_pack.errors import shown
from medllm_pack.parity.checks import Check
from medllm_pack.parity.original import Original

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_NOTE = "Paciente de 64 anos, hipertensa, admitida com dor torácica há 2 dias; não há sopros."
STRINGS: Sequence[str] = (
    "", " ", "   ", "\n", "\n\n", "\t", "a", " a", "a ", "  dois  espaços  ", "fim\n", "\r\n",
    _NOTE, unicodedata.normalize("NFD", _NOTE), _NOTE.upper(),
    "Ação, coração, pôde, às, ç Ç ã õ é ê í ó ú ü à", unicodedata.normalize("NFD", "ação às não"),
    "PA 130x80 mmHg, FC 88 bpm, FR 18 irpm, SpO2 96%, Tax 36,7 °C, IMC 30,5 kg/m²",
    "Leucócitos 6,17×10⁹/L; plaquetas 265.000/mm³; TSH 2,1 µUI/mL; B12 310 pg/mL; 5 μg",
    "Noradrenalina 0,1 µg/kg/min EV em BIC; AAS 100 mg VO 1x/dia; dipirona 1 g 6/6h S/N",
    "HAS, DM2, IAM c/ SST, AVCi, DPOC, ICC NYHA III, IRC estágio 3b, TEV/TVP, s/p PO",
    "CID-10: I21.9, J44.1, E11.9, N18.3, Z95.5", "Hb 10,2 g/dL | Ht 31% | VCM 72 fL | RDW 20%",
    "01/02/2024 14:35 - 7º DIH, 1ª consulta, D0–D3, 12h–14h", "Na⁺ 139; K⁺ 4,4; HCO₃⁻ 22; pH 7,35",
    "EF: BEG, LOTE, AAA, corado(a) 2+/4+, RCR 2T BNF s/ sopros; MV+ bilat. s/ RA",
    "🩺 paciente 👩🏽‍⚕️ estável ❤️", "naïve — “aspas” ‘simples’ … • ½ ± ≥ ≤ → α β",
    "漢字 кириллица العربية",
    "<s>texto</s> <unk> <0x0A> [INST] ajuda [/INST] <<SYS>> </s><s>", "\u200b\u00a0\ufeffinvisível",
    "\u2581sublinha▁do SentencePiece", "a" * 70, "1234567890" * 4, "=====-----_____.....",
)  # fmt: skip

_VOCABULARY = "tokenizer.ggml."
_ARRAYS = ("tokens", "scores", "token_type")


class Tokenizer:
    """The tokenizer of the original: SentencePiece's, and before it what the JSON files add."""

    def __init__(self, original: Original) -> None:
        from sentencepiece import SentencePieceProcessor

        config = original.tokenizer_config
        self.pieces: SentencePieceProcessor = SentencePieceProcessor(
            model_file=str(original.model["tokenizer.model"])
        )
        self.rows: int = original.config["vocab_size"]
        self.adds_bos = config.get("add_bos_token") is not False
        self.adds_eos = config.get("add_eos_token") is True
        prefix = config.get("add_prefix_space")
        self.adds_prefix = prefix if isinstance(prefix, bool) else None
        # SentencePiece always puts the prefix that its model asks for.
        self.comparable = self.adds_prefix is not False
        self._ids = original.added_tokens
        #: Id -> text of what the JSON files add; pieces may be among it.
        self.added = {id_: text for text, id_ in self._ids.items()}
        self.special = original.special_tokens
        words = self._ids.keys() - self.special
        self._words = _any_of(words)
        self._all = _any_of({*words, *self.special, *self.controls()})
        self.bos = self._id_of(config.get("bos_token"), self.pieces.bos_id())
        self.eos = self._id_of(config.get("eos_token"), self.pieces.eos_id())
        self.unknown = self._id_of(config.get("unk_token"), self.pieces.unk_id())
        self.padding = self._id_of(config.get("pad_token"), -1)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text, with BOS and EOS as the tokenizer adds them.

        Args:
            text: any text.
            special: whether control tokens written in the text count as such.
        """
        bos = [self.bos] if self.adds_bos else []
        ids = [id_ for part in self._parts(text, special=special) for id_ in part]
        return bos + ids + ([self.eos] if self.adds_eos else [])

    def piece(self, id_: int) -> str | None:
        """Return a piece of tokenizer.model; None if it has none of that id."""
        return self.pieces.id_to_piece(id_) if 0 <= id_ < self.pieces.vocab_size() else None

    def text(self, id_: int) -> str:
        """Return a token as the files name it; empty if they do not."""
        return self.added.get(id_) or self.piece(id_) or ""

    def controls(self) -> Iterator[str]:
        """Yield the pieces that are no text."""
        for id_ in range(self.pieces.vocab_size()):
            if self.pieces.is_control(id_) or self.pieces.is_unknown(id_):
                yield self.pieces.id_to_piece(id_)

    def _parts(self, text: str, *, special: bool) -> Iterator[Sequence[int]]:
        """Yield the ids of added tokens, and of what stands between them.

        SentencePiece puts its prefix before each part, as llama.cpp does, and transformers with
        tokenizers that are "legacy".
        """
        pattern = self._all if special else self._words
        for i, part in enumerate(pattern.split(text) if pattern else [text]):
            if i % 2:
                yield (self._id_of(part, -1),)
            elif part:
                yield self.pieces.encode(part)

    def _id_of(self, token: Any, own: int) -> int:
        """Return the id of a token that the configuration names; the model's own if it does not."""
        text = token.get("content") if isinstance(token, Mapping) else token
        if not isinstance(text, str):
            return own
        if text in self._ids:
            return self._ids[text]
        id_: int = self.pieces.piece_to_id(text)
        return id_ if self.piece(id_) == text else own


def _any_of(texts: Collection[str]) -> re.Pattern[str] | None:
    """Return what finds any of some texts, the longest first; None if there are none."""
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def check_vocabulary(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> Check:
    """Compare the header's tokens and scores with tokenizer.model."""
    wrong = list(_vocabulary_problems(metadata, tokenizer))
    more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
    detail = wrong[0] + more if wrong else f"{tokenizer.pieces.vocab_size()} pieces are the same"
    return Check("tokens.vocabulary", len(wrong), "= 0 differ", not wrong, detail)


def check_ids(ids: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Check:
    """Compare llama.cpp's ids of :data:`STRINGS` with SentencePiece's."""
    wrong = [
        text
        for text, found in zip(STRINGS, ids, strict=True)
        if list(found) != tokenizer.encode(text)
    ]
    detail = f"{len(STRINGS)} strings give the same ids"
    if wrong:
        detail = f"{len(wrong)} of {len(STRINGS)} strings differ, the first is {shown(wrong[0])}"
    return Check("tokens.ids", len(wrong), "= 0 differ", not wrong, detail)


def _vocabulary_problems(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    expected = dict(_expected_flags(tokenizer))
    arrays = {f"{_VOCABULARY}{name}" for name in _ARRAYS}
    unknown = dict.fromkeys(
        key for key in metadata if key.startswith("tokenizer.") and key not in arrays
    )
    for key, value in (unknown | expected).items():
        if metadata.get(key) != value:
            yield f"{key} is {shown(metadata.get(key))}, the tokenizer says {value}"
    tokens, scores, types = (metadata.get(f"{_VOCABULARY}{name}", ()) for name in _ARRAYS)
    if {len(tokens), len(scores), len(types)} != {tokenizer.rows}:
        yield f"{len(tokens)} tokens and {len(scores)} scores, the model has {tokenizer.rows}"
        return
    for id_, found in enumerate(zip(tokens, scores, types, strict=True)):
        yield from _token_problem(id_, *found, tokenizer)


def _token_problem(
    id_: int, text: str, score: float, kind: int, tokenizer: Tokenizer
) -> Iterator[str]:
    added, piece = tokenizer.added.get(id_), tokenizer.piece(id_)
    expected = tokenizer.text(id_)
    # An added word is written with blanks, as text has them.
    words = (expected, expected if added is None else added.replace("\u2581", " "))
    if expected and text not in words:
        yield f"token {id_} is {shown(text)}, not {shown(expected)}"
        return
    if added is None and piece is not None:
        own = tokenizer.pieces.get_score(id_)
        if np.float32(score) != np.float32(own):
            yield f"token {id_} has the score {score:g}, not {own:g}"
    allowed = list(_kinds(id_, tokenizer))
    if kind not in allowed:
        kinds = " or ".join(map(_name, allowed))
        yield f"token {id_} is of the type {_name(kind)}, not {kinds}"


def _kinds(id_: int, tokenizer: Tokenizer) -> Iterator[TokenType]:
    """Yield the types that a token may have."""
    added, piece = tokenizer.added.get(id_), tokenizer.piece(id_)
    if added is not None:
        yield TokenType.CONTROL
        if added not in tokenizer.special:
            yield TokenType.USER_DEFINED
    if piece is not None and added in (None, piece):
        yield _kind_of_piece(id_, tokenizer.pieces)
    elif added is None:
        yield TokenType.UNUSED


def _kind_of_piece(id_: int, pieces: SentencePieceProcessor) -> TokenType:
    if pieces.is_unknown(id_):
        return TokenType.UNKNOWN
    if pieces.is_control(id_):
        return TokenType.CONTROL
    if pieces.is_unused(id_):
        return TokenType.UNUSED
    return TokenType.BYTE if pieces.is_byte(id_) else TokenType.NORMAL


def _name(kind: int) -> str:
    names = {int(known): known.name.lower().replace("_", "-") for known in TokenType}
    return names.get(kind) or str(kind)


def _expected_flags(tokenizer: Tokenizer) -> Iterator[tuple[str, Any]]:
    yield f"{_VOCABULARY}model", "llama"
    yield f"{_VOCABULARY}pre", "default"
    yield f"{_VOCABULARY}add_space_prefix", tokenizer.adds_prefix
    yield f"{_VOCABULARY}add_bos_token", tokenizer.adds_bos
    yield f"{_VOCABULARY}add_eos_token", tokenizer.adds_eos
    for role in ("bos", "eos", "unknown", "padding"):
        id_ = getattr(tokenizer, role)
        yield f"{_VOCABULARY}{role}_token_id", id_ if id_ >= 0 else None
