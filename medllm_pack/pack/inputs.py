"""What a build reads: base or merged weights, an adapter, and the texts of the licence.

Decides from the recipe and the user's options which sources count, and brings local copies of
them. Knows nothing of what is inside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medllm_pack.errors import MedllmError, UsageError
from medllm_pack.progress import Reporter
from medllm_pack.recipe import Origin, Recipe
from medllm_pack.weights.checkpoint import Checkpoint
from medllm_pack.weights.hub import fetch
from medllm_pack.weights.lora import Adapter
from medllm_pack.weights.merged import Merged
from medllm_pack.weights.needed import Role
from medllm_pack.weights.sources import LocalCopy, parse_source


@dataclass(frozen=True)
class Sources:
    """Which sources count; ``adapter`` is None where merged weights are packed."""

    model: str
    role: Literal["base", "merged"]
    adapter: str | None
    license: str | None


@dataclass(frozen=True)
class Inputs:
    """Local copies of what a build reads.

    Attributes:
        model: base weights, or merged ones.
        role: which of the two.
        adapter: the adapter, if one is merged.
        license: the base repository where only its licence texts are needed.
        notices: decisions that the user should know.
    """

    model: LocalCopy
    role: Literal["base", "merged"]
    adapter: LocalCopy | None
    license: LocalCopy | None
    notices: tuple[str, ...]

    @property
    def model_paths(self) -> Mapping[str, Path]:
        """Files of the model by name."""
        return paths(self.model)

    @property
    def has_weights(self) -> bool:
        """Whether all weights are here; not so after planning from the Hub."""
        return not self.model.remote and not (self.adapter and self.adapter.remote)

    def open(self) -> Checkpoint | Merged:
        """Open the weights, with the adapter merged in where there is one.

        Raises:
            CheckpointError: if the weights are damaged.
            AdapterError: if the adapter does not fit them.
        """
        base = Checkpoint.open(self.model_paths)
        if self.adapter is None:
            return base
        try:
            return Merged(base, Adapter.open(paths(self.adapter)))
        except BaseException:
            base.close()
            raise


def paths(copy: LocalCopy) -> dict[str, Path]:
    """Return the files of a local copy by name."""
    return {name: file.path for name, file in copy.files.items()}


def choose(recipe: Recipe, *, base: str | None, adapter: str | None, merged: str | None) -> Sources:
    """Decide which sources count: the user's before the recipe's, an adapter before merged weights.

    Raises:
        UsageError: if the options contradict each other or something is missing.
    """
    if merged and (base or adapter):
        raise UsageError(
            "--merged packs finished weights; it cannot be joined by --base or --adapter"
        )
    lora = None if merged else adapter or _source(recipe.adapter)
    if lora is None and base:
        raise UsageError("--base alone says nothing; add --adapter DIR, or use --merged for "
                         "weights that are already fine-tuned")  # fmt: skip
    if lora is not None:
        model = base or _source(recipe.base)
        if model is None:
            raise UsageError(
                f"{recipe.name}: the recipe names no base model to merge into; add --base SRC, "
                "the 16-bit model that the adapter was trained on (adapter_config.json names it)"
            )
        return Sources(model, "base", lora, None)
    model = merged or _source(recipe.merged)
    if model is None:
        raise UsageError(f"{recipe.name}: nothing to pack; add --adapter SRC or --merged SRC")
    return Sources(model, "merged", None, _source(recipe.base))


def gather(
    recipe: Recipe, sources: Sources, *, folder: Path, report: Reporter, weights: bool
) -> Inputs:
    """Bring local copies of the sources.

    Args:
        recipe: the recipe, for the names of its licence texts.
        sources: which sources count.
        folder: where relative paths of the recipe start.
        report: listener; downloads are its steps.
        weights: whether weight files on the Hub are fetched too.

    Raises:
        SourceError: if a source cannot be read.
        UsageError: if a source is written in no known form.
    """
    notices: list[str] = []

    def bring(source: str, role: Role) -> LocalCopy:
        parsed = parse_source(source, relative_to=folder)
        return fetch(parsed, role=role, report=report, weights=weights)

    model = bring(sources.model, sources.role)
    adapter = bring(sources.adapter, "adapter") if sources.adapter else None
    if sources.role == "merged":
        where = f" of {model.source}" if model.kind == "hub" else ""
        notices.append(f"packing finished weights{where}; --adapter would merge your own")
    license_copy = None
    if sources.license and not _has_texts(recipe, model):
        try:
            license_copy = bring(sources.license, "license")
        except MedllmError as error:
            notices.append(f"the licence texts of {sources.license} could not be fetched: {error}")
    return Inputs(model, sources.role, adapter, license_copy, tuple(notices))


def find_text(copy: LocalCopy, names: list[str]) -> Path | None:
    """Return the first file of a copy that has one of the names, in any case."""
    by_name = {name.lower(): file.path for name, file in copy.files.items()}
    return next((by_name[name.lower()] for name in names if name.lower() in by_name), None)


def _has_texts(recipe: Recipe, copy: LocalCopy) -> bool:
    return all(find_text(copy, names) for names in recipe.license.texts.values())


def _source(origin: Origin | None) -> str | None:
    return origin.source if origin else None
