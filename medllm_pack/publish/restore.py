"""From images back to a pack folder, whatever they were fetched from.

With the papers that this package attaches, the folder is the pack again, byte for byte, and its
SHA256SUMS decides. An image that others made has no papers: its weights come with a Modelfile made
of its layers and a note of where they are from. The folder takes its name when all of it is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import MedllmError, ModelfileError, SourceError, UsageError, shown
from medllm_pack.known import Known
from medllm_pack.ollama import create
from medllm_pack.ollama.image import Blob
from medllm_pack.ollama.modelfile import Modelfile, render
from medllm_pack.ollama.placing import place
from medllm_pack.ollama.rules import PARAMETERS
from medllm_pack.pack.manifest import NAME as PACK_JSON
from medllm_pack.pack.sums import SUMS, checked_name, parse_sums, text_of
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish import read
from medllm_pack.publish.papers import is_pack, names_of
from medllm_pack.publish.release import Release, Tagged

NOTE: Final = "pulled.json"
_PAPERS_LIMIT: Final = 64 << 20  # bytes in memory at once


def restore(
    release: Release, out: Path, *, replace: bool = False, report: Reporter = SILENT
) -> Path:
    """Write the folder of a pack and return it.

    Args:
        release: images whose blobs are at hand or can be read; blobs in files are shared by link
            where possible and trusted to have their digest, all others are checked.
        out: the new folder.
        replace: whether it may replace what is there.
        report: listener.

    Raises:
        SourceError: if images and papers do not belong together, or a blob is not its digest.
        WriteError: if the folder exists or cannot be written.
    """
    papers = papers_of(release)
    weights = _weights_names(release, papers)
    with files.new_folder(out, replace=replace) as folder, files.translated(out):
        blobs = {name: read.weights_of(tagged.image) for name, tagged in weights.items()}
        report.step("unpacking", total_bytes=sum(blob.size for blob in blobs.values()))
        for name, blob in blobs.items():
            place(blob, folder / name, advance=report.advance)
        if papers is None:
            papers = _made_papers(weights, report=report)
        for name in sorted(papers, key=lambda name: name == SUMS):  # SHA256SUMS last
            place(Blob.of(papers[name], ""), folder / name)
    for name, blob in blobs.items():
        Known().made(out / name, blob.digest.hex)
    return out


def recipe_name(release: Release) -> str:
    """Return the name that a release's recipe gives it in Ollama.

    Raises:
        UsageError: if the release has no pack.json to say so.
    """
    papers = papers_of(release)
    if papers is None:
        raise UsageError("these images came without a pack's papers; say --name ns/model:tag")
    try:
        return str(json.loads(papers[PACK_JSON])["recipe"]["ollama"])
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError("the attached pack.json does not describe a pack") from error


def papers_of(release: Release) -> dict[str, bytes] | None:
    """Return the papers of all images, which must be the same; None if they have none."""
    found = [[paper for paper in tagged.attached if is_pack(paper)] for tagged in release.images]
    if not any(found):
        return None
    names = names_of(found[0][0].manifest) if found[0] else {}
    for attached in found:
        if len(attached) != 1 or names_of(attached[0].manifest) != names:
            raise SourceError("the images are of several packs; fetch one tag at a time")
    blobs = {blob.digest: blob for blob in found[0][0].layers}
    if sum(blob.size for blob in blobs.values()) > _PAPERS_LIMIT:
        raise SourceError("the attached papers are larger than a pack's ever are; do not use them")
    papers = {name: read.small(blobs[digest]) for name, digest in names.items()}
    for needed in (PACK_JSON, SUMS):
        if needed not in papers:
            raise SourceError(f"the attached papers lack {needed}; they are not a pack's")
    _check_sums(papers)
    return papers


def _check_sums(papers: Mapping[str, bytes]) -> None:
    sums = parse_sums(papers[SUMS], of=SUMS)
    for name, data in papers.items():
        if name in sums and sums[name] != Digest.of(data):
            raise SourceError(f"{name} is not what {SUMS} says; the pack was changed")


def _weights_names(release: Release, papers: Mapping[str, bytes] | None) -> dict[str, Tagged]:
    """Return file name -> image: as pack.json names it, else as Ollama's ``from`` does."""
    names: dict[str, Tagged] = {}
    for tagged in release.images:
        name = _foreign_name(tagged) if papers is None else _pack_name(tagged, papers)
        if name in names or name in (papers or ()):
            raise SourceError(f"two files would be called {name}; fetch one tag at a time")
        names[name] = tagged
    return names


