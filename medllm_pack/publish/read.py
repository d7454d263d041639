"""What was published, read back: manifests from outside become images, or are refused.

Whoever fetches hands over the bytes of a manifest and says where blobs come from; digests and sizes
are the manifest's, and whoever reads a blob checks it against them. Nothing here opens a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError, shown
from medllm_pack.ollama import create
from medllm_pack.ollama.image import DOCKER_MANIFEST, Blob, Image, Source
from medllm_pack.ollama.placing import check
from medllm_pack.publish.release import OCI_MANIFEST, Tagged

Locate = Callable[[Digest, int], Path | bytes | Source]

MANIFEST_LIMIT: Final = 4 << 20  # bytes; registries accept no more
SMALL_LIMIT: Final = 16 << 20  # bytes of a configuration, a text or a paper
_QUANT: Final = re.compile(r"[A-Za-z0-9_]{1,32}", re.ASCII)
_MOST_LAYERS: Final = 1024
_MOST_BYTES: Final = 1 << 44


def read_image(manifest: bytes, *, media_type: str, locate: Locate) -> Image:
    """Return the image of a manifest.

    Args:
        manifest: its bytes.
        media_type: as its transport named it; the manifest must agree.
        locate: digest and size -> where the bytes of a blob are.

    Raises:
        SourceError: if it is not a manifest of an image.
        DigestError: if a digest is none.
    """
    document = _object(manifest, limit=MANIFEST_LIMIT)
    if media_type not in (DOCKER_MANIFEST, OCI_MANIFEST):
        raise SourceError(f"a manifest is of the type {shown(media_type)}, not a model's")
    if document.get("mediaType") != media_type or document.get("schemaVersion") != 2:
        raise SourceError(f"a manifest that should be {media_type} is something else")
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
        raise SourceError("a manifest has no list of layers, or a very long one")
    return Image(
        media_type,
        manifest,
        _blob(document.get("config"), locate),
        tuple(_blob(layer, locate) for layer in layers),
    )


def tagged(image: Image, *, tags: tuple[str, ...], attached: tuple[Image, ...]) -> Tagged:
    """Return an image as a variant; its name is the ``file_type`` of the configuration.

    Raises:
        SourceError: if the configuration is not one of Ollama's.
    """
    for paper in attached:
        subject = json.loads(paper.manifest).get("subject")
        if not isinstance(subject, dict) or subject.get("digest") != str(image.digest):
            raise SourceError(f"papers that should belong to {image.digest} are of another image")
    quant = _object(small(image.config), limit=SMALL_LIMIT).get("file_type")
    if not isinstance(quant, str) or not _QUANT.fullmatch(quant):
        raise SourceError(f"a model's configuration names no file type but {shown(quant)}")
    return Tagged(quant.lower(), tags, image, attached)


def small(blob: Blob) -> bytes:
    """Return the bytes of a small blob, checked.

    Raises:
        SourceError: if it is large, or not what its digest says.
    """
    if blob.size > SMALL_LIMIT:
        raise SourceError(f"{blob.digest} has {blob.size} bytes, too many for a text")
    parts: list[bytes] = []
    with blob.open() as file:
        check(blob, file, each=lambda data: parts.append(bytes(data)))
    return b"".join(parts)


def weights_of(image: Image) -> Blob:
    """Return the model layer of an image.

    Raises:
        SourceError: if there is not exactly one.
    """
    found = [layer for layer in image.layers if layer.media_type == create.MODEL]
    if len(found) != 1:
        raise SourceError(f"{image.digest} has {len(found)} layers of weights, not one")
    return found[0]


def from_of(image: Image) -> str | None:
    """Return the name that the model layer's ``from`` states, if it does."""
    for layer in json.loads(image.manifest)["layers"]:
        if layer.get("mediaType") == create.MODEL and isinstance(layer.get("from"), str):
            return str(layer["from"])
    return None


def _blob(entry: Any, locate: Locate) -> Blob:
    if not isinstance(entry, Mapping):
        raise SourceError("a manifest has an entry that is no descriptor")
    media_type, digest, size = (entry.get(key) for key in ("mediaType", "digest", "size"))
    if not isinstance(media_type, str) or not isinstance(digest, str):
        raise SourceError("a descriptor lacks its media type or digest")
    if type(size) is not int or not 0 <= size <= _MOST_BYTES:
        raise SourceError(f"a descriptor states the size {shown(size)}")
    parsed = Digest.parse(digest)
    return Blob(media_type, parsed, size, locate(parsed, size))


def _object(data: bytes, *, limit: int) -> dict[str, Any]:
    if len(data) > limit:
        raise SourceError(f"a JSON document has {len(data)} bytes; at most {limit} are accepted")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError("a manifest or configuration is not valid JSON") from error
    if not isinstance(document, dict):
        raise SourceError("a manifest or configuration is no JSON object")
    return document
