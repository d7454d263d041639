"""A release in one file, for where no network reaches: an OCI image layout in a tar archive.

Written as a stream in a fixed order with fixed metadata, so that the same release gives the same
bytes. Read without unpacking: members are found by one pass over the headers, a name that is not
expected, a link, a duplicate, a missing or an extra member is refused, and every blob is digested.
No name in an archive ever becomes a path.

Memory: one buffer and the small blobs.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError, WriteError, shown
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.ollama.placing import beside, check, remove_stale
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish import read, tarball
from medllm_pack.publish.release import OCI_INDEX, OCI_MANIFEST, Release, Tagged
from medllm_pack.publish.tarball import Slice
from medllm_pack.publish.targets import checked_tag

# image-spec, image-layout.md and annotations.md.
_LAYOUT_FILE: Final = "oci-layout"
_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
_INDEX: Final = "index.json"
_REF_NAME: Final = "org.opencontainers.image.ref.name"

_OWN_DIGEST: Final = "medllm-pack.manifests.digest"

_MANIFESTS_LIMIT: Final = 64 << 20  # bytes in memory at once


def write_bundle(
    release: Release, path: Path, *, replace: bool = False, report: Reporter = SILENT
) -> Digest:
    """Write a release into one file and return the digest of its index.

    Every blob is digested while it is written.

    Raises:
        WriteError: if the file exists and may not be replaced, or cannot be written.
        SourceError: if a blob is not what its digest says.
    """
    if path.exists() and not replace:
        raise WriteError(f"{shown(path)} exists; --force replaces it, or name another file")
    index = _index(release)
    blobs = _blobs(release)
    report.step("bundling", total_bytes=sum(blob.size for blob in blobs.values()))
    with files.translated(path, elsewhere="another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, glob.escape(path.name))
        with beside(path) as partial, partial.open("xb") as out:
            fcntl.flock(out, fcntl.LOCK_EX)
            _write_members(out, index, blobs, report)
            out.flush()
            os.fsync(out.fileno())
    return Digest.of(index)


def read_bundle(path: Path, *, report: Reporter = SILENT, verify: bool = True) -> Release:
    """Return the release in a bundle; its blobs are read from the bundle itself.

    Args:
        path: the bundle.
        report: listener.
        verify: digest all large blobs now. Small ones always are, and large ones whenever they are
            copied from the bundle.

    Raises:
        SourceError: if anything is missing, too much, or not what its digest says.
    """
    members = tarball.members(path)
    for needed, content in ((_LAYOUT_FILE, _LAYOUT), (_INDEX, None)):
        if needed not in members:
            raise SourceError(f"{shown(path)} has no {needed}; it is not a whole bundle")
        if content is not None and _content(members[needed]) != content:
            raise SourceError(f"{needed} in {shown(path)} is of another version")
    reader = _Reader(path, members)
    index = _content(members[_INDEX])
    release = reader.release(index)
    reader.refuse_what_is_left()
    if list(members) != [_LAYOUT_FILE, _INDEX, *map(_name, _blobs(release))]:
        raise SourceError(f"{shown(path)} has its members in another order; copy it again")
    if _index(release) != index:
        raise SourceError(f"{_INDEX} in {shown(path)} was changed; copy the bundle again")
    if verify:
        _verify(release, report)
    return release


def _index(release: Release) -> bytes:
    """Return index.json: one entry a tag, then the papers, in the order of the release."""
    entries: list[dict[str, Any]] = []
    for tagged in release.images:
        entries += [_entry(tagged.image) | {"annotations": {_REF_NAME: tag}} for tag in tagged.tags]
        entries += [
            _entry(paper) | {"artifactType": json.loads(paper.manifest).get("artifactType")}
            for paper in tagged.attached
        ]
    # Tags are the one thing that no digest of an image covers.
    own = str(Digest.of(_json(entries)))
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    return _json(document | {"annotations": {_OWN_DIGEST: own}})


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _entry(image: Image) -> dict[str, Any]:
    return {
        "mediaType": image.media_type,
        "digest": str(image.digest),
        "size": len(image.manifest),
    }


def _blobs(release: Release) -> dict[Digest, Blob]:
    """Return every blob by digest, manifests included, in the order of their digests."""
    blobs = {blob.digest: blob for blob in release.blobs}
    for tagged in release.images:
        for image in (tagged.image, *tagged.attached):
            blobs[image.digest] = Blob.of(image.manifest, image.media_type)
    return dict(sorted(blobs.items()))


def _write_members(
    out: BinaryIO, index: bytes, blobs: Mapping[Digest, Blob], report: Reporter
) -> None:
    for name, data in ((_LAYOUT_FILE, _LAYOUT), (_INDEX, index)):
        out.write(tarball.header(name, len(data)) + data + tarball.padding(len(data)))
    for digest, blob in blobs.items():
        out.write(tarball.header(_name(digest), blob.size))
        with blob.open() as file:
            check(blob, file, each=lambda data: _all(out, data), advance=report.advance)
        out.write(tarball.padding(blob.size))
    out.write(tarball.END)


def _all(out: BinaryIO, data: memoryview) -> None:
    out.write(data)


def _name(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def _content(member: Slice) -> bytes:
    if member.size > read.MANIFEST_LIMIT:
        raise SourceError(f"{shown(member.path)} has an index of {member.size} bytes")
    with member.open() as file:
        return file.read()


class _Reader:
    """Finds blobs among members, and remembers which members were asked for."""

    def __init__(self, path: Path, members: Mapping[str, Slice]) -> None:
        self.path, self.members = path, members
        self.asked = {_LAYOUT_FILE, _INDEX}

    def release(self, index: bytes) -> Release:
        """Return the release that an index describes."""
        tags: dict[Digest, list[str]] = {}
        images: dict[Digest, Image] = {}
        papers: list[Image] = []
        for entry in self._entries(index):
            image = self._image(entry)
            tag = (entry.get("annotations") or {}).get(_REF_NAME)
            if entry["mediaType"] == OCI_MANIFEST and "artifactType" in entry:
                papers.append(image)
            elif isinstance(tag, str) and tag not in sum(tags.values(), []):
                checked_tag(tag)
                images[image.digest] = image
                tags.setdefault(image.digest, []).append(tag)
            else:
                raise SourceError(f"{shown(self.path)} has an image without a tag, or a tag twice")
        return Release(tuple(_tagged(image, tags[d], papers) for d, image in images.items()))

    def refuse_what_is_left(self) -> None:
        """Refuse members that nothing names."""
        if extra := sorted(set(self.members) - self.asked):
            raise SourceError(
                f"{shown(self.path)} holds {shown(extra[0])}, which nothing in it names; do not "
                "use it"
            )

    def _entries(self, index: bytes) -> list[dict[str, Any]]:
        try:
            document = json.loads(index)
            entries = document["manifests"]
            if document["mediaType"] != OCI_INDEX or not entries:
                raise KeyError("mediaType")
            for entry in entries:
                Digest.parse(entry["digest"])
                if not isinstance(entry["mediaType"], str) or type(entry["size"]) is not int:
                    raise KeyError("size")
            if sum(entry["size"] for entry in entries) > _MANIFESTS_LIMIT:
                raise KeyError("size")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SourceError(f"{_INDEX} in {shown(self.path)} is not a bundle's") from error
        return list(entries)

    def _image(self, entry: Mapping[str, Any]) -> Image:
        digest = Digest.parse(entry["digest"])
        place = self.locate(digest, entry["size"])
        manifest = read.small(Blob(entry["mediaType"], digest, entry["size"], place))
        return read.read_image(manifest, media_type=entry["mediaType"], locate=self.locate)

    def locate(self, digest: Digest, size: int) -> Slice:
        """Return the place of a blob."""
        name = _name(digest)
        member = self.members.get(name)
        if member is None:
            raise SourceError(f"{shown(self.path)} lacks {name}; it is not whole, copy it again")
        if member.size != size:
            raise SourceError(f"{name} in {shown(self.path)} has {member.size} bytes, not {size}")
        self.asked.add(name)
        return member


def _tagged(image: Image, tags: list[str], papers: list[Image]) -> Tagged:
    own = tuple(
        paper
        for paper in papers
        if (json.loads(paper.manifest).get("subject") or {}).get("digest") == str(image.digest)
    )
    return read.tagged(image, tags=tuple(tags), attached=own)


def _verify(release: Release, report: Reporter) -> None:
    blobs = _blobs(release)
    report.step("checking the bundle", total_bytes=sum(blob.size for blob in blobs.values()))
    for blob in blobs.values():
        with blob.open() as file:
            check(blob, file, advance=report.advance)
