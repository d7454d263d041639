"""A release to Debian's registry and back; other clients find there what was sent."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from medllm_pack.publish.mounting import LARGE, Places
from medllm_pack.publish.push import Options, missing, push
from medllm_pack.publish.release import PACK_ARTIFACT
from tests.registries import ACCESS, Registry, needs, release

pytestmark = [pytest.mark.registry, needs("docker-registry")]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(state=tmp_path / "state", chunk=100_000)


def test_a_release_arrives_whole_and_a_second_push_sends_nothing(
    registry: Registry, tmp_path: Path, options: Options
) -> None:
    sent = release(tmp_path / "r", quants=("f16", "q4_k_m"))
    blobs = list(sent.blobs)
    assert set(missing(sent, registry.target(), access=ACCESS)) == set(blobs)
    first = push(sent, registry.target(), access=ACCESS, options=options)
    assert (first.sent, first.skipped) == (len(blobs), 0)
    assert first.transferred == sum(blob.size for blob in blobs)
    found = registry.check_whole()
    for tagged in sent.images:
        for tag in tagged.tags:
            assert found[tag] == str(tagged.image.digest)
    second = push(sent, registry.target(), access=ACCESS, options=options)
    assert (second.sent, second.skipped, second.transferred) == (0, len(blobs), 0)
    assert missing(sent, registry.target(), access=ACCESS) == ()


def test_papers_are_found_by_the_fallback_tag_once(
    registry: Registry, tmp_path: Path, options: Options
) -> None:
    sent = release(tmp_path / "r")
    for _ in range(2):
        push(sent, registry.target(), access=ACCESS, options=options)
    digest = sent.images[0].image.digest
    index = registry.get(
        f"ns/model/manifests/sha256-{digest.hex}",
        Accept="application/vnd.oci.image.index.v1+json",
    ).json()
    assert [(e["digest"], e["artifactType"]) for e in index["manifests"]] == [
        (str(sent.images[0].attached[0].digest), PACK_ARTIFACT)
    ]


class GoneAfterTags(httpx.BaseTransport):
    """Answers until the last tag was put and read back, and never again."""

    left = -1  # answers; -1 for any number

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self.inner = inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if type(self).left == 0:
            raise httpx.ConnectError("gone")
        type(self).left -= type(self).left > 0
        answer = self.inner.handle_request(request)
        if request.method == "PUT" and request.url.path.endswith("/manifests/7b"):
            type(self).left = 1
        return answer

    def close(self) -> None:
        self.inner.close()


def test_registry_that_falls_silent_after_the_tags_is_no_failed_push(
    registry: Registry, tmp_path: Path, options: Options
) -> None:
    sent = release(tmp_path / "r")
    assert sent.images[0].tags[-1] == "7b"
    access = replace(ACCESS, transport=GoneAfterTags)
    done = push(sent, registry.target(), access=access, options=options)
    assert done.probe is None
    assert [notice for notice in done.notices if "whether Ollama can pull it is unknown" in notice]
    registry.check_whole()


def test_blobs_are_mounted_across_repositories(
    registry: Registry, tmp_path: Path, options: Options
) -> None:
    sent = release(tmp_path / "r")
    push(sent, registry.target("a/b"), access=ACCESS, options=options)
    mounting = Options(state=options.state, mount_from=("no/such", "a/b"))
    done = push(sent, registry.target("c/d"), access=ACCESS, options=mounting)
    assert (done.sent, done.mounted, done.transferred) == (0, len(list(sent.blobs)), 0)
    registry.check_whole("c/d")


def test_what_another_repository_is_known_to_have_is_mounted_unasked(
    registry: Registry, tmp_path: Path, options: Options
) -> None:
    sent = release(tmp_path / "r", size=LARGE)
    push(sent, registry.target("a/b"), access=ACCESS, options=options)
    done = push(sent, registry.target("c/d"), access=ACCESS, options=options)
    weights, *small = sent.blobs
    assert (done.mounted, done.sent) == (1, len(small))
    assert done.transferred == sum(blob.size for blob in small)
    registry.check_whole("c/d")
    assert Places(registry.host, folder=options.state).of(weights.digest) == ("c/d", "a/b")
    done = push(sent, registry.target("c/d"), access=ACCESS, options=options)
    assert (done.mounted, done.sent, done.skipped) == (0, 0, 1 + len(small))


def test_what_is_known_but_no_longer_there_is_sent(
    registry: Registry, tmp_path: Path, options: Options
) -> None:
    sent = release(tmp_path / "r", size=LARGE)
    places = Places(registry.host, folder=options.state)
    for name in ("no/such", "UPPER/../case", "gone"):
        places.remember(sent.blobs, name)
    done = push(sent, registry.target("c/d"), access=ACCESS, options=options)
    assert (done.mounted, done.sent) == (0, len(list(sent.blobs)))
    registry.check_whole("c/d")
    uploads = registry.folder / "store/docker/registry/v2/repositories/c/d/_uploads"
    assert not list(uploads.rglob("data"))  # what was opened in vain was closed again


@needs("skopeo")
def test_skopeo_sees_our_digest(registry: Registry, tmp_path: Path, options: Options) -> None:
    sent = release(tmp_path / "r")
    push(sent, registry.target(), access=ACCESS, options=options)
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{registry.host}/ns/model:7b"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    assert hashlib.sha256(raw).hexdigest() == sent.images[0].image.digest.hex


@pytest.mark.filterwarnings("ignore::DeprecationWarning:dxf.*")
def test_python_dxf_pulls_it_with_verification(
    registry: Registry, tmp_path: Path, options: Options
) -> None:
    from dxf import DXF

    sent = release(tmp_path / "r")
    push(sent, registry.target(), access=ACCESS, options=options)
    client = DXF(registry.host, "ns/model", insecure=True)
    assert {"7b", "7b-f16"} <= set(client.list_aliases())
    text = client.get_manifest("7b")
    assert isinstance(text, str)
    manifest = json.loads(text)
    for blob, layer in zip(sent.images[0].image.layers, manifest["layers"], strict=True):
        pieces = client.pull_blob(layer["digest"])
        assert not isinstance(pieces, tuple)
        assert hashlib.sha256(b"".join(pieces)).hexdigest() == blob.digest.hex
