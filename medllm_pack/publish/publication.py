"""publication.json: what the gate let through and why, on its way to who receives the model.

It is attached beside the papers of a pack and is none of them: what is pulled is the pack that was
built, byte for byte, and the record is told in one line. Knows nothing of targets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import DigestError, SourceError
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.pack.manifest import NAME as PACK_JSON
from medllm_pack.publish import read
from medllm_pack.publish.gate import Permit
from medllm_pack.publish.papers import artifact_type, attach, is_pack, media_type, names_of
from medllm_pack.publish.release import PUBLICATION_ARTIFACT, Release, Tagged

NAME: Final = "publication.json"
# `--accept` takes these; a duty is named after its file.
_OVERRIDE: Final = re.compile(r"[a-z\-]{1,40}(:[A-Za-z0-9._+\-]{1,128})?", re.ASCII)


def recorded(release: Release, permit: Permit) -> Release:
    """Return a release whose images carry what the gate said of them."""
    text = files.canonical_json(permit.publication())
    record = Blob.of(text.encode(), media_type(NAME))
    return Release(tuple(_with(tagged, record, permit) for tagged in release.images))


def overrides_of(attached: Iterable[Image]) -> tuple[str, ...]:
    """Return what was accepted by name when an image was published, as its attachments tell.

    A record of another state of the pack says nothing; of several that fit, all count.

    Raises:
        SourceError: if a record cannot be understood.
    """
    attached = tuple(attached)
    packs = {names_of(image.manifest).get(PACK_JSON) for image in attached if is_pack(image)}
    found = (
        overrides_in(read.small(blob), pack=pack)
        for image in attached
        if artifact_type(image) == PUBLICATION_ARTIFACT
        for blob in image.layers
        for pack in packs
        if pack is not None
    )
    return tuple(dict.fromkeys(name for names in found for name in names))


def overrides_in(record: bytes, *, pack: Digest) -> tuple[str, ...]:
    """Return what a record says was accepted; nothing if it is of another pack.json.

    Raises:
        SourceError: if it cannot be understood.
    """
    try:
        document: Any = json.loads(record)
        names = [entry["name"] for entry in document["overrides"]]
        said = Digest(document["pack"]["sha256"])
        if not all(isinstance(name, str) and _OVERRIDE.fullmatch(name) for name in names):
            raise KeyError("name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DigestError) as error:
        raise SourceError(
            f"{NAME} cannot be understood; ask who published the model what was accepted"
        ) from error
    return tuple(names) if said == pack else ()


def sentence(overrides: Iterable[str]) -> str:
    """Return in one line what was accepted."""
    names = ", ".join(overrides)
    return f"published in spite of {names}" if names else "nothing was accepted by name"


def _with(tagged: Tagged, record: Blob, permit: Permit) -> Tagged:
    attachment = attach(
        tagged.image, {NAME: record}, artifact_type=PUBLICATION_ARTIFACT,
        annotations=permit.annotations(tagged.quant),
    )  # fmt: skip
    return replace(tagged, attached=(*tagged.attached, attachment))
