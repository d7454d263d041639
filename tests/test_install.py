"""Installing: 0 bytes of weights copied, what Ollama would write and nothing else, or the API."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_pack.digests import Digest
from medllm_pack.errors import (
    MedllmError,
    SourceError,
    StoreAccessError,
    UsageError,
    WriteError,
)
from medllm_pack.ollama import placing
from medllm_pack.ollama import store as store_module
from medllm_pack.ollama.image import DOCKER_MANIFEST, Blob, Image
from medllm_pack.ollama.names import ModelName
from medllm_pack.ollama.placing import same_bytes
from medllm_pack.ollama.store import Store, full_name
from medllm_pack.progress import Silent
from medllm_pack.publish.bundle import write_bundle
from medllm_pack.publish.make import make_release
from tests import fake_ollama
from tests.test_bad_input import run
from tests.test_image import HOSTILE

NAME = ModelName.parse("clinica:7b")
MANIFEST = "manifests/registry.ollama.ai/library/clinica/7b"


@pytest.fixture
def image(built_pack: Path) -> Image:
    """The image of q4_k_m."""
    return make_release(built_pack, quants=["q4_k_m"]).images[0].image


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any Ollama, on a machine without the service."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    monkeypatch.setattr(store_module, "_SERVICE", tmp_path / "service" / "models")
    return tmp_path / "home"


def tree(root: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, size and time of change of every file."""
    return {
        str(path.relative_to(root)): (s.st_ino, s.st_size, s.st_mtime_ns)
        for path in root.rglob("*")
        if not path.is_dir() or path.is_symlink()
        for s in [path.lstat()]
    }


def assert_whole(root: Path, manifest: bytes) -> None:
    """Every blob that a manifest names is there, of its size and digest; nothing half-written."""
    document = json.loads(manifest)
    for entry in (document["config"], *document["layers"]):
        data = (root / "blobs" / entry["digest"].replace(":", "-")).read_bytes()
        assert "sha256:" + hashlib.sha256(data).hexdigest() == entry["digest"]
        assert len(data) == entry["size"]
    assert not [path for path in root.rglob("*") if "partial" in path.name]


def test_a_store_holds_the_image_and_nothing_else(image: Image, tmp_path: Path) -> None:
    done = Store(tmp_path / "s").install(image, NAME, replace=False, report=Silent())
    root = tmp_path / "s"
    assert (root / MANIFEST).read_bytes() == image.manifest
    assert_whole(root, image.manifest)
    blobs = {f"blobs/sha256-{blob.digest.hex}" for blob in image.blobs}
    assert set(tree(root)) == {MANIFEST, *blobs}
    assert {path.stat().st_mode & 0o777 for path in (root / "blobs").iterdir()} == {0o644}
    assert done.copied == 0
    assert done.shared == image.layers[0].size


def sparse_image(path: Path, size: int) -> Image:
    """Return an image of a hole of many GB; its digest is trusted, as that of a pack is."""
    with path.open("wb") as file:
        file.truncate(size)
    weights = Blob("application/vnd.ollama.image.model", Digest("a" * 64), size, path)
    return Image(DOCKER_MANIFEST, b"{}", Blob.of(b"{}", "c"), (weights,))


def test_any_size_takes_less_than_a_second(tmp_path: Path) -> None:
    image = sparse_image(tmp_path / "big.gguf", 40 << 30)
    started = time.monotonic()
    done = Store(tmp_path / "s").install(image, NAME, replace=False, report=Silent())
    assert time.monotonic() - started < 1
    assert (done.shared, done.copied) == (40 << 30, 0)
    blob = (tmp_path / "s/blobs" / f"sha256-{'a' * 64}").stat()
    assert blob.st_size == 40 << 30
    assert blob.st_blocks * 512 < 1 << 20
    again = Store(tmp_path / "s").install(image, ModelName("x"), replace=False, report=Silent())
    assert (again.shared, again.copied) == (40 << 30, 0)


