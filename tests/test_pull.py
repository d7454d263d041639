"""A pack published to a registry comes back byte for byte; a cut or a lie gives no wrong file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from medllm_pack.errors import TransferError, WriteError
from medllm_pack.publish.make import make_release
from medllm_pack.publish.pull import pull, remote_weights
from medllm_pack.publish.push import Options, push
from medllm_pack.publish.transport import Access
from tests.packs import build_pack
from tests.registries import ACCESS, QUICK, Registry, needs, release

pytestmark = [pytest.mark.registry, needs("docker-registry")]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pack(tmp_path_factory.mktemp("pack") / "p", quants=["f16", "q4_k_m"])


@pytest.fixture(scope="module")
def published(registry: Registry, pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    options = Options(state=tmp_path_factory.mktemp("state"))
    push(make_release(pack), registry.target("ns/tiny"), access=ACCESS, options=options)
    return registry


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pulled_variant_is_the_packs_byte_for_byte(
    published: Registry, pack: Path, tmp_path: Path
) -> None:
    pulled = pull(published.target("ns/tiny", "7b-q4_k_m"), tmp_path / "out", access=ACCESS)
    assert pulled.overrides == ()
    assert pulled.digest == make_release(pack, quants=["q4_k_m"]).images[0].image.digest
    whole, found = contents(pack), contents(tmp_path / "out")
    assert set(whole) - set(found) == {p.name for p in pack.glob("*F16.gguf")}
    assert all(whole[name] == data for name, data in found.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_there_is_said_with_what_is(published: Registry, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="7b-q4_k_m"):
        pull(published.target("ns/tiny", "13b"), tmp_path / "out", access=ACCESS)
    (tmp_path / "out").mkdir()
    with pytest.raises(WriteError, match="--force"):
        pull(published.target("ns/tiny", "7b"), tmp_path / "out", access=ACCESS)


class Cutting(httpx.BaseTransport):
    """Ends every blob's body after some bytes, or puts one wrong byte into it."""

    def __init__(self, inner: httpx.BaseTransport, *, after: int, cuts: int, flip: bool) -> None:
        self.inner, self.after, self.cuts, self.flip = inner, after, cuts, flip
        self.ranges: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.inner.handle_request(request)
        if request.method != "GET" or "/blobs/" not in request.url.path:
            return answer
        self.ranges.append(request.headers.get("Range", ""))
        data = answer.read()
        if self.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        cut = self.cuts > 0 and len(data) > self.after
        self.cuts -= cut
        body = _Body(data[: self.after] if cut else data, cut=cut)
        return httpx.Response(answer.status_code, headers=answer.headers, stream=body)

    def close(self) -> None:
        self.inner.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, data: bytes, *, cut: bool) -> None:
        self.data, self.cut = data, cut

    def __iter__(self) -> Iterator[bytes]:
        yield self.data
        if self.cut:
            raise httpx.ReadError("cut")


def cutting(*, cuts: int = 0, flip: bool = False) -> tuple[Access, list[Cutting]]:
    made: list[Cutting] = []

    def wrap(inner: httpx.BaseTransport) -> httpx.BaseTransport:
        made.append(Cutting(inner, after=50_000, cuts=cuts, flip=flip))
        return made[-1]

    return Access(patience=QUICK, transport=wrap), made


def test_a_download_goes_on_where_it_was_cut_also_in_another_run(
    registry: Registry, tmp_path: Path
) -> None:
    sent = release(tmp_path / "r", size=280_000)
    push(sent, registry.target("ns/cut"), access=ACCESS, options=Options(state=tmp_path / "s"))
    model = sent.images[0].image.layers[0]
    access, made = cutting(cuts=3)
    with remote_weights(registry.target("ns/cut", "7b")) as (head, weights, _):
        assert (head.image.digest, weights.digest) == (sent.images[0].image.digest, model.digest)
    from medllm_pack.publish.download import fetch_blob
    from medllm_pack.publish.registry import opened

    with opened(registry.target("ns/cut", "7b"), access) as door:
        fetch_blob(door, model.digest, model.size, tmp_path / "x", lambda _: None)
    assert made[0].ranges == ["", "bytes=50000-", "bytes=100000-", "bytes=150000-"]
    (tmp_path / "y.part").write_bytes((tmp_path / "x").read_bytes()[:123_456])
    access, made = cutting()
    with opened(registry.target("ns/cut", "7b"), access) as door:
        fetch_blob(door, model.digest, model.size, tmp_path / "y", lambda _: None)
    assert made[0].ranges == ["bytes=123456-"]
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_a_wrong_byte_gives_no_folder(published: Registry, tmp_path: Path) -> None:
    access, _ = cutting(flip=True)
    with pytest.raises(TransferError, match="other bytes"):
        pull(published.target("ns/tiny", "7b"), tmp_path / "out", access=access)
    assert not (tmp_path / "out").exists()


def test_inspect_fetches_the_header_and_not_the_weights(
    published: Registry, pack: Path, tmp_path: Path
) -> None:
    from medllm_pack.gguf.reader import read_gguf, read_header

    local = read_gguf(next(pack.glob("*F16.gguf")))
    with remote_weights(published.target("ns/tiny", "7b-f16")) as (_, weights, file):
        header = read_header(file, size=weights.size, name="x")
    assert (header.tensors, dict(header.metadata)) == (local.tensors, dict(local.metadata))


def test_the_commands_publish_inspect_and_pull(
    registry: Registry, pack: Path, tmp_path: Path
) -> None:
    target = f"oci://{registry.host}/ns/cli"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "medllm_pack", *words], capture_output=True, text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )  # fmt: skip

    refused = run("publish", str(pack), target)
    assert refused.returncode != 0
    assert registry.get("ns/cli/tags/list").status_code == 404
    words = ("publish", str(pack), target, "--accept", "parity-missing", "--json")
    dry = json.loads(run(*words, "--dry-run").stdout)
    assert dry["would_send"]["blobs"] > 4
    assert registry.get("ns/cli/tags/list").status_code == 404
    done = json.loads(run(*words).stdout)
    assert done["ollama_can_pull"]["pulls"] is False
    assert "Location" in done["ollama_can_pull"]["why"]
    seen = json.loads(run("inspect", f"{target}:7b-f16", "--json").stdout)
    assert seen["digests"]["manifest"] in [image["digest"] for image in done["images"]]
    pulled = run("pull", f"{target}:7b", "--out", str(tmp_path / "out"))
    assert (pulled.returncode, pulled.stderr.strip()) == (0, "")
    assert contents(tmp_path / "out").items() <= contents(pack).items()
