"""Is what was published what its pack says? Asked of a bundle, or of a registry.

Papers are read and checked like a pack's, the header of the weights by the strict reader, and the
texts that Ollama gets against the Modelfile. A registry states the digest of the weights; where
every byte is asked for, every blob is read to its end, digested on the way, and kept nowhere. What
a repository of the Hub needs otherwise is in verify_hub.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from medllm_pack.digests import Digest
from medllm_pack.errors import GGUFError, MedllmError, SourceError, TransferError
from medllm_pack.gguf.reader import GGUFFile, read_header
from medllm_pack.ollama import create
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.pack import integrity, manifest
from medllm_pack.pack.shape import read_pack
from medllm_pack.pack.sums import read_sums
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish import read
from medllm_pack.publish.credentials import exposed
from medllm_pack.publish.make import creation_of
from medllm_pack.publish.publication import overrides_of
from medllm_pack.publish.release import Release, Tagged
from medllm_pack.publish.restore import papers_of
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.verify import (
    Check,
    Verified,
    all_of,
    attempt,
    of_papers,
    publication_check,
    variants_check,
)

if TYPE_CHECKING:
    from medllm_pack.publish.transport import Access

UNREAD = Check("bytes", None, "the weights were not fetched; --download compares every byte")


def verify_bundle(path: Path, *, report: Reporter = SILENT) -> Verified:
    """Check a bundle: its form, every blob, its papers, and that they speak of its weights."""
    from medllm_pack.publish.bundle import read_bundle

    checks: list[Check] = []
    release = attempt(checks, "bundle", lambda: read_bundle(path, report=report))
    if release is not None:
        checks += _of_release(release, lambda blob: blob.open(), report)
    return Verified(str(path), tuple(checks))


def verify_registry(
    target: RegistryTarget,
    *,
    access: Access | None = None,
    download: bool = False,
    report: Reporter = SILENT,
) -> Verified:
    """Check what a reference names.

    Args:
        target: the reference.
        access: how we get in.
        download: read every blob and compare its digest; nothing of the weights is kept.
        report: listener.

    Raises:
        TransferError: if it is not there, or the registry does not answer.
        SourceError: if it is no model, or came without a pack's papers and no bytes are asked for.
    """
    from medllm_pack.publish.download import open_remote
    from medllm_pack.publish.pull import fetched, head
    from medllm_pack.publish.registry import opened
    from medllm_pack.publish.transport import Access
    from medllm_pack.publish.trying import InterruptedTransferError

    for line in exposed(target.kind):
        report.notice(line)
    with (
        opened(target, access or Access()) as registry,
        TemporaryDirectory(prefix="medllm-verify-") as place,
    ):
        found = head(registry)
        if not found.papers and not download:
            raise SourceError(
                f"{target} came without the papers of a pack; --download compares its bytes"
            )
        every = _bytes(registry, (found.image, *found.attached), report) if download else UNREAD
        checks: list[Check] = []
        if every.passed is not False:
            report.step("papers and header")
            try:
                attached = fetched(found.attached, registry, Path(place), report)
            except InterruptedTransferError:
                raise  # not knowing is no answer
            except TransferError as error:
                checks.append(Check("papers", False, str(error)))
            else:
                release = Release((Tagged("", (), found.image, tuple(attached)),))
                checks += _of_release(
                    release, lambda blob: open_remote(registry, blob.digest, blob.size), report
                )
    return Verified(str(target), (*checks, every))


def _of_release(
    release: Release, open_weights: Callable[[Blob], Any], report: Reporter
) -> list[Check]:
    """Return the checks of images and of the papers that came with them."""
    checks: list[Check] = []
    with TemporaryDirectory(prefix="medllm-verify-") as place:
        try:
            papers = papers_of(release)
        except MedllmError as error:
            return [Check("papers", False, str(error))]
        if papers is None:
            return [Check("papers", None, "these images came without the papers of a pack")]
        folder = Path(place)
        for name, data in papers.items():
            (folder / name).write_bytes(data)
        checks, document = papers_checks(folder, report)
        if document is not None:
            here = []
            for tagged in release.images:
                variant, found = _of_image(tagged.image, document, folder, open_weights)
                checks += found
                here += [variant] if variant else []
            checks += [variants_check(document, here), *of_papers(folder, document, here)]
    attached = [image for tagged in release.images for image in tagged.attached]
    return [*checks, publication_check(lambda: overrides_of(attached))]


def _of_image(
    image: Image, document: manifest.Document, folder: Path, open_weights: Callable[[Blob], Any]
) -> tuple[manifest.Document | None, list[Check]]:
    """Return the variant that an image holds, and its checks."""
    weights = read.weights_of(image)
    variant = next((v for v in document["variants"] if v["sha256"] == weights.digest.hex), None)
    if variant is None:
        fault = f"pack.json names no file with SHA-256 {weights.digest.hex[:12]}…"
        return None, [Check("weights", False, fault)]
    try:
        with open_weights(weights) as file:
            header = read_header(file, size=weights.size, name=variant["file"])
    except GGUFError as error:
        return variant, [Check(f"header {variant['quant']}", False, str(error))]
    checks = weights_checks(document, variant, weights.digest.hex, header)
    return variant, [*checks, _texts(image, variant, folder)]


def _texts(image: Image, variant: manifest.Document, folder: Path) -> Check:
    """Return whether the template, system text and so on are those of the variant's Modelfile."""
    name = f"texts {variant['quant']}"
    try:
        wanted = [*create.text_layers(creation_of(folder, variant))]
    except MedllmError as error:
        return Check(name, False, str(error))
    pairs = [(b.media_type, b.digest) for b in wanted]
    found = [(b.media_type, b.digest) for b in image.layers if b.media_type != create.MODEL]
    if sorted(map(str, pairs)) == sorted(map(str, found)):
        return Check(name, True, f"what Ollama asks with is what {variant['modelfile']} says")
    return Check(name, False, f"what Ollama asks with is not what {variant['modelfile']} says")