@pytest.mark.strace
def test_no_weights_pass_through_the_process(built_pack: Path, tmp_path: Path, home: Path) -> None:
    """All bytes that are written, by strace's count: the texts and the manifest."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    calls = "trace=write,writev,pwrite64,pwritev,copy_file_range,sendfile,splice"
    command = [sys.executable, "-m", "medllm_pack", "install", str(built_pack), "--quant", "f16"]
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "trace", "-e", calls, *command, "--store", "s", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("tracing is not permitted")
    assert json.loads(done.stdout)["installed"][0]["copied"] == 0
    lines = (tmp_path / "trace").read_text().splitlines()
    written = sum(int(match[1]) for line in lines if (match := re.search(r"\) += (\d+)$", line)))
    assert written < 64 << 10
    assert (tmp_path / "s").is_dir()


def test_a_second_model_shares_the_weights(image: Image, tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.install(image, NAME, replace=False, report=Silent())
    before = tree(store.root)
    done = store.install(image, ModelName.parse("me/other:v1"), replace=False, report=Silent())
    assert done.copied == 0
    new = {*tree(store.root)} - {*before}
    assert new == {"manifests/registry.ollama.ai/me/other/v1"}
    assert {k: v for k, v in tree(store.root).items() if k in before} == before


def test_uninstalling_leaves_the_pack_intact(built_pack: Path, tmp_path: Path) -> None:
    """As Ollama removes a model: its manifest and its blobs are unlinked."""
    folder = Path(shutil.copytree(built_pack, tmp_path / "p"))
    image = make_release(folder, quants=["q4_k_m"]).images[0].image
    store = Store(tmp_path / "s")
    store.install(image, NAME, replace=False, report=Silent())
    (store.root / MANIFEST).unlink()
    for path in (store.root / "blobs").iterdir():
        path.unlink()
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


def test_what_is_there_is_left_alone(image: Image, tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    assert store.install(image, NAME, replace=False, report=Silent()).changed
    before = tree(store.root)
    assert not store.install(image, NAME, replace=False, report=Silent()).changed
    assert tree(store.root) == before


def test_a_name_that_is_taken_needs_force(built_pack: Path, tmp_path: Path) -> None:
    small, large = (tagged.image for tagged in make_release(built_pack).images)
    store = Store(tmp_path / "s")
    store.install(small, NAME, replace=False, report=Silent())
    before = tree(store.root)
    for name in (NAME, ModelName.parse("registry.ollama.ai/library/Clinica:7B")):
        with pytest.raises(WriteError, match=r"exists .*--force"):
            store.install(large, name, replace=False, report=Silent())
    assert tree(store.root) == before
    store.install(large, ModelName.parse("CLINICA:7b"), replace=True, report=Silent())
    assert (store.root / MANIFEST).read_bytes() == large.manifest
    assert {k: v for k, v in tree(store.root).items() if k in before and k != MANIFEST} == {
        k: v for k, v in before.items() if k != MANIFEST
    }


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def notice(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("size", [0, 1])
def test_a_damaged_blob_is_found_and_replaced(size: int, image: Image, tmp_path: Path) -> None:
    """Of the right size or not: an existing file is trusted for its digest, not for its name."""
    store, notes = Store(tmp_path / "s"), Notes()
    for blob in (image.layers[0], image.layers[1]):
        path = store.blob(blob.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(blob.size - size))
    store.install(image, NAME, replace=False, report=notes)
    assert_whole(store.root, image.manifest)
    assert len(notes.notes) == 2


def test_a_sound_blob_of_somebody_else_is_kept(image: Image, tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    path = store.blob(image.layers[0].digest)
    path.parent.mkdir(parents=True)
    with image.layers[0].open() as file:
        path.write_bytes(file.read())
    inode = path.stat().st_ino
    store.install(image, NAME, replace=False, report=Silent())
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("kind", ["symlink", "folder", "fifo"])
def test_a_blob_that_is_no_file_is_refused(kind: str, image: Image, tmp_path: Path) -> None:
    path = Store(tmp_path / "s").blob(image.layers[0].digest)
    path.parent.mkdir(parents=True)
    if kind == "symlink":
        path.symlink_to("/etc/passwd")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(WriteError, match="no regular file"):
        Store(tmp_path / "s").install(image, NAME, replace=False, report=Silent())
    assert not (tmp_path / "s/manifests").exists()


def test_the_younger_layout_is_written_as_ollama_writes_it(
    built_pack: Path, tmp_path: Path
) -> None:
    """A symbolic link under ollama.com to a manifest that is a blob; older names give way."""
    first, second = (tagged.image for tagged in make_release(built_pack).images)
    store = Store(tmp_path / "s")
    store.install(first, NAME, replace=False, report=Silent())
    (store.root / "manifests-v2").mkdir()
    with pytest.raises(WriteError, match="--force"):
        store.install(second, NAME, replace=False, report=Silent())
    store.install(second, NAME, replace=True, report=Silent())
    link = store.root / "manifests-v2/ollama.com/library/clinica/7b"
    assert os.readlink(link) == f"../../../../blobs/sha256-{second.digest.hex}"
    assert link.read_bytes() == second.manifest
    assert not (store.root / MANIFEST).exists()
    assert store.manifest(NAME) == link
    assert_whole(store.root, second.manifest)


def test_a_failure_anywhere_leaves_no_name_without_its_blobs(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk says no at the N-th rename or sync, for every N."""
    real = {name: getattr(os, name) for name in ("replace", "fsync")}
    calls = 0

    def counted(name: str, limit: int) -> None:
        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise OSError(28, "No space left on device")
            return real[name](*args)

        monkeypatch.setattr(os, name, call)

    for limit in range(1, 100):
        root, calls = tmp_path / f"s{limit}", 0
        for name in real:
            counted(name, limit)
        try:
            Store(root).install(image, NAME, replace=False, report=Silent())
        except WriteError:
            pass
        else:
            assert_whole(root, (root / MANIFEST).read_bytes())
            assert limit > 10
            return
        finally:
            monkeypatch.undo()
        assert not [path for path in root.rglob("*") if "partial" in path.name]
        if (root / MANIFEST).exists():
            assert_whole(root, (root / MANIFEST).read_bytes())
    raise AssertionError("it never ended")


