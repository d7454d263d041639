"""tokenizer.model -> the token arrays of a GGUF file.

The rule for vocabularies of different sizes, stated once: the rows of the embedding decide. Ids
the tokenizer does not know become unused ``[PADn]`` tokens; added tokens take their ids; an added
token without a row is left out with a notice; pieces without a row are an error. The arrays equal
those of llama.cpp's ``_create_vocab_sentencepiece``, with one thing more: added tokens that only
tokenizer.json names, where llama.cpp does not look for them. Knows nothing of weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFValueType, Keys, TokenType

from medllm_pack.errors import VocabularyError, shown
from medllm_pack.files import read_small
from medllm_pack.gguf.added import (
    CONFIG,
    FAST,
    MODEL,
    Added,
    added_in,
    decoded,
    looks_special,
    no_model,
    read_json,
)
from medllm_pack.gguf.layout import Entry

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_PAD_SCORE, _ADDED_SCORE = -10000.0, -1000.0  # llama.cpp's conversion uses these two


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, and what to know about them.

    Attributes:
        tokens, scores, types: one entry an id.
        special: ids by role (``bos``, ``eos``, ``unknown``, ``padding``).
        add_bos, add_eos: whether the tokenizer adds them itself.
        add_space_prefix: whether a space is put before the text; None: llama.cpp's default.
        notices: what was decided on the way, for the user.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    notices: tuple[str, ...]

    def metadata(self) -> tuple[Entry, ...]:
        """Return the ``tokenizer.ggml.*`` pairs."""
        t, text, flag = Keys.Tokenizer, GGUFValueType.STRING, GGUFValueType.BOOL
        ids = {
            "bos": t.BOS_ID, "eos": t.EOS_ID, "unknown": t.UNK_ID, "padding": t.PAD_ID,
        }  # fmt: skip
        prefix = self.add_space_prefix
        return (
            *((Entry(t.ADD_PREFIX, flag, prefix),) if prefix is not None else ()),
            Entry(t.MODEL, text, "llama"),
            Entry(t.PRE, text, "default"),
            Entry(t.LIST, text, self.tokens),
            Entry(t.SCORES, GGUFValueType.FLOAT32, self.scores),
            Entry(t.TOKEN_TYPE, GGUFValueType.INT32, self.types),
            *(Entry(ids[role], GGUFValueType.UINT32, id_) for role, id_ in self.special.items()),
            Entry(t.ADD_BOS, flag, self.add_bos),
            Entry(t.ADD_EOS, flag, self.add_eos),
        )


def read_vocabulary(files: Mapping[str, Path], *, rows: int) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        files: the checkpoint's files by name; ``tokenizer.model`` must be there.
        rows: rows of the embedding, which decide the size of the vocabulary.

    Raises:
        VocabularyError: if there is no usable tokenizer, or it does not fit the embedding.
    """
    fast = read_json(files, FAST)
    if MODEL not in files:
        raise VocabularyError(no_model(fast))
    config = read_json(files, CONFIG)
    table = _Table(rows)
    processor = _load(files[MODEL])
    table.put_pieces(processor)
    table.put_fast(added_in(fast))
    table.put_added(read_json(files, "added_tokens.json"), config.get("added_tokens_decoder") or {})
    table.check()
    special = dict(_special(table, processor, config))
    prefix = config.get("add_prefix_space")
    adds_eos = _flag(config, "add_eos_token", default=False)
    if adds_eos:
        table.notices.append(
            f"{CONFIG} sets add_eos_token, as for training: an end of text would stand behind "
            "every prompt, and no answer follow; set it to false"
        )
    return Vocabulary(
        tokens=tuple(table.tokens),
        scores=tuple(table.scores),
        types=tuple(table.types),
        special=special,
        add_bos=_flag(config, "add_bos_token", default=True),
        add_eos=adds_eos,
        add_space_prefix=prefix if isinstance(prefix, bool) else None,
        notices=tuple(table.notices),
    )


