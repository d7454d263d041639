"""What a release is on the Hub: its files by name, and whether those that are there are the same.

The files are the pack's own, and three more that make `ollama run hf.co/org/repo:Q4_K_M` ask the
model as the pack does. Knows nothing of how they get there.

Memory: the small files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from medllm_pack.errors import SourceError, TransferError
from medllm_pack.ollama import create
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.pack.manifest import NAME as PACK_JSON
from medllm_pack.pack.sums import checked_name
from medllm_pack.publish import read
from medllm_pack.publish.papers import is_pack, names_of
from medllm_pack.publish.release import Release
from medllm_pack.publish.targets import HubTarget
from medllm_pack.weights.needed import listed

# What the Hub hands to Ollama beside the GGUF file: hub documentation, "Use Ollama with any GGUF
# Model on Hugging Face Hub". The bytes are those of Ollama's own layers.
BRIDGE: Final[Mapping[str, str]] = {
    create.TEMPLATE: "template",
    create.SYSTEM: "system",
    create.PARAMS: "params",
}


def wanted_files(release: Release) -> dict[str, Blob]:
    """Return every file of a release by its name on the Hub.

    Raises:
        SourceError: if the release has no papers of a pack.
    """
    found: dict[str, Blob] = {}
    for tagged in release.images:
        papers = _papers(tagged.attached)
        found |= papers
        weights = read.weights_of(tagged.image)
        found[_weights_name(papers, weights)] = weights
    found |= _bridge(release)
    return found


def is_same(blob: Blob, sibling: Any) -> bool:
    """Say whether the Hub lists these very bytes."""
    if sibling is None:
        return False
    if sibling.lfs:
        return bool(sibling.lfs.sha256 == blob.digest.hex and sibling.lfs.size == blob.size)
    return bool(sibling.size == blob.size and sibling.blob_id == _git_digest(blob))


def _papers(attached: tuple[Image, ...]) -> dict[str, Blob]:
    """Return the files of all attached manifests by name."""
    if not any(is_pack(image) for image in attached):
        raise SourceError("the release has no papers of a pack; publish a pack folder")
    papers: dict[str, Blob] = {}
    for image in attached:
        blobs = {blob.digest: blob for blob in image.layers}
        papers |= {name: blobs[digest] for name, digest in names_of(image.manifest).items()}
    return papers


def _weights_name(papers: Mapping[str, Blob], weights: Blob) -> str:
    for entry in _variants(papers):
        if entry["sha256"] == weights.digest.hex:
            return checked_name(entry["file"], of=PACK_JSON)
    raise SourceError(f"{PACK_JSON} does not name the weights {weights.digest}; build again")


def _variants(papers: Mapping[str, Blob]) -> list[Mapping[str, Any]]:
    try:
        return list(json.loads(read.small(papers[PACK_JSON]))["variants"])
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(f"{PACK_JSON} does not describe a pack; build again") from error


def _bridge(release: Release) -> dict[str, Blob]:
    """Return the files that the Hub hands to Ollama; one of each serves all variants."""
    found: dict[str, Blob] = {}
    for tagged in release.images:
        for layer in tagged.image.layers:
            name = BRIDGE.get(layer.media_type)
            if name and found.setdefault(name, layer).digest != layer.digest:
                raise SourceError(
                    f"the variants differ in their {name}, and a repository of the Hub has one "
                    "for all; publish them to repositories of their own with --quant"
                )
    return found


def _git_digest(blob: Blob) -> str:
    digest = hashlib.sha1(b"blob %d\0" % blob.size, usedforsecurity=False)
    with blob.open() as file:
        while data := file.read(4 << 20):
            digest.update(data)
    return digest.hexdigest()


def refuse_a_mixture(
    release: Release, files: Mapping[str, Blob], there: Mapping[str, Any], target: HubTarget
) -> None:
    """Refuse to leave weights there that the new pack.json describes otherwise.

    Raises:
        TransferError: naming them.
    """
    papers = _papers(release.images[0].attached)
    odd = [
        entry
        for entry in _variants(papers)
        if (sibling := there.get(entry["file"])) and entry["file"] not in files
        if (sibling.lfs and sibling.lfs.sha256 != entry["sha256"]) or sibling.size != entry["size"]
    ]
    if odd:
        quants = ",".join(entry["quant"] for entry in odd)
        raise TransferError(
            f"{target.repository} has {listed([entry['file'] for entry in odd])} of another "
            f"build; publish {quants} as well, or delete it there first"
        )