def test_another_file_system_gets_a_checked_copy(image: Image, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at hand")
    root = shm / f"medllm-test-{os.getpid()}"
    try:
        done = Store(root).install(image, NAME, replace=False, report=Silent())
        assert (done.shared, done.copied) == (0, image.layers[0].size)
        assert_whole(root, image.manifest)
        wrong = Blob(image.layers[0].media_type, Digest("b" * 64), image.layers[0].size,
                     image.layers[0].source)  # fmt: skip
        bad = Image(DOCKER_MANIFEST, b"{}", image.config, (wrong,))
        with pytest.raises(SourceError, match="something else"):
            Store(root).install(bad, ModelName("bad"), replace=False, report=Silent())
        assert not (root / "blobs" / f"sha256-{'b' * 64}").exists()
        assert not (root / "manifests/registry.ollama.ai/library/bad").exists()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that shares blocks, in a file."""
    if os.geteuid() != 0 or shutil.which("mkfs.btrfs") is None:
        pytest.skip("needs root and btrfs-progs")
    image, place = tmp_path / "fs", tmp_path / "mnt"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_blocks_are_shared_where_the_file_system_can(built_pack: Path, btrfs: Path) -> None:
    folder = Path(shutil.copytree(built_pack, btrfs / "p"))
    image = make_release(folder, quants=["q4_k_m"]).images[0].image
    store = Store(btrfs / "s")
    done = store.install(image, NAME, replace=False, report=Silent())
    weights, blob = next(folder.glob("*Q4_K_M.gguf")), store.blob(image.layers[0].digest)
    assert (done.copied, weights.stat().st_nlink, blob.stat().st_nlink) == (0, 1, 1)
    assert weights.stat().st_ino != blob.stat().st_ino
    assert same_bytes(weights, blob)
    assert not same_bytes(next(folder.glob("*F16.gguf")), blob)
    assert_whole(store.root, image.manifest)
    before = blob.stat().st_ino
    store.install(image, ModelName("other"), replace=False, report=Silent())
    assert blob.stat().st_ino == before
    data = bytearray(blob.read_bytes())
    data[1 << 20] ^= 1
    blob.write_bytes(data)
    os.sync()
    assert not same_bytes(weights, blob)
    store.install(image, ModelName("third"), replace=False, report=Silent())
    assert_whole(store.root, image.manifest)


def test_files_of_equal_bytes_but_own_blocks_are_not_taken_for_shared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 64)
    os.link(tmp_path / "a", tmp_path / "c")
    os.sync()
    assert same_bytes(tmp_path / "a", tmp_path / "c")
    assert not same_bytes(tmp_path / "a", tmp_path / "b")


class Stuck:
    """A source of bytes that never comes to its end."""

    def __init__(self, ready: int) -> None:
        self.ready = ready

    def open(self) -> BinaryIO:
        return cast("BinaryIO", self)

    def __enter__(self) -> Stuck:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, n: int) -> bytes:
        os.write(self.ready, b"x")
        time.sleep(60)
        return bytes(n)


def test_what_a_killed_copy_left_is_removed(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not while its writer lives."""
    monkeypatch.setattr(placing, "_STALE", 0.0)
    ready, said = os.pipe()
    stuck = Blob(image.layers[0].media_type, Digest("b" * 64), 1 << 20, Stuck(said))
    child = os.fork()
    if child == 0:
        bad = Image(DOCKER_MANIFEST, b"{}", image.config, (stuck,))
        Store(tmp_path / "s").install(bad, ModelName("bad"), replace=False, report=Silent())
        os._exit(0)
    os.read(ready, 1)

    def left() -> list[Path]:
        return [path for path in (tmp_path / "s/blobs").iterdir() if "partial" in path.name]

    store = Store(tmp_path / "s")
    store.install(image, NAME, replace=False, report=Silent())
    assert len(left()) == 1
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert len(left()) == 1
    store.install(image, NAME, replace=False, report=Silent())
    assert left() == []
    assert_whole(store.root, image.manifest)
    assert not (store.root / "manifests/registry.ollama.ai/library/bad").exists()


# Other users.

NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users")


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """A store of the user nobody that everybody can look into."""
    path = tmp_path / "service"
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    return path


@root_only
def test_what_root_makes_belongs_to_the_user_of_the_store(
    built_pack: Path, service: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built_pack, tmp_path / "p"))
    image = make_release(folder, quants=["q4_k_m"]).images[0].image
    Store(service).install(image, NAME, replace=False, report=Silent())
    linked = Store(service).blob(image.layers[0].digest)
    for path in service.rglob("*"):
        if path != linked:
            assert path.stat().st_uid == NOBODY, path
    assert next(folder.glob("*Q4_K_M.gguf")).stat().st_uid == 0