def _pack_name(tagged: Tagged, papers: Mapping[str, bytes]) -> str:
    digest = read.weights_of(tagged.image).digest
    sums = parse_sums(papers[SUMS], of=SUMS)
    try:
        document: Any = json.loads(papers[PACK_JSON])
        named = [v["file"] for v in document["variants"] if v["sha256"] == digest.hex]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError("the attached pack.json does not describe a pack") from error
    if not named or sums.get(checked_name(named[0], of=PACK_JSON)) != digest:
        raise SourceError(f"pack.json or {SUMS} does not name the weights {digest}")
    return str(named[0])


def _foreign_name(tagged: Tagged) -> str:
    said = read.from_of(tagged.image)
    try:
        name = checked_name(said, of="a manifest")
    except SourceError:
        name = ""
    return name if name.endswith(".gguf") else f"model-{tagged.quant.upper()}.gguf"


def _made_papers(weights: Mapping[str, Tagged], *, report: Reporter) -> dict[str, bytes]:
    """Return Modelfiles, a note and SHA256SUMS for images that came without papers."""
    papers: dict[str, bytes] = {}
    for name, tagged in weights.items():
        try:
            papers[f"Modelfile.{tagged.quant}"] = _modelfile(name, tagged).encode()
        except MedllmError as error:
            report.notice(f"no Modelfile was written for {name}: {error}")
    note = {
        "schema": 1,
        "images": [
            {"file": name, "quant": tagged.quant, "manifest": str(tagged.image.digest)}
            for name, tagged in weights.items()
        ],
        "note": "made by others: no pack.json, licence papers or parity came with these weights",
    }
    papers[NOTE] = files.canonical_json(note).encode()
    sums = {name: Digest.of(data).hex for name, data in papers.items()}
    sums |= {name: read.weights_of(tagged.image).digest.hex for name, tagged in weights.items()}
    return papers | {SUMS: text_of(sums).encode()}


def _modelfile(name: str, tagged: Tagged) -> str:
    """Return the Modelfile that would make an image again.

    Raises:
        ModelfileError: if a text of it would not survive a Modelfile.
    """
    texts: dict[str, list[str]] = {}
    for layer in tagged.image.layers:
        if layer.media_type != create.MODEL:
            texts.setdefault(layer.media_type, []).append(_utf8(read.small(layer)))
    known = {create.TEMPLATE, create.SYSTEM, create.LICENSE, create.PARAMS}
    if unknown := sorted(set(texts) - known):
        raise ModelfileError(f"it has a layer of type {shown(unknown[0])}")
    return render(
        Modelfile(
            from_=f"./{name}",
            template="".join(texts.get(create.TEMPLATE, ["{{ .Prompt }}"])[:1]),
            system="".join(texts.get(create.SYSTEM, [])[:1]),
            parameters=_parameters("".join(texts.get(create.PARAMS, ["{}"])[:1])),
            license=texts.get(create.LICENSE, ()),
        ),
        file=f"Modelfile.{tagged.quant}",
    )


def _parameters(text: str) -> dict[str, Any]:
    try:
        values = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelfileError("its parameters are not a JSON object") from error
    # Go's JSON has one kind of number; a whole one is written without a point.
    whole = {name for name, value in values.items() if PARAMETERS.get(name) is int}
    return {name: _whole(value) if name in whole else value for name, value in values.items()}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelfileError("a text of it is not UTF-8") from error
