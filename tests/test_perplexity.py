"""Our figures against those that llama.cpp's own llama-perplexity printed, without running it.

``python -m benchmarks.perplexity --llama-perplexity PATH --write tests/golden/perplexity.json``
wrote the figures that are compared here, and compares both on the spot.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from benchmarks import perplexity
from medllm_pack import resources

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "perplexity.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    """Ids of the text as SentencePiece cuts it, BOS first."""
    model = resources.folder("examples/tiny/base") / "tokenizer.model"
    pieces = SentencePieceProcessor(model_file=str(model))
    count = perplexity.CONTEXT * perplexity.CHUNKS
    return [pieces.bos_id(), *pieces.encode(perplexity.text())][:count]


@pytest.fixture(scope="module")
def figures(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[int]
) -> dict[str, dict[str, float]]:
    """Our figures of every variant against F16."""
    files = perplexity.build_tiny(tmp_path_factory.mktemp("perplexity") / "pack")
    return perplexity.our_figures(files, perplexity.chunks(tokens), threads=1)


def test_golden_figures_are_of_this_text_and_these_ids(tokens: list[int]) -> None:
    assert hashlib.sha256(perplexity.text().encode()).hexdigest() == GOLDEN["text_sha256"]
    assert hashlib.sha256(json.dumps(tokens).encode()).hexdigest() == GOLDEN["tokens_sha256"]
    assert (GOLDEN["context"], GOLDEN["chunks"]) == (perplexity.CONTEXT, perplexity.CHUNKS)


@pytest.mark.parametrize("quant", perplexity.VARIANTS)
def test_our_figures_are_llama_perplexitys_within_its_16_bits(
    figures: dict[str, dict[str, float]], quant: str
) -> None:
    ours, theirs = figures[quant], GOLDEN["variants"][quant]
    same = perplexity.kernels() == GOLDEN["kernels"]  # elsewhere the logits themselves differ
    positions = perplexity.CHUNKS * (perplexity.CONTEXT // 2 - 1)
    assert ours["tokens"] == positions
    assert set(theirs) == set(perplexity.LINES.values())
    for name, value in theirs.items():
        allowed = perplexity.tolerance(name, value, positions, same=same)
        assert ours[name] == pytest.approx(value, rel=0, abs=allowed), name


def test_tolerance_is_far_below_what_it_compares() -> None:
    """A mean divergence of the smallest loss, Q8_0, is known to two in a hundred at least."""
    theirs, positions = GOLDEN["variants"]["q8_0"], 2032
    assert perplexity.tolerance("kld_mean", 0, positions) < theirs["kld_mean"] / 50
    assert perplexity.tolerance("ppl_ratio", 1, positions) < (theirs["ppl_ratio"] - 1) / 50
