"""The papers of a pack: everything in it but the weights, and the sums over all of it.

The licence's papers come from the plan, since their texts do. Every other paper is derived from the
content of pack.json alone, so that who changes that content makes them again in the same step:
``build`` writes them into a new folder, ``update`` replaces them in a pack that exists. Either way
SHA256SUMS comes last.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from medllm_pack import files
from medllm_pack.errors import SourceError
from medllm_pack.pack import bom, card, manifest, provenance
from medllm_pack.pack.manifest import Document
from medllm_pack.pack.plan import Plan
from medllm_pack.pack.sums import SIGNATURE, SUMS, read_sums, text_of


def derived(document: Document) -> dict[str, str]:
    """Return file name -> text of every paper that the content of pack.json decides.

    Raises:
        SourceError: if the document is not one that this version understands.
    """
    if not document.get("variants", True):
        raise SourceError(f"{manifest.NAME} names no variant; build the pack again")
    try:
        return {
            manifest.NAME: files.canonical_json(document),
            card.NAME: card.card(document),
            provenance.NAME: files.canonical_json(provenance.provenance(document)),
            bom.NAME: files.canonical_json(bom.bom(document)),
        }
    except KeyError as error:
        raise SourceError(f"{manifest.NAME} lacks {error}; build the pack again") from error


def write(plan: Plan, folder: Path, document: Document, digests: Mapping[str, str]) -> None:
    """Write everything of a new pack but the weights; SHA256SUMS last.

    Args:
        plan: the plan that was carried out.
        folder: the pack, not yet visible.
        document: the content of pack.json.
        digests: SHA-256 of the files that are there already.
    """
    texts = {file.modelfile: plan.modelfile(file) for file in plan.files}
    texts |= _of_the_license(plan) | derived(document)
    for name, text in texts.items():
        files.write_text(folder / name, text)
    sums = {name: files.sha256(folder / name) for name in texts}
    files.write_text(folder / SUMS, text_of(sums | dict(digests)))


def update(folder: Path, document: Document, more: Mapping[str, str]) -> None:
    """Replace pack.json, what derives from it, and other papers of a pack that exists.

    Each file is replaced in one step, SHA256SUMS last: a run that is killed in between leaves sums
    that do not fit, which ``sha256sum -c`` says and the next run repairs. A signature is removed
    first: it would not hold for the new papers.

    Args:
        folder: the pack.
        document: the new content of pack.json.
        more: file name -> text of papers that do not derive from it.

    Raises:
        SourceError: if the document or SHA256SUMS cannot be understood; nothing is changed then.
        WriteError: if the disk says no.
    """
    texts = dict(more) | derived(document)
    sums = read_sums(folder)
    with files.translated(folder / SIGNATURE, elsewhere="another place"):
        (folder / SIGNATURE).unlink(missing_ok=True)
    for name, text in texts.items():
        _replace(folder / name, text)
    sums |= {name: files.sha256(folder / name) for name in texts}
    _replace(folder / SUMS, text_of(sums))


def _of_the_license(plan: Plan) -> dict[str, str]:
    texts = {duty.file: duty.text for duty in plan.duties if duty.text is not None}
    if plan.recipe.license.notice:
        texts["NOTICE"] = plan.recipe.license.notice + "\n"
    return texts


def _replace(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    with files.translated(path, elsewhere="another place"):
        try:
            files.write_text(partial, content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        files.sync_folder(path.parent)
