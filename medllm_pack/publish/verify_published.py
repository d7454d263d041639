"""Is what was published what its pack says? Asked of a registry or the Hub, without the weights.

The digest of the weights is what the other side states; their header is fetched and read by the
strict reader, the papers are fetched and checked. Only a pull compares every byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medllm_pack.errors import SourceError
from medllm_pack.gguf.reader import GGUFFile, read_header
from medllm_pack.pack import integrity, manifest
from medllm_pack.pack.shape import read_pack
from medllm_pack.pack.sums import read_sums
from medllm_pack.progress import Reporter
from medllm_pack.publish import read
from medllm_pack.publish.credentials import exposed
from medllm_pack.publish.papers import names_of
from medllm_pack.publish.publication import overrides_of
from medllm_pack.publish.targets import HubTarget, RegistryTarget
from medllm_pack.publish.verify import (
    Check,
    Verified,
    all_of,
    of_papers,
    parity_check,
    publication_check,
)

_UNREAD = Check("bytes", None, "the weights were not fetched; pull compares every byte")


def verify_registry(target: RegistryTarget, *, access: Any, report: Reporter) -> Verified:
    """Check what a reference names.

    Raises:
        TransferError: if it is not there, or the registry does not answer.
        SourceError: if it is no model, or came without a pack's papers.
    """
    from medllm_pack.publish.download import open_remote
    from medllm_pack.publish.pull import fetched, head
    from medllm_pack.publish.registry import opened

    for line in exposed(target.kind):
        report.notice(line)
    report.step("papers and header")
    with opened(target, access) as registry, TemporaryDirectory(prefix="medllm-verify-") as place:
        found = head(registry)
        if len(found.papers) != 1:
            raise SourceError(f"{target} came without the papers of one pack; nothing to compare")
        blobs, folder = Path(place, "blobs"), Path(place, "pack")
        blobs.mkdir()
        folder.mkdir()
        attached = fetched(found.attached, registry, blobs, report)
        for name, digest in names_of(found.papers[0].manifest).items():
            shutil.copyfile(blobs / digest.file_name, folder / name)
        weights = read.weights_of(found.image)
        remote = open_remote(registry, weights.digest, weights.size)
        header = read_header(remote, size=weights.size, name=str(target))
        checks = _papers(folder, report)
        checks += _weights(folder, weights.digest.hex, header)
        checks.append(publication_check(lambda: overrides_of(attached)))
    return Verified(str(target), (*checks, _UNREAD))


def verify_hub(
    target: HubTarget, *, report: Reporter, cache: Path | None = None, endpoint: str | None = None
) -> Verified:
    """Check the GGUF files of a repository against its pack.json.

    Args:
        target: the repository.
        report: listener.
        cache: the Hub cache, for the small files.
        endpoint: address of the Hub, if not the usual one.

    Raises:
        SourceError: if it cannot be read, or is no pack.
    """
    from medllm_pack.publish.hub_look import look_at_hub

    look = look_at_hub(target, report=report, cache=cache, endpoint=endpoint)
    document = look.document
    if document is None:
        raise SourceError(f"{target} holds no pack.json; nothing to compare")
    named = {variant["file"]: variant for variant in document["variants"]}
    checks = [Check("commit", True, look.commit)]
    for file in look.files:
        if file.name not in named:
            checks.append(Check(file.name, False, "pack.json does not name this file"))
            continue
        checks += _one(document, named[file.name], file.sha256, file.header)
    here = [named[file.name] for file in look.files if file.name in named]
    checks.append(parity_check(document, here))
    checks.append(publication_check(lambda: look.overrides()))
    return Verified(str(target), (*checks, _UNREAD))


def _papers(folder: Path, report: Reporter) -> list[Check]:
    sums = read_sums(folder)
    document = read_pack(folder)
    weights = {variant["file"] for variant in document["variants"]}
    papers = {name: digest for name, digest in sums.items() if name not in weights}
    return [
        all_of("files", integrity.listing_faults(folder, sums, spared=weights),
               "no paper is missing"),
        all_of("digests", integrity.digest_faults(folder, papers, report=report),
               "the papers are those that SHA256SUMS names"),
        all_of("agreement", integrity.agreement_faults(document, sums),
               "pack.json and SHA256SUMS state the same digests"),
    ]  # fmt: skip


def _weights(folder: Path, sha256: str, header: GGUFFile) -> list[Check]:
    document = read_pack(folder)
    variant = next((v for v in document["variants"] if v["sha256"] == sha256), None)
    if variant is None:
        return [Check("weights", False, f"pack.json names no file with SHA-256 {sha256[:12]}…")]
    return [*_one(document, variant, sha256, header), *of_papers(folder, document, [variant])]


def _one(
    document: manifest.Document, variant: Mapping[str, Any], sha256: str | None, header: GGUFFile
) -> list[Check]:
    stated = [] if sha256 == variant["sha256"] else [f"stated {sha256}, in pack.json "
                                                     f"{variant['sha256']}"]  # fmt: skip
    return [
        all_of(f"weights {variant['quant']}", stated, f"sha256:{sha256}, as pack.json has it"),
        all_of(f"header {variant['quant']}",
               integrity.header_differences(header, document, variant),
               "sizes, types, name and licence are those of pack.json"),
    ]  # fmt: skip
