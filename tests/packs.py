"""Packs to install and to publish: the tiny model under a clinical style and a name with a tag."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.progress import Silent
from medllm_pack.recipe import load_recipe, recipe_path


def build_pack(
    out: Path,
    *,
    quants: Sequence[str] = ("f16", "q4_k_m"),
    template: str = "nota-clinica",
    ollama: str = "clinica:7b",
) -> Path:
    """Build a pack of some MB whose Modelfiles have system text, stops and licence."""
    path = recipe_path("tiny")
    recipe = load_recipe(path).model_copy(update={"template": template, "ollama": ollama})
    request = Request(recipe=recipe, folder=path.parent, out=out, variants=tuple(quants))
    return build(make_plan(request, report=Silent())).folder
