"""What a tokenizer's JSON files add to its pieces, whichever version of transformers wrote them.

Version 4 wrote added_tokens.json, and ``added_tokens_decoder`` in tokenizer_config.json; version 5
leaves them to tokenizer.json. Knows nothing of SentencePiece, or of how many rows a model has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medllm_pack.errors import VocabularyError, shown
from medllm_pack.files import read_small
from medllm_pack.gguf.llama import OTHERS

MODEL = "tokenizer.model"
FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_FAST_LIMIT = 64 << 20  # Llama 3's has 17 MB

Added = tuple[Any, str, bool]  # id, text, whether it is special


def added_tokens(files: Mapping[str, Path]) -> dict[str, int]:
    """Return the tokens that a folder's JSON files add, by text; empty without a tokenizer.

    Raises:
        VocabularyError: if one of the files is damaged.
    """
    decoder = read_json(files, CONFIG).get("added_tokens_decoder") or {}
    entries = [*added_in(read_json(files, FAST)), *decoded(decoder)]
    return {**read_json(files, "added_tokens.json"), **{text: id_ for id_, text, _ in entries}}


def no_model(fast: Mapping[str, Any]) -> str:
    """Say what to do without tokenizer.model, from what tokenizer.json is."""
    if "ByteLevel" in json.dumps([fast.get("pre_tokenizer"), fast.get("decoder")]):
        return (
            f"the tokenizer cuts bytes ({FAST}, as of Llama 3 and Qwen); those of SentencePiece, "
            f"as of LLaMA-2 and Mistral 7B, are packed. {OTHERS}"
        )
    instead = f", {FAST} alone, which is what transformers 5 saves" if fast else ""
    return (
        f"there is no {MODEL}{instead}; LLaMA-2 and Mistral checkpoints carry this SentencePiece "
        "file. Copy it from the base model; added tokens are read from the JSON files"
    )


def added_in(fast: Mapping[str, Any]) -> list[Added]:
    """Return what tokenizer.json adds; some of its pieces, such as ``<s>``, are among it."""
    entries = fast.get("added_tokens") or []
    if not isinstance(entries, list):
        raise VocabularyError(f"{FAST}: its added tokens are no list")
    return [_entry(entry, entry, FAST) for entry in entries]


def decoded(decoder: Any) -> Iterator[Added]:
    """Yield what ``added_tokens_decoder`` adds."""
    if not isinstance(decoder, Mapping):
        raise VocabularyError(f"{CONFIG}: added_tokens_decoder is no table")
    for key, entry in decoder.items():
        yield _entry({"id": int(key) if key.isdecimal() else -1}, entry, CONFIG, key)


def _entry(place: Any, entry: Any, file: str, key: str = "") -> Added:
    if not (isinstance(entry, Mapping) and isinstance(entry.get("content"), str)):
        raise VocabularyError(f"{file}: added token {shown(key)} has no text")
    return place.get("id"), entry["content"], bool(entry.get("special"))


def looks_special(text: str) -> bool:
    """Say whether a token is one of control, though its file does not say so."""
    # llama.cpp's does_token_look_special: tokens that some models forget to mark.
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))  # noqa: RUF001
        or (text.startswith("<unused") and text.endswith(">"))
    )


def read_json(files: Mapping[str, Path], name: str) -> Mapping[str, Any]:
    """Return the content of one of the files; empty if it is not there.

    Raises:
        VocabularyError: if it is not a JSON object.
    """
    if name not in files:
        return {}
    try:
        document = json.loads(read_small(files[name], limit=_FAST_LIMIT))
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(document, Mapping):
        raise VocabularyError(f"{name} is not a JSON object")
    return document
