"""Bundles: the same bytes for the same release, read by tar, refused when anything is not right."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from medllm_pack.digests import Digest
from medllm_pack.errors import MedllmError, SourceError, WriteError
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.progress import Silent
from medllm_pack.publish import tarball
from medllm_pack.publish.bundle import read_bundle, write_bundle
from medllm_pack.publish.make import make_release
from medllm_pack.publish.release import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Release, Tagged
from medllm_pack.publish.restore import NOTE, restore
from tests import ollama_parser
from tests.test_image import HOSTILE

ZEROS = "0" * 64
# Strange file names, but tags that Ollama takes.
TAGS = ("a.", "CON", "con", "nul.txt", "COM1", "lpt9.md", "aux", "PRN.json")
Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="session")
def bundled(built_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "b.tar"
    write_bundle(make_release(built_pack), path)
    return path


@pytest.fixture(scope="session")
def small(built_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one variant, for what is done many times."""
    path = tmp_path_factory.mktemp("bundle") / "b.tar"
    write_bundle(make_release(built_pack, quants=["q4_k_m"]), path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pack_comes_back_as_it_was(bundled: Path, built_pack: Path, tmp_path: Path) -> None:
    folder = restore(read_bundle(bundled), tmp_path / "back")
    assert content(folder) == content(built_pack)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    release, again = make_release(built_pack), make_release(folder)
    assert [t.image.manifest for t in again.images] == [t.image.manifest for t in release.images]


def test_a_bundle_keeps_every_digest(bundled: Path, built_pack: Path) -> None:
    wanted, read = make_release(built_pack), read_bundle(bundled)
    for there, here in zip(wanted.images, read.images, strict=True):
        assert (there.quant, there.tags, there.image.digest) == (
            here.quant, here.tags, here.image.digest,
        )  # fmt: skip
        assert [p.digest for p in there.attached] == [p.digest for p in here.attached]
    assert {b.digest for b in wanted.blobs} == {b.digest for b in read.blobs}


def test_a_bundle_is_an_image_layout_for_other_tools(bundled: Path, tmp_path: Path) -> None:
    """GNU tar unpacks it; every file is named by its own digest; the index leads to all of them."""
    subprocess.run(["tar", "xf", bundled, "-C", tmp_path], check=True)
    assert json.loads((tmp_path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    blobs = {path.name: path.read_bytes() for path in (tmp_path / "blobs/sha256").iterdir()}
    for name, data in blobs.items():
        assert hashlib.sha256(data).hexdigest() == name
    named = set()
    for entry in json.loads((tmp_path / "index.json").read_bytes())["manifests"]:
        data = blobs[entry["digest"].removeprefix("sha256:")]
        manifest = json.loads(data)
        assert (len(data), manifest["mediaType"]) == (entry["size"], entry["mediaType"])
        for part in (entry, manifest["config"], *manifest["layers"]):
            assert len(blobs[part["digest"].removeprefix("sha256:")]) == part["size"]
            named.add(part["digest"].removeprefix("sha256:"))
    assert named == set(blobs)


def test_the_same_release_gives_the_same_bytes(
    bundled: Path, built_pack: Path, tmp_path: Path
) -> None:
    write_bundle(make_release(built_pack), tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == bundled.read_bytes()


def test_a_bundle_replaces_nothing_unasked(bundled: Path, built_pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.tar"
    path.write_text("mine")
    with pytest.raises(WriteError, match="--force"):
        write_bundle(make_release(built_pack), path)
    assert path.read_text() == "mine"
    write_bundle(make_release(built_pack), path, replace=True)
    assert path.read_bytes() == bundled.read_bytes()


def test_a_pack_that_changes_meanwhile_leaves_no_bundle(built_pack: Path, tmp_path: Path) -> None:
    release = make_release(built_pack, quants=["q4_k_m"])
    (tagged,) = release.images
    weights, *texts = tagged.image.layers
    wrong = Blob(weights.media_type, Digest("0" * 64), weights.size, weights.source)
    image = type(tagged.image)(
        tagged.image.media_type, tagged.image.manifest, tagged.image.config, (wrong, *texts)
    )
    with pytest.raises(SourceError, match="something else"):
        write_bundle(Release((Tagged("q4_k_m", ("x",), image),)), tmp_path / "b.tar")
    assert list(tmp_path.iterdir()) == []


def test_sizes_beyond_8_gib_are_read_by_tar(tmp_path: Path) -> None:
    size = (9 << 30) + 5
    block = tarball.header("blobs/sha256/" + "a" * 64, size)
    assert tarball.parse(block, Path("b")) == ("blobs/sha256/" + "a" * 64, size)
    assert tarfile.TarInfo.frombuf(block, "ascii", "strict").size == size


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """A hole of 128 MiB goes in and is checked in a process of limited memory."""
    code = f"""
import hashlib, json, resource
from pathlib import Path
from medllm_pack.digests import Digest
from medllm_pack.ollama.image import *
from medllm_pack.publish.bundle import read_bundle, write_bundle
from medllm_pack.publish.release import Release, Tagged
big = Path({str(tmp_path / "big")!r})
with big.open("wb") as file: file.truncate(128 << 20)
digest = hashlib.sha256()
for _ in range(128): digest.update(bytes(1 << 20))
config = Blob.of(b'{{"file_type":"F16"}}', "c")
layer = Blob("application/vnd.ollama.image.model", Digest(digest.hexdigest()), 128 << 20, big)
manifest = json.dumps({{"schemaVersion": 2, "mediaType": DOCKER_MANIFEST,
    "config": config.descriptor(), "layers": [layer.descriptor()]}}).encode()
image = Image(DOCKER_MANIFEST, manifest, config, (layer,))
path = Path({str(tmp_path / "b.tar")!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_bundle(Release((Tagged("f16", ("f16",), image),)), path)
read_bundle(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 << 10  # KiB


# What is wrong with a bundle. Each change starts from a good one.


def members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(info, (tar.extractfile(info) or io.BytesIO()).read()) for info in tar]


def write(path: Path, entries: Sequence[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Write members the way bundles are written: plain blocks and two empty ones."""
    with path.open("wb") as out:
        for info, data in entries:
            out.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        out.write(bytes(1024))
    return path


def named(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.type = len(data), 0o644, kind
    return info, data


def index_of(entries: Members) -> int:
    return next(i for i, (info, _) in enumerate(entries) if info.name == "index.json")


def edit_index(edit: Callable[[list[dict[str, Any]]], object]) -> Callable[[Members], Members]:
    def change(entries: Members) -> Members:
        at = index_of(entries)
        document = json.loads(entries[at][1])
        edit(document["manifests"])
        entries[at] = named("index.json", json.dumps(document).encode())
        return entries

    return change


def add(*extra: tuple[tarfile.TarInfo, bytes]) -> Callable[[Members], Members]:
    return lambda entries: [*entries, *extra]


def link(name: str, target: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info, _ = named(name, b"", kind)
    info.linkname = target
    return info, b""


def owned(entries: Members) -> Members:
    entries[-1][0].uid = 1000
    return entries


CHANGES: dict[str, Callable[[Members], Members]] = {
    "an extra blob": add(named("blobs/sha256/" + hashlib.sha256(b"x").hexdigest())),
    "an extra file": add(named("README")),
    "an escaping name": add(named("../../etc/x")),
    "an absolute name": add(named("/etc/x")),
    "a symbolic link": add(link("blobs/sha256/" + "0" * 64, "/etc/passwd", tarfile.SYMTYPE)),
    "a hard link": add(link("blobs/sha256/" + "0" * 64, "index.json", tarfile.LNKTYPE)),
    "a device": add(named("blobs/sha256/" + "0" * 64, b"", tarfile.CHRTYPE)),
    "a fifo": add(named("blobs/sha256/" + "0" * 64, b"", tarfile.FIFOTYPE)),
    "a folder": add(named("blobs", b"", tarfile.DIRTYPE)),
    "a sparse file": add(named("blobs/sha256/" + "0" * 64, b"", tarfile.GNUTYPE_SPARSE)),
    "an extended header": add(named("pax", b"11 path=x\n\n", tarfile.XHDTYPE)),
    "a long name": add(named("././@LongLink", b"x" * 200, tarfile.GNUTYPE_LONGNAME)),
    "a member twice": lambda entries: [*entries, entries[-1]],
    "another owner": owned,
    "no layout": lambda entries: entries[1:],
    "no index": lambda entries: [e for e in entries if e[0].name != "index.json"],
    "a missing blob": lambda entries: entries[:-1],
    "another layout": lambda entries: [named("oci-layout", b"{}"), *entries[1:]],
    "an index that is no JSON": lambda entries: [entries[0], named("index.json"), *entries[2:]],
    "an index of one tag less": edit_index(lambda manifests: manifests.pop(0)),
    "an empty index": edit_index(lambda manifests: manifests.clear()),
    "a tag twice": edit_index(lambda manifests: manifests.append(manifests[0])),
    "an image without a tag": edit_index(lambda manifests: manifests[0].pop("annotations")),
    "a wrong size": edit_index(lambda manifests: manifests[0].update(size=1)),
    "a wrong digest": edit_index(lambda manifests: manifests[0].update(digest="sha256:" + ZEROS)),
    "a digest that is a path": edit_index(lambda manifests: manifests[0].update(digest="../x")),
    "another tag": edit_index(lambda manifests: manifests[0]["annotations"].update(
        {"org.opencontainers.image.ref.name": "7b-g16"})),
    "a wrong type": edit_index(lambda manifests: manifests[0].update(mediaType=OCI_INDEX)),
    "a type confusion": edit_index(
        lambda manifests: manifests[0].update(mediaType=OCI_MANIFEST)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_bundle_that_is_not_right_is_refused(what: str, small: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", CHANGES[what](members(small)))
    with pytest.raises(MedllmError):
        read_bundle(path)


def test_the_way_the_tests_write_is_read(bundled: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", members(bundled))
    assert path.read_bytes() == bundled.read_bytes()


def test_a_changed_byte_anywhere_is_refused(small: Path, tmp_path: Path) -> None:
    good = small.read_bytes()
    path = tmp_path / "x.tar"
    places = [*range(0, 8192, 127), *range(8192, len(good), len(good) // 60), len(good) - 1]
    for at in places:
        changed = bytearray(good)
        changed[at] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(MedllmError):
            read_bundle(path)


def test_every_byte_that_no_digest_covers_is_looked_at(bundled: Path, tmp_path: Path) -> None:
    """Each byte of the first headers and of all padding, and of the end; without digesting."""
    data = bytearray(bundled.read_bytes())
    with tarfile.open(bundled) as tar:
        infos = tar.getmembers()
    ends = [info.offset_data + info.size for info in infos]
    padding = [at for end in ends for at in range(end, end + -end % 512)]
    assert len(padding) > 1000
    headers = [at for info in infos[:3] for at in range(info.offset, info.offset_data)]
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:
        for at in (*padding[::7], *headers, *range(len(data) - 1024, len(data), 5)):
            os.pwrite(file.fileno(), bytes([data[at] ^ 0x10]), at)
            with pytest.raises(SourceError):
                read_bundle(path, verify=False)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    read_bundle(path)


def test_members_in_another_order_are_refused(small: Path, tmp_path: Path) -> None:
    first, second, *blobs = members(small)
    path = write(tmp_path / "x.tar", [first, second, *reversed(blobs)])
    with pytest.raises(SourceError, match="another order"):
        read_bundle(path)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 5000, -512, -1, -1024])
def test_a_bundle_that_was_cut_is_refused(size: int, bundled: Path, tmp_path: Path) -> None:
    data = bundled.read_bytes()
    path = tmp_path / "x.tar"
    path.write_bytes(data[:size])
    with pytest.raises(SourceError):
        read_bundle(path)
    path.write_bytes(data + b"x")
    with pytest.raises(SourceError):
        read_bundle(path)


@pytest.mark.parametrize("path", ["/dev/zero", "missing.tar", "."])
def test_what_is_no_file_is_no_bundle(path: str) -> None:
    with pytest.raises(SourceError):
        read_bundle(Path(path))


@pytest.mark.parametrize("tag", [name for name in HOSTILE if name not in TAGS], ids=ascii)
def test_a_hostile_tag_is_refused(tag: str, tmp_path: Path) -> None:
    (tagged,) = foreign("x.gguf").images
    evil = Tagged("q4_k_m", (tag,), tagged.image)
    path = tmp_path / "b.tar"
    try:
        write_bundle(Release((evil,)), path)
    except UnicodeEncodeError:
        return
    with pytest.raises(MedllmError):
        read_bundle(path)


# Images that others made.


def foreign(
    manifest_from: str | None, *, params: bytes = b'{"num_ctx":2048.0,"stop":["x"]}'
) -> Release:
    weights = Blob.of(b"GGUF weights", "application/vnd.ollama.image.model")
    template = Blob.of(b"{{ .Prompt }}", "application/vnd.ollama.image.template")
    parameters = Blob.of(params, "application/vnd.ollama.image.params")
    config = Blob.of(b'{"file_type":"Q4_K_M"}', "application/vnd.docker.container.image.v1+json")
    layers = (weights, template, parameters)
    entries = [layer.descriptor() for layer in layers]
    if manifest_from is not None:
        entries[0]["from"] = manifest_from
    document = {
        "schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": config.descriptor(),
        "layers": entries,
    }  # fmt: skip
    image = Image(DOCKER_MANIFEST, json.dumps(document).encode(), config, layers)
    return Release((Tagged("q4_k_m", ("latest",), image),))


def test_an_image_of_others_gives_weights_modelfile_and_a_note(tmp_path: Path) -> None:
    write_bundle(foreign("their.gguf"), tmp_path / "b.tar")
    folder = restore(read_bundle(tmp_path / "b.tar"), tmp_path / "p")
    assert set(content(folder)) == {"their.gguf", "Modelfile.q4_k_m", NOTE, "SHA256SUMS"}
    read = ollama_parser.parse((folder / "Modelfile.q4_k_m").read_text())
    assert [(c.name, c.args) for c in read] == [
        ("model", "./their.gguf"), ("num_ctx", "2048"), ("stop", "x"),
        ("template", "{{ .Prompt }}"),
    ]  # fmt: skip
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "../x.gguf",
        "/x.gguf",
        "a/b.gguf",
        "x\0.gguf",
        ".x.gguf",
        "library/x",
        "SHA256SUMS",
    ],
)
def test_a_name_of_others_never_becomes_a_path(name: str | None, tmp_path: Path) -> None:
    folder = restore(foreign(name), tmp_path / "p")
    assert (folder / "model-Q4_K_M.gguf").read_bytes() == b"GGUF weights"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_modelfile_is_left_out_where_it_would_lie(tmp_path: Path) -> None:
    folder = restore(foreign("x.gguf", params=b'{"mirostat":1}'), tmp_path / "p")
    assert set(content(folder)) == {"x.gguf", NOTE, "SHA256SUMS"}


def test_images_of_two_packs_are_not_mixed(built_pack: Path, tmp_path: Path) -> None:
    mixed = Release((*make_release(built_pack).images, *foreign("x.gguf").images))
    with pytest.raises(SourceError, match="several packs"):
        restore(mixed, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_pack_keeps_its_papers(built_pack: Path, tmp_path: Path) -> None:
    write_bundle(make_release(built_pack, quants=["q4_k_m"]), tmp_path / "b.tar")
    folder = restore(read_bundle(tmp_path / "b.tar"), tmp_path / "p")
    missing = set(content(built_pack)) - set(content(folder))
    assert missing == {"medllm-tiny-F16.gguf"}
    (tagged,) = make_release(folder, quants=["q4_k_m"]).images
    assert tagged.tags == ("7b-q4_k_m", "7b")


# Across an air gap, with a signature.


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a P-256 key pair in PEM form; return the private and the public file."""
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives import serialization as form

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def test_a_signature_crosses_the_gap(built_pack: Path, tmp_path: Path) -> None:
    """The right key says yes; a wrong key, or a byte changed on the other side, says no."""
    pytest.importorskip("model_signing")
    from medllm_pack.publish import signing

    (private, public), (_, other) = key_pair(tmp_path, "ours"), key_pair(tmp_path, "theirs")
    pack = Path(shutil.copytree(built_pack, tmp_path / "p"))
    signing.sign(pack, key=private, password=None, replace=False, report=Silent())
    write_bundle(make_release(pack), tmp_path / "b.tar")
    shutil.rmtree(pack)
    back = restore(read_bundle(tmp_path / "b.tar"), tmp_path / "back")
    assert signing.check_signature(back, key=public) is None
    assert "does not hold" in str(signing.check_signature(back, key=other))
    with (back / "README.md").open("a") as file:
        file.write("x")
    assert "does not hold" in str(signing.check_signature(back, key=public))