def _special(
    table: _Table, processor: SentencePieceProcessor, config: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """Yield ids by role: what tokenizer_config.json names, else what the pieces say."""
    for role, key, own in (
        ("bos", "bos_token", processor.bos_id()),
        ("eos", "eos_token", processor.eos_id()),
        ("unknown", "unk_token", processor.unk_id()),
        ("padding", "pad_token", -1),
    ):
        text = _token_text(config.get(key))
        id_ = table.find(text)
        if id_ is None and text and role != "padding":
            table.notices.append(
                f"{CONFIG} names {shown(text)} as {key}, which has no row; the one of {MODEL} is "
                "taken"
            )
        elif id_ is not None and own not in (id_, -1):
            table.notices.append(
                f"{key} is {shown(text)} (id {id_}), as {CONFIG} says; {MODEL} has id {own}"
            )
        id_ = own if id_ is None else id_
        if id_ >= 0:
            yield role, id_


class _Table:
    """The three arrays while they are filled."""

    def __init__(self, rows: int) -> None:
        self.tokens = [f"[PAD{i}]" for i in range(rows)]
        self.scores = [_PAD_SCORE] * rows
        self.types = [int(TokenType.UNUSED)] * rows
        self.notices: list[str] = []

    def put_pieces(self, processor: SentencePieceProcessor) -> None:
        n = processor.vocab_size()
        if n > len(self.tokens):
            raise VocabularyError(
                f"{MODEL} has {n} pieces, the embedding {len(self.tokens)} rows; "
                "they belong to different models"
            )
        for id_ in range(n):
            self.tokens[id_] = processor.id_to_piece(id_)
            self.scores[id_] = processor.get_score(id_)
            self.types[id_] = _piece_type(processor, id_)
        if n < len(self.tokens):
            self.notices.append(
                f"the embedding has {len(self.tokens)} rows, {MODEL} {n} pieces; the rows decide: "
                "ids above the pieces hold added tokens or are marked unused"
            )

    def put_fast(self, entries: list[Added]) -> None:
        # Those that are pieces as well keep the score and the type of the piece.
        for id_, text, special in entries:
            if self._has_row(id_, text) and self.tokens[id_] != text:
                self._put_entry(id_, text, special)

    def put_added(self, added: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
        for text, id_ in added.items():
            if self._has_row(id_, text):
                self._put(id_, text, TokenType.USER_DEFINED)
        for id_, text, special in decoded(decoder):
            if self._has_row(id_, text):
                self._put_entry(id_, text, special)

    def _put_entry(self, id_: int, text: str, special: bool) -> None:
        if special or looks_special(text):
            self._put(id_, text, TokenType.CONTROL)
        else:
            self._put(id_, text.replace("▁", " "), TokenType.USER_DEFINED)

    def find(self, text: str | None) -> int | None:
        return self.tokens.index(text) if text in self.tokens else None

    def check(self) -> None:
        """Refuse what makes llama.cpp abort or misread: see the GGUF rows of its own tests."""
        for problem in self._problems():
            raise VocabularyError(problem)

    def _problems(self) -> Iterator[str]:
        if len(set(self.tokens)) != len(self.tokens):
            double = next(text for text in self.tokens if self.tokens.count(text) > 1)
            yield f"the vocabulary holds the token {shown(double)} twice; llama.cpp would abort"
        if "" in self.tokens:
            yield f"the vocabulary holds an empty token (id {self.tokens.index('')})"
        if not all(map(math.isfinite, self.scores)):
            yield f"{MODEL} holds a score that is not a number"
        n_bytes = self.types.count(TokenType.BYTE)
        if n_bytes != 256:
            yield (
                f"{MODEL} has {n_bytes} of the 256 byte tokens; without byte fallback, text with "
                "unknown characters could not be written"
            )

    def _has_row(self, id_: Any, text: str) -> bool:
        if type(id_) is not int or id_ < 0:
            raise VocabularyError(f"the added token {shown(text)} has the id {shown(id_)}")
        if id_ < len(self.tokens):
            return True
        notice = (
            f"the added token {shown(text)} (id {id_}) has no row in the embedding of "
            f"{len(self.tokens)} rows; it is left out"
        )
        if notice not in self.notices:  # several files may name it
            self.notices.append(notice)
        return False

    def _put(self, id_: int, text: str, kind: TokenType) -> None:
        self.tokens[id_], self.scores[id_], self.types[id_] = text, _ADDED_SCORE, int(kind)


def _load(path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    data = read_small(path)
    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError, OSError) as error:
        raise VocabularyError(
            f"{MODEL} is not a SentencePiece model ({len(data)} bytes)"
        ) from error


def _piece_type(processor: SentencePieceProcessor, id_: int) -> int:
    if processor.is_unknown(id_):
        return int(TokenType.UNKNOWN)
    if processor.is_control(id_):
        return int(TokenType.CONTROL)
    if processor.is_unused(id_):
        return int(TokenType.UNUSED)
    if processor.is_byte(id_):
        return int(TokenType.BYTE)
    return int(TokenType.NORMAL)


def _flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key)
    return value if isinstance(value, bool) else default


def _token_text(value: Any) -> str | None:
    """Return the text of a token that tokenizer_config.json gives as a string or an object."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None
