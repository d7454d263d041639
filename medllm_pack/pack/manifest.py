"""pack.json: what a pack was made of and what is in it, by digest.

Canonical: sorted keys, UTF-8, one trailing newline; no time, host, user or absolute path. The same
inputs, recipe and tools give the same bytes. A pack is trusted by this file, not by its existence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from pydantic import ValidationError

import medllm_pack
from medllm_pack import files
from medllm_pack.errors import SourceError, UsageError, shown
from medllm_pack.gguf.added import FAST
from medllm_pack.pack.claims import CHAT
from medllm_pack.pack.plan import Plan
from medllm_pack.pack.variants import PlannedFile
from medllm_pack.quant import ggml
from medllm_pack.recipe import Recipe
from medllm_pack.tables import problems_of
from medllm_pack.weights.adapter_config import CONFIG as ADAPTER_CONFIG
from medllm_pack.weights.checkpoint import INDEX
from medllm_pack.weights.sources import LocalCopy, LocalFile, parse_source

SCHEMA = 1
NAME = "pack.json"

Document = dict[str, Any]
Digests = Mapping[str, tuple[int, str]]

# Small files that decide what comes out; weights are digested while they are read.
_USED = ("config.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json", FAST,
         CHAT, INDEX, ADAPTER_CONFIG)  # fmt: skip


def describe(plan: Plan, *, inputs: Digests, digests: Digests) -> Document:
    """Return the content of pack.json.

    Args:
        plan: the plan that was carried out.
        inputs: size and SHA-256 of every weight file that was read, as they were read.
        digests: size and SHA-256 of every GGUF file that was written.
    """
    return {
        "schema": SCHEMA,
        "name": plan.name,
        "recipe": _portable(plan.recipe),
        "inputs": _inputs(plan, inputs),
        "adapter": _adapter(plan),
        "deviations": list(plan.deviations),
        "notices": list(plan.notices),
        "tools": tools(),
        "importance": plan.importance and {"sha256": plan.importance.sha256},
        "variants": [_variant(file, digests[file.file]) for file in plan.files],
        "template": {"name": plan.style.name, "sha256": plan.style.template_sha256},
        "license": {
            "id": plan.recipe.license.id,
            "name": plan.recipe.license.name,
            "files": [duty.file for duty in plan.duties if duty.text is not None],
            "missing": list(plan.open_duties),
            "remark": plan.recipe.license.remark,
        },
        "parity": None,
    }


def tools() -> dict[str, str]:
    """Return the versions of what decides the bytes."""
    return {
        "medllm-pack": medllm_pack.__version__,
        "llama-cpp-python": ggml.package_version(),
        "gguf-version": str(gguf.GGUF_VERSION),
        "quantization-version": str(gguf.GGML_QUANT_VERSION),
    }


def read_manifest(folder: Path) -> Document:
    """Return the content of a pack's pack.json.

    Raises:
        SourceError: if there is none, or it is of another schema.
    """
    if not (folder / NAME).exists():
        raise SourceError(
            f"{shown(folder)} is no pack: it holds no {NAME}, which `medllm-pack build` writes"
        )
    try:
        document = json.loads(files.read_small(folder / NAME))
    except ValueError as error:
        raise SourceError(f"{NAME} in {shown(folder)} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise SourceError(f"{NAME} in {shown(folder)} is not of schema {SCHEMA}")
    return document


def chosen(document: Document, quants: Sequence[str]) -> tuple[Document, ...]:
    """Return the entries of the variants that are named, in the pack's order; all if none is.

    Raises:
        UsageError: naming a variant that the pack does not have.
    """
    known = {variant["quant"]: variant for variant in document["variants"]}
    wanted = {quant.strip().lower() for quant in quants} or set(known)
    if unknown := sorted(wanted - set(known)):
        raise UsageError(
            f"the pack has no variant {shown(unknown[0])}; it has {', '.join(sorted(known))}"
        )
    return tuple(variant for quant, variant in known.items() if quant in wanted)


def here(folder: Path, document: Document) -> tuple[Document, ...]:
    """Return the entries of the variants whose weights are in a folder: a pack may be a part."""
    return tuple(v for v in document["variants"] if os.path.lexists(folder / v["file"]))


def recipe_of(document: Document) -> Recipe:
    """Return the recipe that a pack was built with; a folder of weights is called ``folder``.

    Raises:
        SourceError: if this version does not understand it.
    """
    try:
        return Recipe.model_validate(document.get("recipe"))
    except ValidationError as error:
        problem = problems_of(error, Recipe)[0]
        raise SourceError(f"the recipe in {NAME} is not one of this version: {problem}") from error


def _portable(recipe: Recipe) -> Document:
    """Return a recipe without the places of this machine: a folder is known by its digests."""
    document = recipe.model_dump(mode="json")
    for role in ("base", "adapter", "merged"):
        origin = document[role]
        if origin is not None and parse_source(origin["source"]).kind == "folder":
            origin["source"] = "folder"
    return document


def _inputs(plan: Plan, weights: Digests) -> list[Document]:
    entries = [_input(plan.inputs.role, plan.inputs.model, weights)]
    if plan.inputs.adapter is not None:
        entries.append(_input("adapter", plan.inputs.adapter, weights))
    return entries


def _input(role: str, copy: LocalCopy, weights: Digests) -> Document:
    described = [
        {"name": name, "size": size, "sha256": digest}
        for name, (size, digest) in weights.items()
        if name in copy.files
    ]
    described += [_small(copy.files[name]) for name in _USED if name in copy.files]
    return {
        "role": role,
        # Where a folder lay says nothing about what is in it: its files' digests do.
        "source": "folder" if copy.kind == "folder" else copy.source,
        "revision": copy.revision,
        "files": sorted(described, key=lambda item: str(item["name"])),
    }


def _small(file: LocalFile) -> Document:
    """Describe a file that the plan has read, minutes ago: the bytes must be the same still."""
    try:
        digest, now = files.sha256(file.path), file.path.stat()
    except OSError as error:
        raise SourceError(f"{shown(file.name)} cannot be read again: {error.strerror}") from error
    if (now.st_size, now.st_mtime_ns) != (file.size, file.modified_ns):
        raise SourceError(f"{shown(file.name)} changed while the pack was made; build again")
    return {"name": file.name, "size": file.size, "sha256": digest}


def _adapter(plan: Plan) -> Document | None:
    config = plan.adapter
    if config is None:
        return None
    return {
        "r": config.r,
        "alpha": config.alpha,
        "scale": config.scale("", rank=config.r) if not config.rank_pattern else None,
        "rslora": config.rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "targets": list(config.targets),
        "tensors": plan.adapter_tensors,
    }


def _variant(file: PlannedFile, digest: tuple[int, str]) -> Document:
    layout = file.layout
    return {
        "quant": file.quant,
        "file": file.file,
        "size": digest[0],
        "sha256": digest[1],
        "parameters": layout.parameters,
        "bits_per_weight": round(layout.bits_per_weight, 4),
        "types": layout.types,
        "modelfile": file.modelfile,
    }
