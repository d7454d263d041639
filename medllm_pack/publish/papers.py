"""The papers of a pack on their way: everything but the weights, attached to an image by digest.

An attached manifest is an OCI artifact whose subject is the image, with one layer a file; the
file's name is its annotation ``org.opencontainers.image.title``. Names from outside are checked
before anything becomes a path. Knows nothing of registries or archives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError, shown
from medllm_pack.ollama import gojson
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.pack.sums import BESIDE, SIGNATURE, SUMS, checked_name, parse_sums
from medllm_pack.publish.release import OCI_MANIFEST, PACK_ARTIFACT

TITLE: Final = "org.opencontainers.image.title"
# image-spec, manifest.md, "guidance for an empty descriptor".
_EMPTY: Final = Blob.of(b"{}", "application/vnd.oci.empty.v1+json")

_MEDIA_TYPES: Final[Mapping[str, str]] = {
    "pack.json": PACK_ARTIFACT,
    SIGNATURE: "application/vnd.dev.sigstore.bundle.v0.3+json",
    ".json": "application/json",
    ".md": "text/markdown",
}
_OTHERS: Final = "text/plain"


def read_papers(
    folder: Path, *, weights: Iterable[str]
) -> tuple[dict[str, Digest], dict[str, Blob]]:
    """Return the digests of SHA256SUMS, and every paper by its name, checked against them.

    Args:
        folder: the pack.
        weights: names of the GGUF files, which are not papers.

    Raises:
        SourceError: if a paper is missing or was changed.
    """
    place = f"{SUMS} in {shown(folder)}"
    sums = parse_sums(files.read_small(folder / SUMS), of=place)
    beside = [name for name in BESIDE if (folder / name).exists()]
    papers: dict[str, Blob] = {}
    for name in sorted({*sums, *beside} - set(weights)):
        blob = Blob.of(files.read_small(folder / name), media_type(name))
        if name in sums and blob.digest != sums[name]:
            raise SourceError(
                f"{shown(name)} in {shown(folder)} is not what {SUMS} says; build the pack again"
            )
        papers[name] = blob
    return sums, papers


def media_type(name: str) -> str:
    """Return the media type of a paper, by its name."""
    return _MEDIA_TYPES.get(name) or _MEDIA_TYPES.get(Path(name).suffix, _OTHERS)


def attach(
    image: Image,
    papers: Mapping[str, Blob],
    *,
    artifact_type: str = PACK_ARTIFACT,
    annotations: Mapping[str, str] = {},
) -> Image:
    """Return the manifest that attaches papers to an image."""
    layers = [
        paper.descriptor() | {"annotations": {TITLE: name}}
        for name, paper in sorted(papers.items())
    ]
    subject: dict[str, gojson.Value] = {
        "mediaType": image.media_type,
        "digest": str(image.digest),
        "size": len(image.manifest),
    }
    manifest: dict[str, gojson.Value] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": _EMPTY.descriptor(),
        "layers": layers,
        "subject": subject,
    }
    if annotations:
        manifest["annotations"] = gojson.sorted_map(annotations)
    blobs = tuple(paper for _, paper in sorted(papers.items()))
    return Image(OCI_MANIFEST, gojson.encode(manifest), _EMPTY, blobs)


def is_pack(attached: Image) -> bool:
    """Say whether an attached manifest holds a pack's papers, and not something else."""
    return artifact_type(attached) == PACK_ARTIFACT


def artifact_type(attached: Image) -> object:
    """Return what an attached manifest says it holds."""
    return json.loads(attached.manifest).get("artifactType")


def names_of(manifest: bytes) -> dict[str, Digest]:
    """Return file name -> digest of an attached manifest.

    Raises:
        SourceError: if a name may not become a path or stands twice, or there are none.
        DigestError: if a digest is none.
    """
    document: Any = json.loads(manifest)
    try:
        pairs = [(layer["annotations"][TITLE], layer["digest"]) for layer in document["layers"]]
    except (KeyError, TypeError) as error:
        raise SourceError("the attached papers have no names; they are not a pack's") from error
    if not all(isinstance(digest, str) for _, digest in pairs):
        raise SourceError("the attached papers have no digests; they are not a pack's")
    names = {checked_name(name, of="an attached manifest"): Digest.parse(d) for name, d in pairs}
    if len({name.casefold() for name in names}) != len(pairs):
        raise SourceError("an attached manifest has a file name twice")
    return names
