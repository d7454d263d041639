"""Is a repository of the Hub what its pack says? Asked with or without the weights.

The Hub states the digest of each file of weights; the header comes over by range requests, the
papers whole. The three files that the Hub hands to Ollama are compared with the Modelfiles, for no
sum of the pack covers them. Where every byte is asked for, the weights are read to their end,
digested on the way, and kept nowhere.

Memory: the small files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import GGUFError, MedllmError, SourceError
from medllm_pack.ollama import create
from medllm_pack.pack.manifest import NAME as PACK_JSON
from medllm_pack.pack.manifest import Document
from medllm_pack.pack.sums import BESIDE, SUMS, read_sums
from medllm_pack.patience import Patience
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish.hub_content import BRIDGE
from medllm_pack.publish.hub_files import HubFiles
from medllm_pack.publish.hub_look import look
from medllm_pack.publish.make import creation_of
from medllm_pack.publish.targets import HubTarget
from medllm_pack.publish.verify import (
    Check,
    Verified,
    all_of,
    of_papers,
    publication_check,
    variants_check,
)
from medllm_pack.publish.verify_published import UNREAD, papers_checks, weights_checks
from medllm_pack.weights.answers import HUB
from medllm_pack.weights.stream import OtherBytesError, Sink, Stream

_PAPERS_LIMIT: Final = 64 << 20  # bytes of all papers


def verify_hub(
    target: HubTarget,
    *,
    download: bool = False,
    report: Reporter = SILENT,
    patience: Patience | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Verified:
    """Check a repository against its papers.

    Args:
        target: the repository.
        download: read every byte of the weights; nothing of them is kept.
        report: listener.
        patience: how often and how long to try.
        cache: the Hub cache, for the small files.
        endpoint: address of the Hub, if not the usual one.

    Raises:
        SourceError: if it cannot be read, or is no pack.
    """
    hub = HubFiles(target, report, patience or HUB, cache, endpoint)
    if lacking := [name for name in (PACK_JSON, SUMS) if not hub.has(name)]:
        raise SourceError(f"{target} holds no {' and no '.join(lacking)}; nothing to compare")
    checks = [Check("commit", True, hub.commit)]
    with TemporaryDirectory(prefix="medllm-verify-") as place:
        folder = Path(place)
        _fetch_papers(hub, folder)
        found, document = papers_checks(folder, report)
        checks += found
        if document is None:
            return Verified(str(target), tuple(checks))
        checks += _weights(hub, document)
        here = [v for v in document["variants"] if hub.has(v["file"])]
        checks += [
            variants_check(document, here),
            all_of("ollama", _bridge_faults(hub, folder, here), "what the Hub hands to Ollama is "
                   "what the Modelfiles say"),
            *of_papers(folder, document, here),
        ]  # fmt: skip
        digest = Digest(files.sha256(folder / PACK_JSON))
        checks.append(publication_check(lambda: hub.overrides({PACK_JSON: digest})))
    checks.append(_bytes(hub, here, report) if download else UNREAD)
    return Verified(str(target), tuple(checks))


def _fetch_papers(hub: HubFiles, folder: Path) -> None:
    """Copy the papers that the sums name, and that are there, into a folder."""
    _copy(hub, folder, [name for name in BESIDE + (PACK_JSON,) if hub.has(name)])
    try:
        sums = read_sums(folder)
    except SourceError:
        return  # it is told as a check
    names = [n for n in sums if hub.has(n) and n != PACK_JSON and not n.endswith(".gguf")]
    if sum(hub.item(name).size for name in names) > _PAPERS_LIMIT:
        raise SourceError(f"the papers of {hub.address.name} are larger than a pack's ever are")
    _copy(hub, folder, names)


def _copy(hub: HubFiles, folder: Path, names: Sequence[str]) -> None:
    for name, path in hub.bring(names).items():
        (folder / name).write_bytes(files.read_small(path))


def _weights(hub: HubFiles, document: Document) -> Iterator[Check]:
    """Yield the checks of every GGUF file in the repository."""
    named = {variant["file"]: variant for variant in document["variants"]}
    for name in hub.names:
        if not name.lower().endswith(".gguf"):
            continue
        if name not in named:
            yield Check(name, False, f"{PACK_JSON} does not name this file")
            continue
        try:
            file = look(hub, name)
        except GGUFError as error:
            yield Check(f"header {named[name]['quant']}", False, str(error))
            continue
        yield from weights_checks(document, named[name], file.sha256, file.header)


def _bridge_faults(hub: HubFiles, folder: Path, variants: Sequence[Document]) -> Iterator[str]:
    """Yield the files for Ollama that are not what the Modelfiles of the variants say."""
    try:
        creations = [creation_of(folder, variant) for variant in variants]
    except MedllmError as error:
        yield str(error)
        return
    for media_type, name in BRIDGE.items():
        wanted = {_text(creation, media_type) for creation in creations}
        found = _content(hub, name)
        if wanted != {found}:
            yield f"{name} is {'absent' if found is None else 'not what the Modelfiles say'}"


def _text(creation: create.Creation, media_type: str) -> bytes | None:
    layers = (b for b in create.text_layers(creation) if b.media_type == media_type)
    return next((b.source for b in layers if isinstance(b.source, bytes)), None)


def _content(hub: HubFiles, name: str) -> bytes | None:
    return files.read_small(hub.bring([name])[name]) if hub.has(name) else None


def _bytes(hub: HubFiles, variants: Sequence[Mapping[str, str]], report: Reporter) -> Check:
    total = sum(hub.item(variant["file"]).size for variant in variants)
    report.step("reading every byte", total_bytes=total)
    good = f"all {len(variants)} files of weights were read, and every one has its digest"
    return all_of("bytes", _byte_faults(hub, variants, report), good)


def _byte_faults(
    hub: HubFiles, variants: Sequence[Mapping[str, str]], report: Reporter
) -> Iterator[str]:
    for variant in variants:
        item = hub.item(variant["file"])
        sink = Sink.digesting(item, report)
        try:
            Stream(item, hub.commit, hub.address, hub.patience).into(sink)
        except OtherBytesError as error:
            yield str(error)
            continue
        if sink.digest() != variant["sha256"]:
            yield f"{item.name} arrives with SHA-256 {sink.digest()[:12]}…"
