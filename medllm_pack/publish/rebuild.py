"""The strongest proof of origin: build the pack again from the same inputs and compare the digests.

Everything that decides the bytes stands in pack.json: recipe, inputs with their pinned revisions,
template, variants. Folders are known by their digests only, so where they are now must be said. The
second pack is built in a hidden folder beside the first and removed again.

Disk: as much as the pack itself; the plan looks first.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medllm_pack.errors import PlanError, SourceError, UsageError, shown
from medllm_pack.pack.shape import read_pack
from medllm_pack.pack.sums import read_sums
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish.verify import Check
from medllm_pack.recipe import Recipe

# What a verdict of parity, added later, changes as well; it is compared through pack.json.
_LATER = (
    "pack.json", "README.md", "provenance.json", "bom.cdx.json", "parity.json", "parity.html",
)  # fmt: skip

_ROLES = ("base", "adapter", "merged")


@dataclass(frozen=True)
class Given:
    """Where inputs are now, if not where pack.json says; ``recipe`` replaces the one in it."""

    base: str | None = None
    adapter: str | None = None
    merged: str | None = None
    imatrix: Path | None = None
    recipe: Recipe | None = None
    template: str | None = None


def rebuild(
    folder: Path,
    given: Given | None = None,
    *,
    threads: int | None = None,
    report: Reporter = SILENT,
) -> Check:
    """Build a pack again and compare.

    Args:
        folder: the pack.
        given: where inputs are now.
        threads: of the build; the bytes do not depend on it.
        report: listener.

    Raises:
        UsageError: if the place of an input, or the importance matrix, must be said and is not.
        MedllmError: if the build cannot be made.
    """
    given = given or Given()
    document = read_pack(folder)
    sources = _sources(document, given)
    if document["importance"] and given.imatrix is None:
        raise UsageError("the pack was made with an importance matrix; name it with --imatrix")
    from medllm_pack.pack.build import build
    from medllm_pack.pack.plan import Request, make_plan

    again = folder.absolute().parent / f".{folder.name}.rebuilt-{secrets.token_hex(4)}"
    request = Request(
        recipe=given.recipe or _recipe(document, given), folder=Path.cwd(), out=again,
        variants=[variant["quant"] for variant in document["variants"]],
        imatrix=given.imatrix, template=given.template or document["template"]["name"],
        base=sources.get("base"), adapter=sources.get("adapter"), merged=sources.get("merged"),
    )  # fmt: skip
    try:
        plan = make_plan(request, report=report)
        build(plan, threads=threads, report=report)
        faults = [*_differences(folder, again, document, read_pack(again))]
    except PlanError as error:
        raise PlanError("rebuild", error.problems) from error
    finally:
        shutil.rmtree(again, ignore_errors=True)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return Check("rebuild", False, f"{faults[0]}{more}")
    return Check("rebuild", True, "a rebuild from the same inputs gives the same digests")


def _sources(document: Mapping[str, Any], given: Given) -> dict[str, str]:
    """Return the source of every input of the pack, by role."""
    found = {}
    for entry in document["inputs"]:
        role = entry["role"]
        if role not in _ROLES:
            raise SourceError(f"pack.json names an input of the unknown role {shown(role)}")
        here = getattr(given, role)
        if here is None and entry["source"] == "folder":
            raise UsageError(
                f"the {role} weights of this pack lay in a folder; say where they are now with "
                f"--{role} DIR"
            )
        pinned = f"@{entry['revision']}" if entry["revision"] else ""
        found[role] = here or entry["source"] + pinned
    # Beside merged weights, the base only holds the licence's texts.
    spare = [r for r in _ROLES if getattr(given, r) and r not in found]
    if spare and (spare != ["base"] or "merged" not in found):
        raise UsageError(f"--{spare[0]} is given, but the pack was made from {', '.join(found)}")
    return found


def _recipe(document: Mapping[str, Any], given: Given) -> Recipe:
    """Return the recipe in pack.json, with the places of folders as they are now."""
    content = dict(document["recipe"])
    for role in _ROLES:
        origin = content.get(role)
        if origin and origin.get("source") == "folder":
            content[role] = origin | {"source": getattr(given, role) or str(Path.cwd())}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise SourceError(
            "the recipe in pack.json is not one that this version understands; name it with "
            "--recipe FILE"
        ) from error


def _differences(
    folder: Path, again: Path, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what the second pack has otherwise; versions of the tools explain, and come first."""
    for tool, version in before["tools"].items():
        if after["tools"].get(tool) != version:
            yield f"made with {shown(tool)} {shown(version)}, not {after['tools'].get(tool)}"
    yield from _input_differences(before, after)
    old, new = read_sums(folder), read_sums(again)
    for name in sorted((set(old) | set(new)) - set(_LATER)):
        if old.get(name) != new.get(name):
            yield f"{name}: {_short(old.get(name))} in the pack, {_short(new.get(name))} rebuilt"
    for key in ("name", "adapter", "variants", "template", "license", "deviations", "importance"):
        if before[key] != after[key]:
            yield f"{key} in pack.json is {shown(before[key])}, rebuilt {shown(after[key])}"


def _input_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    old, new = (
        {(entry["role"], file["name"]): file["sha256"]
         for entry in document["inputs"] for file in entry["files"]}
        for document in (before, after)
    )  # fmt: skip
    for role, name in sorted(set(old) | set(new)):
        if old.get((role, name)) != new.get((role, name)):
            yield f"the input {shown(name)} ({role}) is not the file that the pack was made from"


def _short(digest: str | None) -> str:
    return f"SHA-256 {digest[:12]}…" if digest else "absent"
