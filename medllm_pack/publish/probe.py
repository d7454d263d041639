"""Can Ollama pull from there? Its client's first requests, made as it makes them.

ollama server/download.go (2026-08): it wants a Location for the weights, either a redirect to
another host name or a Location header on a 200, and fetches them from there without a login. A
plain registry gives none, and the pull fails although everything is in place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from urllib.parse import urljoin

from medllm_pack.digests import Digest
from medllm_pack.errors import TransferError
from medllm_pack.ollama import create
from medllm_pack.ollama.image import DOCKER_MANIFEST
from medllm_pack.publish.guard import Origin
from medllm_pack.publish.registry import Registry, opened
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Access
from medllm_pack.publish.trying import InterruptedTransferError

REMEDY = "docs/registry.md shows the few lines for nginx that help"


@dataclass(frozen=True)
class Verdict:
    """Whether `ollama pull` works.

    Attributes:
        pulls: yes or no.
        why: one sentence.
    """

    pulls: bool
    why: str


def probe(target: RegistryTarget, access: Access) -> Verdict:
    """Ask for a tag as `ollama pull` does, without a login of ours.

    Raises:
        TransferError: if the registry cannot be reached.
    """
    if target.repository.count("/") != 1:
        return Verdict(False, "Ollama's names have two parts, ns/model, and no more")
    with opened(target, access, anonymous=True) as registry:
        try:
            manifest = registry.manifest(target.reference, accept=DOCKER_MANIFEST)
            if manifest is None or manifest.media_type != DOCKER_MANIFEST:
                return Verdict(False, "Ollama reads manifests of Docker's type only; none is there")
            return _weights(registry, _model(manifest.data))
        except InterruptedTransferError:
            raise
        except TransferError as error:
            return Verdict(
                False,
                f"without a login it gives nothing, and Ollama knows no Docker login ({error})",
            )


def _model(manifest: bytes) -> Digest:
    for layer in json.loads(manifest)["layers"]:
        if layer["mediaType"] == create.MODEL:
            return Digest.parse(layer["digest"])
    raise TransferError("the manifest names no weights")


def _weights(registry: Registry, digest: Digest) -> Verdict:
    if registry.blob_size(digest) is None:
        return Verdict(False, "it does not have the weights")
    path = f"blobs/{digest}"
    # Redirects to the same host name are followed by its client, whatever the port.
    with registry.stream("GET", path, follow=lambda here, there: here.host == there.host) as answer:
        location = answer.headers.get("Location")
        if answer.status_code in (200, 307) and location:
            there = Origin.of(urljoin(str(answer.url), location))
            return Verdict(True, f"it fetches the weights from {there.host}")
        if answer.status_code == 200:
            return Verdict(
                False,
                "`ollama pull` will fail: it needs a Location header with the weights, and the "
                f"registry sends none; {REMEDY}",
            )
        return Verdict(False, f"the weights are answered with {answer.status_code}; {REMEDY}")
