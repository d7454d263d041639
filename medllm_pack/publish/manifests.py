"""The manifests of a push: stored by digest, read back, with papers attached, and tagged last.

A registry that has no place for papers gets the model without them, unless something was accepted
by name to publish it: then the record must be there too. Knows nothing of how blobs get there.
"""

from __future__ import annotations

import json
from typing import Any

from medllm_pack.errors import TransferError, shown
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.progress import Reporter
from medllm_pack.publish.gate import ANNOTATIONS
from medllm_pack.publish.registry import Registry
from medllm_pack.publish.release import OCI_INDEX
from medllm_pack.publish.trying import GivenUpError


def put_image(registry: Registry, image: Image, *, by_digest: bool, report: Reporter) -> None:
    """Store a manifest by its digest, read it back and look at every blob.

    Raises:
        TransferError: if the registry refuses, or has not what it took.
    """
    if by_digest:
        if registry.manifest(str(image.digest), accept=image.media_type, mend=True) is None:
            _stored(registry, image, str(image.digest))
        found = registry.manifest(str(image.digest), accept=image.media_type)
        if found is None or found.data != image.manifest:
            raise TransferError(f"{registry.target.host} does not have {image.digest} it just took")
    report.step("looking")
    for blob in image.blobs:
        _look(registry, blob)


def _look(registry: Registry, blob: Blob) -> None:
    # Registries do not compare sizes with the manifest; so we do.
    size = registry.blob_size(blob.digest)
    if size != blob.size:
        raise TransferError(
            f"{registry.target.host} has {'no' if size is None else size} bytes of {blob.digest}, "
            f"not {blob.size}; nothing was tagged, try again"
        )


def _stored(registry: Registry, image: Image, reference: str) -> None:
    answer = registry.put_manifest(reference, media_type=image.media_type, data=image.manifest)
    if answer.status not in (200, 201, 202):
        raise registry.refused(answer, f"storing the manifest {shown(reference)}")


def put_tag(registry: Registry, image: Image, tag: str) -> None:
    """Give a manifest that is there a tag, and read it back.

    Raises:
        TransferError: if the registry refuses, or gives another manifest then.
    """
    _stored(registry, image, tag)
    found = registry.manifest(tag, accept=image.media_type)
    if found is None or found.data != image.manifest:
        raise TransferError(f"{registry.target.host} gives another manifest for {shown(tag)}")


def attach(registry: Registry, paper: Image, *, subject: Image) -> list[str]:
    """Store papers whose subject is an image, and list them where the registry does not.

    Returns:
        What the user should know, as where the registry takes no papers.

    Raises:
        TransferError: if the registry refuses, or takes no record of what was accepted by name.
    """
    answer = registry.put_manifest(
        str(paper.digest), media_type=paper.media_type, data=paper.manifest
    )
    if answer.status not in (200, 201, 202):
        if registry.target.kind == "oci" and answer.status not in (400, 404, 405, 415, 422):
            raise registry.refused(answer, "attaching the papers")
        _refuse_without_record(registry, paper)
        return [
            f"{registry.target.host} takes no attached papers ({answer.status}); the licence is "
            "in the model itself, pack.json and the card are not published there"
        ]
    if answer.headers.get("OCI-Subject") != str(subject.digest):
        return _list_by_tag(registry, paper, subject=subject)
    return []


def _refuse_without_record(registry: Registry, paper: Image) -> None:
    """Refuse to publish what was accepted by name where nobody would learn of it."""
    said = json.loads(paper.manifest).get("annotations") or {}
    if accepted := said.get(f"{ANNOTATIONS}overrides"):
        raise TransferError(
            f"{registry.target.host} takes no attached papers, so nobody there would learn that "
            f"{accepted} was accepted; nothing was tagged. Publish it elsewhere, or without "
            "--accept"
        )


def _list_by_tag(registry: Registry, paper: Image, *, subject: Image) -> list[str]:
    """Keep the index ``sha256-<hex>`` that stands in for the referrers API.

    OCI distribution specification 1.1, "Referrers Tag Schema".

    Returns:
        What the user should know.
    """
    tag = subject.digest.file_name
    notices = []
    try:
        found = registry.manifest(tag, accept=OCI_INDEX)
    except GivenUpError as error:
        if error.status != 500:
            raise
        found = None  # nobody can read it, and storing it again mends it
        notices.append(
            f"{registry.target.host} failed to read its list of what is attached to "
            f"{subject.digest}; it was begun anew"
        )
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_INDEX}
    document |= json.loads(found.data) if found else {}
    listed = [entry for entry in document.get("manifests") or [] if isinstance(entry, dict)]
    if any(entry.get("digest") == str(paper.digest) for entry in listed):
        return notices
    listed.append(
        {
            "mediaType": paper.media_type,
            "digest": str(paper.digest),
            "size": len(paper.manifest),
            "artifactType": json.loads(paper.manifest).get("artifactType"),
        }
    )
    data = json.dumps(document | {"manifests": listed}, separators=(",", ":")).encode()
    answer = registry.put_manifest(tag, media_type=OCI_INDEX, data=data)
    if answer.status not in (200, 201, 202):
        raise registry.refused(answer, "listing the papers")
    return notices
