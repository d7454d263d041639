"""The strict safetensors reader, against the safetensors library."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from medllm_pack.errors import CheckpointError, SourceError
from medllm_pack.known import Identity
from medllm_pack.weights import safetensors
from medllm_pack.weights.checkpoint import Checkpoint
from medllm_pack.weights.safetensors import TensorFile
from tests import pico


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def raw(path: Path, header: object, data: bytes = b"", *, text: str | None = None) -> Path:
    encoded = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_values_equal_those_of_the_safetensors_library(tmp_path: Path, dtype: str) -> None:
    import torch

    folder = pico.write_model(tmp_path / "m", dtype=dtype)
    checkpoint = Checkpoint.open(files_of(folder))
    with safe_open(folder / "model.safetensors", "pt") as reference:
        assert set(checkpoint.tensors) == set(reference.keys())
        for name, spec in checkpoint.tensors.items():
            expected = reference.get_tensor(name).to(torch.float32).numpy()
            got = checkpoint.values(checkpoint.read(name, 0, spec.rows)).astype(np.float32)
            np.testing.assert_array_equal(got.reshape(expected.shape), expected)


def test_rows_of_a_tensor_are_its_slices(llama_folder: Path) -> None:
    checkpoint = Checkpoint.open(files_of(llama_folder))
    name = "model.layers.1.mlp.down_proj.weight"
    whole = load_file(llama_folder / "model.safetensors")[name]
    np.testing.assert_array_equal(checkpoint.values(checkpoint.read(name, 17, 101)), whole[17:101])


def test_shards_read_like_a_single_file(tmp_path: Path) -> None:
    single = Checkpoint.open(files_of(pico.write_model(tmp_path / "one")))
    sharded = Checkpoint.open(files_of(pico.write_model(tmp_path / "three", shards=3)))
    assert set(single.tensors) == set(sharded.tensors)
    for name, spec in single.tensors.items():
        a, b = (c.values(c.read(name, 0, spec.rows)) for c in (single, sharded))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("order", ["file", "reversed", "partly"])
def test_digest_is_that_of_the_file_in_any_reading_order(
    llama_folder: Path, order: str, bypass: bool
) -> None:
    path = llama_folder / "model.safetensors"
    file = TensorFile(path)
    if bypass:
        file.bypass_page_cache()
    specs = {"file": file.tensors, "reversed": file.tensors[::-1], "partly": file.tensors[:3]}
    for spec in specs[order]:
        file.read(spec, 0, spec.rows)
    assert file.digest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("order", ["file", "reversed", "turned"])
def test_reading_every_tensor_reads_every_byte_once(llama_folder: Path, order: str) -> None:
    file = TensorFile(llama_folder / "model.safetensors")
    specs, half = file.tensors, len(file.tensors) // 2
    turned = (*specs[half:], *specs[:half])
    before = _bytes_read()
    for spec in {"file": specs, "reversed": specs[::-1], "turned": turned}[order]:
        for start in range(0, spec.rows, 7):
            file.read(spec, start, min(start + 7, spec.rows))
    file.digest()
    assert _bytes_read() - before <= file.size


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_what_finds_no_room_to_wait_is_read_again_for_the_digest(
    llama_folder: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "WAITING_BYTES", room)
    file = TensorFile(llama_folder / "model.safetensors")
    for spec in (*file.tensors[::-1], *file.tensors[::3]):
        file.read(spec, 0, spec.rows)
        file.read(spec, spec.rows // 2, spec.rows)
        assert sum(data.size for data in file._waiting.values()) == file._waiting_bytes <= room
    content = (llama_folder / "model.safetensors").read_bytes()
    assert file.digest() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("bypass", [False, True])
def test_what_is_far_from_its_turn_waits_in_the_page_cache(
    tmp_path: Path, bypass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gives it once, the process keeps none of it, and nothing is left for the end."""
    monkeypatch.setattr(safetensors, "_NEAR", 100_000)
    monkeypatch.setattr(safetensors, "_SMALL", 0)
    tensors = {f"{i}": np.full((512, 1024), i, dtype=np.float16) for i in range(8)}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    with path.open("rb") as written:
        os.fsync(written.fileno())
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file = TensorFile(path)
    if bypass:
        file.bypass_page_cache()
    before = _counted("read_bytes")
    for spec in (*file.tensors[3:], *file.tensors[:3]):
        for start in range(0, spec.rows, 64):
            data = file.read(spec, start, start + 64).data
            at = spec.offset + start * spec.row_bytes
            assert data.tobytes() == content[at : at + data.size]
        assert file._waiting_bytes <= 100_000
    assert file._hashed == file.size
    assert file.digest() == hashlib.sha256(content).hexdigest()
    assert _counted("read_bytes") - before <= file.size + (256 << 10)
    file.close()


def test_file_cut_short_while_it_waits_for_its_digest_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "_NEAR", 0)
    monkeypatch.setattr(safetensors, "_SMALL", 0)
    folder = pico.write_model(tmp_path / "m")
    file = TensorFile(folder / "model.safetensors")
    for spec in file.tensors[1:]:
        file.read(spec, 0, spec.rows)
    first = file.tensors[0]
    os.truncate(folder / "model.safetensors", first.offset + first.nbytes + 10)
    file.read(first, 0, first.rows)
    with pytest.raises(CheckpointError, match="cut short|changed while"):
        file.digest()
    file.close()


def _bytes_read() -> int:
    return _counted("rchar")


