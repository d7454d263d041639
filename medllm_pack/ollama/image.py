"""A model as Ollama keeps and moves it: a manifest, a configuration and layers, all by digest.

Values only. Knows nothing of the store, of registries or of the network: whoever moves an image
asks it for its blobs and its manifest.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from medllm_pack.digests import Digest

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"  # Ollama reads no other


class Source(Protocol):
    """Bytes that can be read from their start, again and again."""

    def open(self) -> BinaryIO:
        """Open the bytes for reading.

        Raises:
            OSError: if they cannot be read.
        """


@dataclass(frozen=True)
class Blob:
    """Bytes with a known digest, in a file or at hand.

    Attributes:
        media_type: as it stands in the manifest.
        size: bytes.
        source: the file, the bytes themselves where they are few, or whoever opens them.
    """

    media_type: str
    digest: Digest
    size: int
    source: Path | bytes | Source = field(repr=False)

    @classmethod
    def of(cls, data: bytes, media_type: str) -> Blob:
        """Return a blob of bytes at hand."""
        return cls(media_type, Digest.of(data), len(data), data)

    def open(self) -> BinaryIO:
        """Open the bytes for reading.

        Raises:
            OSError: if the file cannot be read.
        """
        match self.source:
            case Path():
                return self.source.open("rb")
            case bytes():
                return io.BytesIO(self.source)
            case _:
                return self.source.open()

    def descriptor(self) -> dict[str, str | int]:
        """Return the entry of a manifest."""
        return {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}


@dataclass(frozen=True)
class Image:
    """A manifest and everything it names.

    Attributes:
        media_type: of the manifest.
        manifest: its exact bytes; their digest is the image's identity.
        config: the configuration.
        layers: in the order of the manifest.
    """

    media_type: str
    manifest: bytes = field(repr=False)
    config: Blob
    layers: tuple[Blob, ...]

    @property
    def digest(self) -> Digest:
        """Digest of the manifest."""
        return Digest.of(self.manifest)

    @property
    def blobs(self) -> Iterator[Blob]:
        """All blobs, each digest once: what must be there before the manifest is."""
        seen: set[Digest] = set()
        for blob in (*self.layers, self.config):
            if blob.digest not in seen:
                seen.add(blob.digest)
                yield blob