@root_only
def test_weights_that_the_user_of_the_store_cannot_read_are_refused(
    built_pack: Path, service: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built_pack, tmp_path / "p"))
    next(folder.glob("*Q4_K_M.gguf")).chmod(0o600)
    image = make_release(folder, quants=["q4_k_m"]).images[0].image
    with pytest.raises(WriteError, match=r"cannot be read by the user nobody.*chmod o\+r"):
        Store(service).install(image, NAME, replace=False, report=Silent())
    assert not (service / "manifests").exists()


@root_only
def test_a_store_of_another_user_gives_the_way_out(tmp_path: Path, image: Image) -> None:
    store = tmp_path / "service"
    store.mkdir(mode=0o755)
    child = os.fork()
    if child == 0:
        try:
            os.seteuid(NOBODY)
            Store(store).check_access()
            os._exit(1)
        except StoreAccessError as error:
            os._exit(0 if "sudo" in str(error) and "--store" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(store.iterdir()) == []


# Which store, or the API.


@pytest.fixture
def server(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[fake_ollama.Ollama]:
    """A server whose store is nowhere to be found."""
    with fake_ollama.serving(tmp_path / "elsewhere") as running:
        monkeypatch.setenv("OLLAMA_HOST", running.url)
        yield running


def installed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    code, out, err = run(["install", *arguments, "--json"], capsys)
    assert (code, err) == (0, "")
    result: list[dict[str, object]] = json.loads(out)["installed"]
    return result


def test_without_any_store_the_users_is_made(
    built_pack: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = installed(capsys, str(built_pack))
    release = make_release(built_pack)
    assert one == {
        "name": "clinica:7b", "quant": "q4_k_m", "digest": str(release.images[1].image.digest),
        "where": str(home / ".ollama/models"), "way": "store", "changed": True, "copied": 0,
    }  # fmt: skip
    assert (home / ".ollama/models" / MANIFEST).read_bytes() == release.images[1].image.manifest


def test_the_environment_names_the_store(
    built_pack: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "m"))
    (home / ".ollama/models").mkdir(parents=True)
    (one,) = installed(capsys, str(built_pack))
    assert one["where"] == str(tmp_path / "m")
    assert list((home / ".ollama/models").iterdir()) == []


def test_the_store_of_the_running_server_is_found(
    built_pack: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The user's own store comes first in the order, but the server runs on the service's."""
    own = home / ".ollama/models"
    (own / "blobs").mkdir(parents=True)
    with fake_ollama.serving(tmp_path / "service/models") as running:
        monkeypatch.setenv("OLLAMA_HOST", running.url)
        (one,) = installed(capsys, str(built_pack))
        assert one["where"] == str(running.root)
        assert dict(running.manifests()).keys() == {"clinica:7b"}
        assert running.received == 0
    assert tree(own) == {}
    assert_whole(tmp_path / "service/models", (tmp_path / "service/models" / MANIFEST).read_bytes())
    document = json.loads((tmp_path / "service/models" / MANIFEST).read_bytes())
    assert len(list((tmp_path / "service/models/blobs").iterdir())) == len(document["layers"]) + 1


def test_a_server_that_cannot_be_reached_on_disk_gets_it_through_its_api(
    built_pack: Path, server: fake_ollama.Ollama, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = installed(capsys, str(built_pack))
    image = make_release(built_pack).images[1].image
    assert (one["way"], one["where"], one["changed"]) == ("api", server.url, True)
    assert one["digest"] == str(image.digest)
    assert one["copied"] == server.received == image.layers[0].size
    assert dict(server.manifests()) == {"clinica:7b": image.manifest}
    assert_whole(server.root, image.manifest)


def test_the_api_is_sent_nothing_twice(
    built_pack: Path, server: fake_ollama.Ollama, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(capsys, str(built_pack))
    received = server.received
    (one,) = installed(capsys, str(built_pack))
    assert (one["changed"], one["copied"]) == (False, 0)
    (other,) = installed(capsys, str(built_pack), "--name", "me/x:y")
    assert (other["changed"], other["copied"], server.received) == (True, 0, received)
    code, out, err = run(["install", str(built_pack), "--quant", "f16", "--name", "me/X:Y"], capsys)
    assert (code, out) == (1, "")
    assert "--force" in err
    (forced,) = installed(capsys, str(built_pack), "--quant", "f16", "--name", "me/x:y", "--force")
    assert forced["changed"]
    assert dict(server.manifests())["me/x:y"] == make_release(built_pack).images[0].image.manifest


def test_a_server_of_another_machine_that_is_away_is_not_replaced_by_this_one(
    built_pack: Path, home: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("OLLAMA_HOST", "http://ollama.invalid:1")
    code, out, err = run(["install", str(built_pack)], capsys)
    assert (code, out) == (1, "")
    assert "ollama.invalid" in err
    assert not home.exists()


def test_an_answer_that_is_not_ollamas_is_an_error(
    built_pack: Path, server: fake_ollama.Ollama, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(server.root / "blobs")  # every POST of a blob fails on the server
    (server.root / "blobs").write_text("")
    code, out, err = run(["install", str(built_pack), "--quiet"], capsys)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1


# The command.


def test_variants_get_names_of_their_own(
    built_pack: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = installed(capsys, str(built_pack), "--quant", "f16,q4_k_m")
    assert [one["name"] for one in both] == ["clinica:7b-f16", "clinica:7b-q4_k_m"]
    both = installed(capsys, str(built_pack), "--quant", "f16,q4_k_m", "--name", "me/c")
    assert [one["name"] for one in both] == ["me/c:f16", "me/c:q4_k_m"]
    (one,) = installed(capsys, str(built_pack), "--quant", "f16")
    assert one["name"] == "clinica:7b-f16"


def test_a_bundle_installs_to_the_same_digests(
    built_pack: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(make_release(built_pack), tmp_path / "b.tar")
    from_pack = installed(
        capsys, str(built_pack), "--quant", "f16,q4_k_m", "--store", str(tmp_path / "a")
    )
    from_bundle = installed(
        capsys, "--from", "b.tar", "--quant", "f16,q4_k_m", "--store", str(tmp_path / "b")
    )
    for here, there in zip(from_pack, from_bundle, strict=True):
        assert (here["name"], here["digest"]) == (there["name"], there["digest"])
    names = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")}
    assert names == {path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*")}
    for name in names:
        if (tmp_path / "a" / name).is_file():
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_changed_bundle_installs_nothing(
    built_pack: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.tar"
    write_bundle(make_release(built_pack), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, out, err = run(["install", "--from", "b.tar", "--quiet"], capsys)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert not home.exists()


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        ([], "--from", 2),
        (["p", "--from", "b.tar"], "--from", 2),
        (["missing"], "pack.json", 1),
        (["--from", "missing.tar"], "missing.tar", 1),
        (["PACK", "--quant", "q8_0"], "q8_0", 2),
        (["PACK", "--name", "a/b/c/d"], "a/b/c/d", 2),
    ],
)
def test_a_wrong_request_gets_one_line(
    arguments: list[str], said: str, code: int, built_pack: Path, home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found, out, err = run(
        ["install", *(str(built_pack) if a == "PACK" else a for a in arguments)], capsys
    )
    assert (found, out) == (code, "")
    assert said in err
    assert not home.exists()


def test_a_table_says_what_was_done(
    built_pack: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(["install", str(built_pack)], capsys)
    assert code == 0
    assert "0 bytes copied" in out
    assert "ollama run clinica:7b" in out


# Names.


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_no_hostile_name_leaves_its_folder(text: str, image: Image, tmp_path: Path) -> None:
    """As a model, a namespace or a tag: refused, or one component below the manifests."""
    root = tmp_path / "s"
    for form in ("{}", "{}/m", "m:{}", "{}/n/m"):
        try:
            name = ModelName.parse(form.format(text))
        except UsageError:
            continue
        path = Store(root).manifest(name).relative_to(root)
        assert len(path.parts) == 5
        assert ".." not in path.parts


PART = st.text(st.sampled_from("aB9_.-:/\\~ \0\n%é"), max_size=8)


@given(st.lists(PART, min_size=1, max_size=5).map("/".join))
def test_a_name_is_a_place_in_the_store_or_an_error(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except MedllmError:
        return
    path = Store(Path("/store")).manifest(name)
    assert path.parts[:3] == ("/", "store", "manifests")
    full = full_name(name)
    assert path.parts[3:] == (full.host, full.namespace, full.model, full.tag)
    assert os.path.normpath(path) == str(path)
