"""The papers of a pack: pack.json alone decides them, whoever writes them and when."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from medllm_pack.errors import SourceError
from medllm_pack.pack import papers
from medllm_pack.pack.card import card
from medllm_pack.pack.manifest import read_manifest
from tests.test_build import check_sums, run

FIGURES = {"kld_mean": 0.00123, "kld_p99": 0.5, "top1": 0.98765, "ppl": 6.1568, "ppl_ratio": 1.02}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A pack of merged weights."""
    out = tmp_path_factory.mktemp("papers") / "pack"
    run(out, quants=["f16", "q8_0"], merged=llama_folder)
    return out


@pytest.fixture
def pack(built: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(built, tmp_path / "pack"))


def with_verdict(document: dict[str, Any], **second: object) -> dict[str, Any]:
    """Return a document whose first variant passed and whose second is as said."""
    first = {"quant": "f16", "passed": True, "failed": None, **FIGURES}
    other = {"quant": "q8_0", "passed": True, "failed": None, **FIGURES, **second}
    parity = {
        "passed": other["passed"],
        "texts": {"name": "notes", "count": 16, "sha256": "0" * 64},
        "variants": [first, other],
    }
    return document | {"parity": parity}


def contents(pack: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pack.iterdir()}


def test_build_writes_what_pack_json_alone_decides(built: Path) -> None:
    document = json.loads((built / "pack.json").read_text(encoding="utf-8"))
    texts = papers.derived(document)
    assert set(texts) >= {"pack.json", "README.md"}
    for name, text in texts.items():
        assert (built / name).read_text(encoding="utf-8") == text
    assert "same model" not in texts["README.md"]
    check_sums(built)


def test_update_without_a_change_changes_nothing(pack: Path) -> None:
    before = contents(pack)
    papers.update(pack, read_manifest(pack), {})
    assert contents(pack) == before


def test_update_keeps_sums_and_papers_in_step(pack: Path) -> None:
    before = contents(pack)
    document = with_verdict(read_manifest(pack))
    papers.update(pack, document, {"more.txt": "é\n"})
    after = contents(pack)
    check_sums(pack)
    assert read_manifest(pack) == document
    assert after["README.md"].decode() == papers.derived(document)["README.md"]
    assert "  pack.json\n" in (pack / "SHA256SUMS").read_text()
    assert "more.txt" in (pack / "SHA256SUMS").read_text()
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed >= {"README.md", "pack.json", "SHA256SUMS", "more.txt"}
    assert not changed & {p.name for p in pack.glob("*.gguf")}


def test_card_says_the_verdict_and_the_figures(built: Path) -> None:
    document = read_manifest(built)
    text = card(with_verdict(document))
    assert "Yes: every variant passed." in text
    assert "| f16 | 1.23e-03 | 5.00e-01 | 98.77% | 6.1568 | 1.0200 | passed |" in text
    failed = with_verdict(document, passed=False, failed="merge.pairs", kld_mean=None, ppl="inf")
    text = card(failed)
    assert "**No: a variant failed.**" in text
    assert "| q8_0 | – | 5.00e-01 | 98.77% | – | 1.0200 | **failed** at merge.pairs |" in text
    without = card(document).split("## ")
    assert [part for part in text.split("## ") if not part.startswith("Is it")] == without


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda document: document["recipe"].update(future=1), "recipe .* future: there is no"),
        (lambda document: document.pop("template"), "pack.json lacks 'template'"),
        (lambda document: document["variants"].clear(), "pack.json names no variant"),
        (lambda document: document.update(recipe=None), "recipe in pack.json"),
    ],
)
def test_document_that_is_not_understood_is_refused_and_nothing_changes(
    pack: Path, spoil: Any, said: str
) -> None:
    document = read_manifest(pack)
    spoil(document)
    before = contents(pack)
    with pytest.raises(SourceError, match=said):
        papers.update(pack, document, {"more.txt": ""})
    assert contents(pack) == before


def test_damaged_sums_are_refused_and_nothing_changes(pack: Path) -> None:
    (pack / "SHA256SUMS").write_bytes(b"\xff\n")
    before = contents(pack)
    with pytest.raises(SourceError, match="line 1 of SHA256SUMS"):
        papers.update(pack, read_manifest(pack), {"more.txt": ""})
    assert contents(pack) == before