def _counted(name: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


@pytest.mark.parametrize("bypass", [False, True])
def test_file_cut_short_while_read_is_an_error(tmp_path: Path, bypass: bool) -> None:
    folder = pico.write_model(tmp_path / "m")
    file = TensorFile(folder / "model.safetensors")
    if bypass:
        file.bypass_page_cache()
    os.truncate(folder / "model.safetensors", file.size - 100)
    with pytest.raises(CheckpointError, match="cut short"):
        file.read(file.tensors[-1], 0, file.tensors[-1].rows)


@pytest.mark.parametrize("set_back", [False, True])
def test_file_changed_while_read_is_an_error(tmp_path: Path, set_back: bool) -> None:
    path = pico.write_model(tmp_path / "m") / "model.safetensors"
    modified = Identity.settled(path).modified_ns
    file = TensorFile(path)
    with path.open("r+b") as changed:
        changed.seek(-10, os.SEEK_END)
        changed.write(b"0123456789")
    os.utime(path, ns=(1, modified if set_back else 1))
    with pytest.raises(CheckpointError, match="changed while"):
        file.digest()


GOOD = {"w": entry("F16", [2, 2], 0, 8)}
BAD_HEADERS: dict[str, tuple[object, bytes]] = {
    "hole": ({"w": entry("F16", [2], 0, 4), "v": entry("F16", [2], 6, 10)}, bytes(10)),
    "overlap": ({"w": entry("F16", [2], 0, 4), "v": entry("F16", [2], 2, 6)}, bytes(6)),
    "trailing": (GOOD, bytes(9)),
    "truncated": (GOOD, bytes(7)),
    "size": ({"w": entry("F16", [2, 2], 0, 6)}, bytes(6)),
    "negative": ({"w": entry("F16", [2, 2], -8, 0)}, bytes(8)),
    "zero": ({"w": entry("F16", [0, 2], 0, 0)}, b""),
    "integer type": ({"w": entry("I16", [2, 2], 0, 8)}, bytes(8)),
    "fp8": ({"w": entry("F8_E4M3", [2, 4], 0, 8)}, bytes(8)),
    "boolean size": ({"w": entry("F16", [True, 4], 0, 8)}, bytes(8)),
    "float offset": ({"w": entry("F16", [2, 2], 0, 8.0)}, bytes(8)),
    "three dimensions": ({"w": entry("F16", [2, 2, 1], 0, 8)}, bytes(8)),
    "unknown field": ({"w": GOOD["w"] | {"x": 1}}, bytes(8)),
    "escape in name": ({"a\x1b[31m": GOOD["w"]}, bytes(8)),
    "path as name": ({"../../w": GOOD["w"]}, bytes(8)),
    "empty": ({}, b""),
    "list": ([], b""),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_header_that_breaks_a_rule_is_refused(tmp_path: Path, fault: str) -> None:
    header, data = BAD_HEADERS[fault]
    with pytest.raises(CheckpointError):
        TensorFile(raw(tmp_path / "model.safetensors", header, data))


def test_duplicate_tensor_is_refused(tmp_path: Path) -> None:
    text = f'{{"w": {json.dumps(GOOD["w"])}, "w": {json.dumps(GOOD["w"])}}}'
    with pytest.raises(CheckpointError, match="'w' stands twice"):
        TensorFile(raw(tmp_path / "x", None, bytes(8), text=text))


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**24])
def test_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(64))
    with pytest.raises(CheckpointError):
        TensorFile(tmp_path / "x")


@pytest.mark.parametrize("start", [b"\x80\x04\x95", b"PK\x03\x04"])
def test_pickle_under_another_name_is_named_as_such(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(start + os.urandom(100))
    with pytest.raises(CheckpointError, match="pickle"):
        TensorFile(tmp_path / "model.safetensors")


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        TensorFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bypass", [False, True])
def test_bytes_that_the_disk_does_not_give_are_the_inputs_fault(
    tmp_path: Path, bypass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TensorFile(pico.write_model(tmp_path / "m") / "model.safetensors")
    if bypass:
        file.bypass_page_cache()
    spec = file.tensors[-1]

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors' cannot be read at byte \d+: In"
    ):
        file.read(spec, 0, spec.rows)


def test_index_that_is_a_fifo_does_not_hang(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "m", shards=3)
    (folder / "model.safetensors.index.json").unlink()
    os.mkfifo(folder / "model.safetensors.index.json")
    with pytest.raises(SourceError, match="not a regular file"):
        Checkpoint.open(files_of(folder))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        Checkpoint.open(files_of(folder))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin"])
def test_index_cannot_leave_its_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match="plain"):
        Checkpoint.open(files_of(tmp_path))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "m", shards=2)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    first = document["weight_map"].pop("lm_head.weight")
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        Checkpoint.open(files_of(folder))
    document["weight_map"] |= {"lm_head.weight": first, "model.extra.weight": first}
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        Checkpoint.open(files_of(folder))


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_we_accept_the_safetensors_library_accepts(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Mutate one byte of a small file: never a crash, and never laxer than the library."""
    good = raw(tmp_path / "good", GOOD | {"v": entry("F32", [3], 8, 20)}, bytes(20)).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    mutant = bytearray(good)
    mutant[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 12))
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(bytes(mutant[: len(mutant) - cut]))
    try:
        ours = TensorFile(path)
    except CheckpointError:
        return
    names = {spec.name for spec in ours.tensors}
    ours.close()
    try:
        with safe_open(path, "np") as reference:
            assert set(reference.keys()) == names
    except SafetensorError as error:  # pragma: no cover - a finding
        raise AssertionError(f"we accept what the library refuses: {error}") from error
