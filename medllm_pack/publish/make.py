"""From a pack folder to what is published: images, tags, papers.

Decided from the pack's own files, before anything is sent. Weights are not read again where they
were digested before and have not changed since, as far as the file system tells (known.py);
otherwise their digest is taken anew, and remembered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError, shown
from medllm_pack.known import Known
from medllm_pack.ollama.create import Creation, image_of
from medllm_pack.ollama.image import Blob
from medllm_pack.ollama.names import ModelName
from medllm_pack.pack.manifest import Document, chosen, read_manifest
from medllm_pack.pack.sums import SUMS, checked_name
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish import papers
from medllm_pack.publish.release import Release, Tagged
from medllm_pack.publish.targets import checked_tag

# The variant that most people run; the last one of a pack that has none.
_DEFAULT_QUANT = "q4_k_m"


def make_release(
    folder: Path,
    *,
    quants: Sequence[str] = (),
    tag: str | None = None,
    proven: Callable[[str], bool] = lambda _: False,
    report: Reporter = SILENT,
) -> Release:
    """Return what a pack publishes.

    Tags are ``TAG-QUANT`` for each variant, and ``TAG`` for the default one; without a tag
    ``QUANT`` and ``latest``.

    Args:
        folder: the pack.
        quants: variants; all of them if empty.
        tag: first part of the tags; that of the recipe's Ollama name if None.
        proven: file name -> whether its bytes were compared with the sums just now.
        report: listener; weights that must be digested again take a while.

    Raises:
        UsageError: if the pack has no such variant, or a tag is none.
        SourceError: if a file is missing or not what the pack says.
    """
    document = read_manifest(folder)
    entries = chosen(document, quants)
    sums, found = papers.read_papers(folder, weights=[v["file"] for v in document["variants"]])
    default = default_quant([entry["quant"] for entry in entries])
    prefix = ModelName.parse(document["recipe"]["ollama"]).tag if tag is None else tag
    images = []
    for entry in entries:
        creation = _creation(entry, found)
        digest = _weights_digest(folder, entry, sums, proven, report=report)
        image = image_of(
            creation, weights=folder / entry["file"], size=entry["size"], digest=digest
        )
        tags = _tags(entry["quant"], prefix, default=entry["quant"] == default)
        images.append(Tagged(entry["quant"], tags, image, (papers.attach(image, found),)))
    return Release(tuple(images))


def default_quant(quants: Sequence[str]) -> str:
    """Return the variant that is meant when none is named."""
    return _DEFAULT_QUANT if _DEFAULT_QUANT in quants else quants[-1]


def creation_of(folder: Path, entry: Document) -> Creation:
    """Return what a variant's Modelfile asks Ollama for.

    Raises:
        SourceError: if the Modelfile is missing.
        ModelfileError: if it is not one that this package wrote.
    """
    name = checked_name(entry["modelfile"], of="pack.json")
    return _parsed(files.read_small(folder / name), name)


def _creation(entry: Document, found: Mapping[str, Blob]) -> Creation:
    name = checked_name(entry["modelfile"], of="pack.json")
    if name not in found:
        raise SourceError(f"{SUMS} does not list {shown(name)}; build the pack again")
    with found[name].open() as file:
        creation = _parsed(file.read(), name)
    if creation.file != entry["file"]:
        raise SourceError(f"{name} is FROM {shown(creation.file)}, not from {shown(entry['file'])}")
    return creation


def _parsed(data: bytes, name: str) -> Creation:
    try:
        return Creation.parse(data.decode("utf-8"), name=name)
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8; build the pack again") from error


def _weights_digest(
    folder: Path,
    entry: Document,
    sums: Mapping[str, Digest],
    proven: Callable[[str], bool],
    *,
    report: Reporter,
) -> Digest:
    """Return the digest of a variant's file; computed only where it is not known."""
    name = checked_name(entry["file"], of="pack.json")
    stated = Digest(entry["sha256"])
    if sums.get(name) != stated:
        raise SourceError(f"pack.json and {SUMS} do not agree on {name}; build again")
    try:
        status = os.stat(folder / name)
    except OSError as error:
        raise SourceError(
            f"{name} cannot be read: {error.strerror}; name the variants that are here with --quant"
        ) from error
    if status.st_size != entry["size"]:
        raise SourceError(
            f"{name} has {status.st_size} bytes, pack.json says {entry['size']}; build again"
        )
    known = Known()
    if not proven(name) and known.sha256(folder / name) != stated.hex:
        report.step(f"checking {name}", total_bytes=status.st_size)
        _digest_again(folder / name, stated, known, report=report)
    return stated


def _digest_again(path: Path, stated: Digest, known: Known, *, report: Reporter) -> None:
    try:
        found = known.digest(path, advance=report.advance)
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read: {error.strerror}") from error
    if found != stated.hex:
        raise SourceError(f"{path.name} is not what pack.json says; build the pack again")


def _tags(quant: str, prefix: str | None, *, default: bool) -> tuple[str, ...]:
    own = f"{prefix}-{quant}" if prefix else quant
    tags = (own, prefix or "latest") if default else (own,)
    return tuple(checked_tag(tag) for tag in tags)
