"""What is published, whatever the target: images under tags, and papers attached to them.

A release is decided once, from the pack, before anything is sent. A target moves its blobs, then
the images' manifests, then the papers', then the tags. Values only; nothing here reads the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from medllm_pack.ollama.image import DOCKER_MANIFEST as DOCKER_MANIFEST
from medllm_pack.ollama.image import Blob, Image

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
# The pack's papers (pack.json, card, licence, parity, provenance, …), one layer a file; the file's
# name stands in the annotation `org.opencontainers.image.title`.
PACK_ARTIFACT = "application/vnd.medllm-pack.pack.v1+json"
# What the gate let through and why (publication.json).
PUBLICATION_ARTIFACT = "application/vnd.medllm-pack.publication.v1+json"


@dataclass(frozen=True)
class Tagged:
    """A variant's image and the tags it is published under.

    Attributes:
        quant: the variant, such as ``q4_k_m``.
        tags: such as ``7b-q4_k_m``; the default variant has a second one.
        image: in Ollama's form (docker v2).
        attached: OCI manifests whose ``subject`` is the image.
    """

    quant: str
    tags: tuple[str, ...]
    image: Image
    attached: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Release:
    """Everything that one ``publish`` brings to its target."""

    images: tuple[Tagged, ...]

    @property
    def blobs(self) -> Iterator[Blob]:
        """Every blob once, large and small."""
        seen = set()
        for tagged in self.images:
            for image in (tagged.image, *tagged.attached):
                for blob in image.blobs:
                    if blob.digest not in seen:
                        seen.add(blob.digest)
                        yield blob
