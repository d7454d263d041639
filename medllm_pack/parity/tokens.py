"""Rungs *settings* and *tokens*: what the header says, and how llama.cpp cuts text into ids.

SentencePiece reads tokenizer.model itself and is the judge; transformers reads config.json. The
strings are what clinical Portuguese is made of, and what breaks tokenizers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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

# GGUF key -> attribute of transformers' configuration.
_SETTINGS = {
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.vocab_size": "vocab_size",
}


class Tokenizer:
    """The tokenizer of the original, as SentencePiece reads it."""

    def __init__(self, original: Original) -> None:
        from sentencepiece import SentencePieceProcessor

        config = original.tokenizer_config
        self.pieces: SentencePieceProcessor = SentencePieceProcessor(
            model_file=str(original.model["tokenizer.model"])
        )
        self.adds_bos = config.get("add_bos_token") is not False
        self.adds_eos = config.get("add_eos_token") is True
        # SentencePiece always puts the prefix that its model asks for.
        self.comparable = config.get("add_prefix_space") is not False
        self.added = {int(key) for key in config.get("added_tokens_decoder") or {}}
        added = original.added_tokens
        self.bos = self._id_of(config.get("bos_token"), added, self.pieces.bos_id())
        self.eos = self._id_of(config.get("eos_token"), added, self.pieces.eos_id())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with BOS and EOS as the tokenizer adds them."""
        ids: list[int] = self.pieces.encode(text)
        bos = [self.bos] if self.adds_bos else []
        return bos + ids + ([self.eos] if self.adds_eos else [])

    def _id_of(self, token: Any, added: Mapping[str, int], own: int) -> int:
        """Return the id of a token that the configuration names; the model's own if it does not."""
        text = token.get("content") if isinstance(token, Mapping) else token
        if not isinstance(text, str):
            return own
        if text in added:
            return added[text]
        id_: int = self.pieces.piece_to_id(text)
        return own if self.pieces.is_unknown(id_) else id_


def check_settings(metadata: Mapping[str, Any], original: Original) -> Check:
    """Compare the header's hyperparameters with config.json as transformers reads it."""
    wrong = [
        f"{key} is {shown(metadata.get(key))}, the model has {expected}"
        for key, expected in _expected_settings(original)
        if not _same(metadata.get(key), expected)
    ]
    return Check("settings", len(wrong), "= 0 differ", not wrong,
                 "; ".join(wrong) or "the header says what config.json says")  # fmt: skip


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


def _expected_settings(original: Original) -> Iterator[tuple[str, Any]]:
    config = original.transformers_config()
    yield "general.architecture", "llama"
    for key, attribute in _SETTINGS.items():
        yield key, getattr(config, attribute)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        yield f"llama.{key}", head_dim
    base, factor = _rope(config)
    yield "llama.rope.freq_base", base
    yield "llama.rope.scaling.factor", factor


def _rope(config: Any) -> tuple[float, float | None]:
    """Return base and linear factor; transformers 5 keeps both together, 4 did not."""
    scaling = getattr(config, "rope_parameters", None) or config.rope_scaling or {}
    base = scaling.get("rope_theta") or config.rope_theta
    return float(base), scaling.get("factor") if scaling.get("rope_type") == "linear" else None


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, float):
        return bool(np.float32(found) == np.float32(expected))
    return bool(found == expected)


def _vocabulary_problems(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    pieces = tokenizer.pieces
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    scores = metadata.get("tokenizer.ggml.scores", ())
    if min(len(tokens), len(scores)) < pieces.vocab_size():
        yield f"{len(tokens)} tokens and {len(scores)} scores, tokenizer.model has more pieces"
        return
    for key, expected in _expected_flags(tokenizer):
        if metadata.get(key) != expected:
            yield f"{key} is {shown(metadata.get(key))}, the tokenizer says {expected}"
    for id_ in set(range(pieces.vocab_size())) - tokenizer.added:
        if tokens[id_] != pieces.id_to_piece(id_):
            yield f"token {id_} is {shown(tokens[id_])}, not {shown(pieces.id_to_piece(id_))}"
        elif np.float32(scores[id_]) != np.float32(pieces.get_score(id_)):
            yield f"token {id_} has the score {scores[id_]:g}, not {pieces.get_score(id_):g}"


def _expected_flags(tokenizer: Tokenizer) -> Iterator[tuple[str, Any]]:
    yield "tokenizer.ggml.model", "llama"
    yield "tokenizer.ggml.add_bos_token", tokenizer.adds_bos
    yield "tokenizer.ggml.add_eos_token", tokenizer.adds_eos
    yield "tokenizer.ggml.bos_token_id", tokenizer.bos
    yield "tokenizer.ggml.eos_token_id", tokenizer.eos
