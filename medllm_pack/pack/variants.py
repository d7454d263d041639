"""The GGUF files of a pack: which mixes were asked for, and where each tensor will lie.

Each file's header and every offset are known here, before a weight is read. Knows nothing of
sources, licences or disks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medllm_pack.errors import ImportanceError, UsageError
from medllm_pack.gguf import llama
from medllm_pack.gguf.layout import Entry, Layout, lay_out
from medllm_pack.limits import unknown_variants
from medllm_pack.quant.importance import Importance
from medllm_pack.quant.mixes import Mix, ModelShape, choose_type, load_mix, requires_importance
from medllm_pack.recipe import Recipe


@dataclass(frozen=True)
class PlannedFile:
    """One variant: its mix, its file name and its layout."""

    mix: Mix
    file: str
    layout: Layout

    @property
    def quant(self) -> str:
        """The variant as users write it, such as ``q4_k_m``."""
        quant: str = self.mix.name.lower()
        return quant

    @property
    def modelfile(self) -> str:
        """Name of the Modelfile that goes with it."""
        return f"Modelfile.{self.quant}"


def load_mixes(names: Sequence[str]) -> list[Mix]:
    """Return the mixes of the names.

    Raises:
        UsageError: if there is no such mix, or one is named twice.
    """
    mixes = [load_mix(name.strip()) for name in names]
    labels = [mix.name for mix in mixes]
    if double := next((label for label in labels if labels.count(label) > 1), None):
        raise UsageError(f"--quant names {double} twice")
    return mixes


def unknown_limits(recipe: Recipe, mixes: Sequence[Mix]) -> list[str]:
    """Return what is wrong with the recipe's limits: a variant that nobody knows has none."""
    if recipe.parity is None:
        return []
    own = [*mixes, *(load_mix(name.strip()) for name in recipe.variants)]
    return unknown_variants(recipe.parity, [mix.name.lower() for mix in own])


def plan_files(
    name: str,
    mixes: Sequence[Mix],
    config: llama.LlamaConfig,
    *,
    entries: Sequence[Entry],
    importance: Importance | None,
) -> tuple[PlannedFile, ...]:
    """Plan one file a mix.

    Args:
        name: name of the model, with which the names of the files begin.
        mixes: which tensor gets which type.
        config: the model.
        entries: metadata of every file.
        importance: importance matrix.

    Raises:
        ImportanceError: if a tensor needs a matrix that is not there, or it is another model's.
    """
    return tuple(
        PlannedFile(
            mix,
            f"{name}-{mix.name}.gguf",
            lay_out(entries, _typed(mix, config, importance), file_type=mix.file_type),
        )
        for mix in mixes
    )


def _typed(
    mix: Mix, config: llama.LlamaConfig, importance: Importance | None
) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and type of every tensor."""
    model = ModelShape(config.n_layer, config.n_head, config.n_head_kv, config.tied)
    typed = []
    for tensor in llama.tensors(config):
        kind = choose_type(
            mix, tensor=tensor.name, shape=tensor.shape, model=model,
            importance=importance is not None,
        )  # fmt: skip
        _check_importance(mix, tensor, kind, importance)
        typed.append((tensor.name, tensor.shape, kind))
    return typed


def _check_importance(
    mix: Mix, tensor: llama.Tensor, kind: str, importance: Importance | None
) -> None:
    weights = importance.weights.get(tensor.name) if importance else None
    if weights is None and requires_importance(mix, tensor=tensor.name, kind=kind):
        raise ImportanceError(
            f"{mix.name} needs an importance matrix with weights for {tensor.name}; make one "
            "with llama.cpp's llama-imatrix and name it with --imatrix"
        )
    if weights is not None and weights.size != tensor.shape[-1]:
        raise ImportanceError(
            f"the importance matrix has {weights.size} weights for {tensor.name}, which has "
            f"{tensor.shape[-1]} columns; it belongs to another model"
        )
