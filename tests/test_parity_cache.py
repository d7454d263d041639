"""The cache of the reference: computed once, believed by digest only, bounded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medllm_pack import files
from medllm_pack.parity import cache
from medllm_pack.parity.cache import Cache
from medllm_pack.parity.ways import ON_CPU

SEQUENCES = [[1, 2, 3], [1, 2], [1, 2, 3]]


class Reference:
    """Writes logits that follow from the ids, and counts what it was asked."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.asked = folder, 0

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[Path]:
        paths = []
        for ids in sequences:
            paths.append(self.folder / f"{self.asked}.npy")
            np.save(paths[-1], np.outer(ids, np.arange(100, dtype=np.float32)))
            self.asked += 1
        return paths


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    return Reference(tmp_path / "reference")


def logits(place: Path, reference: Reference, *, key: str = "k", **more: int) -> list[Any]:
    kept = Cache(place, lambda: key, **more)
    with kept.used():
        paths = kept.logits(SEQUENCES, reference)
        assert [np.load(path)[:, 1].tolist() for path in paths] == SEQUENCES
        return paths


def test_second_check_computes_nothing_and_reads_the_same(
    tmp_path: Path, reference: Reference
) -> None:
    logits(tmp_path / "c", reference)
    asked = reference.asked
    paths = logits(tmp_path / "c", reference)
    assert reference.asked == asked
    assert {path.parent for path in paths} == {tmp_path / "c"}
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0


def test_other_model_shares_nothing(tmp_path: Path, reference: Reference) -> None:
    logits(tmp_path / "c", reference)
    asked = reference.asked
    logits(tmp_path / "c", reference, key="other")
    assert reference.asked == 2 * asked


def test_file_that_was_changed_is_not_believed(tmp_path: Path, reference: Reference) -> None:
    logits(tmp_path / "c", reference)
    asked = reference.asked
    for path in (tmp_path / "c").glob("*.npy"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    logits(tmp_path / "c", reference)  # the values are compared in there
    assert reference.asked == 2 * asked


def test_cache_stays_below_its_limit_and_drops_the_oldest(
    tmp_path: Path, reference: Reference
) -> None:
    for when, key in enumerate("abcd"):
        logits(tmp_path / "c", reference, key=key, limit=16000)
        assert sum(path.stat().st_size for path in (tmp_path / "c").glob("*.npy")) <= 16000
        for path in (tmp_path / "c").glob("*.npy"):  # clocks of file systems are coarse
            if path.stat().st_mtime > 9:
                os.utime(path, (when, when))
    asked = reference.asked
    logits(tmp_path / "c", reference, key="d", limit=16000)
    assert reference.asked == asked


def test_what_does_not_fit_is_not_kept(tmp_path: Path, reference: Reference) -> None:
    logits(tmp_path / "c", reference, limit=100)
    assert not list((tmp_path / "c").glob("*.npy"))


def test_nothing_is_removed_while_another_reads(tmp_path: Path, reference: Reference) -> None:
    with Cache(tmp_path / "c", lambda: "k").used():
        logits(tmp_path / "c", reference)
        logits(tmp_path / "c", reference, key="x", limit=10)
        assert list((tmp_path / "c").glob("*.npy"))


def test_what_went_another_way_is_kept_under_its_own_key(
    tmp_path: Path, reference: Reference
) -> None:
    """Memory may run out on a device, and another takes over."""
    way = ["device"]

    def compute(sequences: Sequence[Sequence[int]]) -> list[Path]:
        way[0] = "cpu"
        return reference(sequences)

    kept = Cache(tmp_path / "c", lambda: way[0])
    with kept.used():
        [path, *_] = kept.logits(SEQUENCES, compute)
        assert np.load(path)[:, 1].tolist() == SEQUENCES[0]
    asked = reference.asked
    logits(tmp_path / "c", reference, key="cpu")
    assert reference.asked == asked
    logits(tmp_path / "c", reference, key="device")
    assert reference.asked == 2 * asked


def test_key_names_inputs_libraries_code_and_way(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {"inputs": [{"role": "base", "files": [{"name": "a", "sha256": "0"}]}]}
    way = ON_CPU.document()
    keys = {cache.model_key(manifest, way)}
    keys.add(cache.model_key(manifest, replace(ON_CPU, whole=True).document()))
    keys.add(cache.model_key(manifest, replace(ON_CPU, title="NVIDIA H100").document()))
    other = {"inputs": [{"role": "base", "files": [{"name": "a", "sha256": "1"}]}]}
    keys.add(cache.model_key(other, way))
    monkeypatch.setattr(cache, "version", lambda name: f"{name} 9")
    keys.add(cache.model_key(manifest, way))
    monkeypatch.setattr(files, "sha256", str)
    keys.add(cache.model_key(manifest, way))
    assert len(keys) == 6