def papers_checks(folder: Path, report: Reporter) -> tuple[list[Check], manifest.Document | None]:
    """Return the checks of papers that lie in a folder without weights, and their pack.json."""
    checks: list[Check] = []
    document = attempt(checks, "pack.json", lambda: read_pack(folder))
    sums = attempt(checks, "sums", lambda: read_sums(folder))
    if document is None or sums is None:
        return checks, None
    weights = {variant["file"] for variant in document["variants"]}
    papers = {name: digest for name, digest in sums.items() if name not in weights}
    checks += [
        all_of("files", integrity.listing_faults(folder, sums, spared=weights),
               "no paper is missing"),
        all_of("digests", integrity.digest_faults(folder, papers, report=report),
               "the papers are those that SHA256SUMS names"),
        all_of("agreement", integrity.agreement_faults(document, sums),
               "pack.json and SHA256SUMS state the same digests"),
    ]  # fmt: skip
    return checks, document


def weights_checks(
    document: manifest.Document, variant: Mapping[str, Any], sha256: str | None, header: GGUFFile
) -> list[Check]:
    """Return the checks of a variant whose digest is stated and whose header was read."""
    stated = [] if sha256 == variant["sha256"] else [f"stated {sha256}, in pack.json "
                                                     f"{variant['sha256']}"]  # fmt: skip
    return [
        all_of(f"weights {variant['quant']}", stated, f"sha256:{sha256}, as pack.json has it"),
        all_of(f"header {variant['quant']}",
               integrity.header_differences(header, document, variant),
               "sizes, types, name and licence are those of pack.json"),
    ]  # fmt: skip


def _bytes(registry: Any, images: Sequence[Image], report: Reporter) -> Check:
    blobs = {blob.digest: blob.size for image in images for blob in image.blobs}
    report.step("reading every byte", total_bytes=sum(blobs.values()))
    good = f"all {len(blobs)} blobs were read, and every one has its digest"
    return all_of("bytes", _faults(registry, blobs, report), good)


def _faults(registry: Any, blobs: Mapping[Digest, int], report: Reporter) -> Iterator[str]:
    from medllm_pack.publish.download import digest_blob
    from medllm_pack.publish.trying import InterruptedTransferError

    for digest, size in blobs.items():
        try:
            found = digest_blob(registry, digest, size, report.advance)
        except InterruptedTransferError:
            raise  # not knowing is no answer
        except TransferError as error:
            yield str(error)
            continue
        if found != digest.hex:
            yield f"what the registry gives as {digest} has SHA-256 {found[:12]}…"
