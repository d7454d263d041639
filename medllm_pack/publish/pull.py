"""From a registry to a folder: manifest, papers, blobs into a hidden folder, then the pack.

Fetched blobs stay beside the target in ``.NAME.pull`` until all are there, so that a run that was
killed goes on. Knows nothing of how a pack is put together again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError, TransferError, WriteError, shown
from medllm_pack.ollama.image import DOCKER_MANIFEST, Blob, Image
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish import read
from medllm_pack.publish.credentials import exposed
from medllm_pack.publish.download import fetch_blob, open_remote
from medllm_pack.publish.papers import artifact_type, is_pack
from medllm_pack.publish.publication import overrides_of
from medllm_pack.publish.registry import Registry, opened
from medllm_pack.publish.release import OCI_MANIFEST, PACK_ARTIFACT, PUBLICATION_ARTIFACT, Release
from medllm_pack.publish.restore import restore
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Access

_MOST_PAPERS: Final = 16
_OURS: Final = (PACK_ARTIFACT, PUBLICATION_ARTIFACT)


@dataclass(frozen=True)
class Head:
    """What a reference names, before any weights are fetched.

    Attributes:
        image: the manifest; its blobs are only described.
        attached: the manifests of papers and of the record of publishing.
    """

    image: Image
    attached: tuple[Image, ...]

    @property
    def papers(self) -> tuple[Image, ...]:
        """The manifests of papers alone."""
        return tuple(image for image in self.attached if is_pack(image))


@dataclass(frozen=True)
class Pulled:
    """What was brought.

    Attributes:
        digest: of the manifest.
        overrides: what was accepted by name when it was published.
    """

    digest: Digest
    overrides: tuple[str, ...]


def pull(
    target: RegistryTarget,
    out: Path,
    *,
    access: Access | None = None,
    replace: bool = False,
    report: Reporter = SILENT,
) -> Pulled:
    """Fetch what a reference names into a folder.

    Raises:
        TransferError: if it is not there, or not what its digests say.
        SourceError: if it is no model.
        WriteError: if the folder exists or cannot be written.
    """
    if out.exists() and not replace:
        raise WriteError(f"{shown(out)} exists; --force replaces it, --out writes elsewhere")
    for line in exposed(target.kind):
        report.notice(line)
    with opened(target, access or Access()) as registry, _work_folder(out) as work:
        found = head(registry)
        image, *attached = fetched((found.image, *found.attached), registry, work, report)
        overrides = overrides_of(attached)
        tagged = read.tagged(image, tags=(target.tag or "latest",), attached=tuple(attached))
        restore(Release((tagged,)), out, replace=replace, report=report)
        shutil.rmtree(work)
    return Pulled(found.image.digest, overrides)


def fetched(
    images: Sequence[Image], registry: Registry, folder: Path, report: Reporter
) -> list[Image]:
    """Fetch every blob of images into a folder; return them with blobs that are at hand.

    Raises:
        TransferError: if one is not there, or not what its digest says.
    """
    blobs = {blob.digest: blob for image in images for blob in image.blobs}
    report.step("fetching", total_bytes=sum(blob.size for blob in blobs.values()))
    for digest, blob in blobs.items():
        fetch_blob(registry, digest, blob.size, folder / digest.file_name, report.advance)
    return [_at(image, folder) for image in images]


def head(registry: Registry) -> Head:
    """Return the manifest that a reference names, and those of its papers.

    Raises:
        TransferError: if there is none; the tags that are there are named.
    """
    reference = registry.target.reference
    found = registry.manifest(reference)
    if found is None:
        tags = [tag for tag in registry.tags() if not tag.startswith("sha256-")]
        there = f"; there are {', '.join(map(shown, sorted(tags)[:20]))}" if tags else ""
        raise TransferError(f"{shown(registry.target)} is not there{there}")
    image = read.read_image(found.data, media_type=found.media_type, locate=_nowhere)
    if found.media_type != DOCKER_MANIFEST:
        raise SourceError(f"{shown(registry.target)} is not a model in Ollama's form")
    return Head(image, tuple(_papers(registry, image)))


@contextmanager
def remote_weights(
    target: RegistryTarget, access: Access | None = None
) -> Iterator[tuple[Head, Blob, BinaryIO]]:
    """Yield what a reference names and its weights as a file, of which little is fetched.

    The digest of the weights is the manifest's; only a pull compares it with the bytes.
    """
    with opened(target, access or Access()) as registry:
        found = head(registry)
        weights = read.weights_of(found.image)
        yield found, weights, open_remote(registry, weights.digest, weights.size)


def _papers(registry: Registry, image: Image) -> Iterator[Image]:
    """Yield what this package attached to an image."""
    index = registry.referrers(image.digest)
    if index is None:
        return
    for entry in _entries(index.data):
        if entry.get("artifactType") not in _OURS or entry.get("mediaType") != OCI_MANIFEST:
            continue
        digest = Digest.parse(str(entry.get("digest")))
        paper = registry.manifest(str(digest), accept=OCI_MANIFEST)
        if paper is None:
            raise TransferError(f"{registry.target.host} lists the papers {digest} and lacks them")
        made = read.read_image(paper.data, media_type=paper.media_type, locate=_nowhere)
        if artifact_type(made) in _OURS:
            yield made


def _entries(index: bytes) -> list[dict[str, Any]]:
    try:
        entries = json.loads(index)["manifests"]
    except (ValueError, KeyError, TypeError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TransferError("the list of what is attached to the model is damaged")
    return entries[:_MOST_PAPERS]


def _nowhere(digest: Digest, size: int) -> bytes:
    return b""


def _at(image: Image, folder: Path) -> Image:
    """Return an image whose blobs lie in a folder under their digests."""
    return read.read_image(
        image.manifest,
        media_type=image.media_type,
        locate=lambda digest, size: folder / digest.file_name,
    )


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Yield the folder that keeps what was fetched; only one run at a time may have it."""
    work = out.parent / f".{out.name}.pull"
    with files.translated(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WriteError(f"another pull is filling {shown(out)}; wait for it") from error
        yield work
    finally:
        os.close(lock)
