"""Merged: a checkpoint whose rows already hold an adapter, and whether the two fit.

Whoever reads from :class:`Merged` cannot tell that a merge is going on: it has the methods of
:class:`~medllm_pack.weights.checkpoint.Checkpoint`. The sums are merging.py's. Knows nothing of
GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import numpy as np

from medllm_pack.errors import AdapterError, shown
from medllm_pack.weights.adapter_config import CONFIG, REMEDY, AdapterConfig
from medllm_pack.weights.checkpoint import Checkpoint
from medllm_pack.weights.header import TensorSpec
from medllm_pack.weights.lora import WEIGHTS, Adapter, kind_of
from medllm_pack.weights.safetensors import Rows, Values

# What to do with a pair for a head that is the embedding: added to it, it would change both.
TIED: Final = (
    "the adapter trains lm_head, which in this base is the embedding (tied); untie the base first: "
    "store the embedding a second time as lm_head.weight and set tie_word_embeddings to false"
)


class Merged:
    """A checkpoint whose rows already hold the adapter.

    Raises:
        AdapterError: if a pair does not fit the base; every adapter tensor is consumed once.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        for problem in mismatches(base, adapter):
            raise AdapterError(problem)
        self.base = base
        self.adapter = adapter
        self.tensors = base.tensors
        # Blocks of one tensor follow each other; several threads may be between two tensors.
        self._matrices = lru_cache(maxsize=4)(adapter.matrices)

    def read(self, name: str, start: int, stop: int) -> Rows:
        """Read rows of the base; the adapter joins in :meth:`values`."""
        return self.base.read(name, start, stop)

    def values(self, rows: Rows) -> Values:
        """Return the values of rows: exact where the adapter is silent, else float64."""
        pair = self.adapter.pairs.get(rows.spec.name)
        if pair is None:
            return self.base.values(rows)
        from medllm_pack.weights.merging import add_low_rank  # numba, which takes half a second

        if pair.copy is not None:
            self._compare(rows, pair.copy)
        a, b = self._matrices(pair)
        return add_low_rank(rows.values(), a, b[rows.start : rows.stop], pair.scale)

    def bypass_page_cache(self) -> None:
        """Read the base straight from the disk from now on."""
        self.base.bypass_page_cache()

    def digests(self) -> dict[str, tuple[int, str]]:
        """Return size and SHA-256 of every file of base and adapter, by name."""
        self.adapter.file.digest()  # raises if the file changed meanwhile
        return self.base.digests() | {WEIGHTS: (self.adapter.file.size, self.adapter.sha256)}

    def _compare(self, rows: Rows, copy: TensorSpec) -> None:
        """Refuse a weight in the adapter's file that is not the base's, in whatever type."""
        stored = self.adapter.file.read(copy, rows.start, rows.stop)
        if not np.array_equal(stored.values(), rows.values()):
            raise AdapterError(
                f"adapter tensor {shown(copy.name)} is not the base's {rows.spec.name}: it was "
                f"trained, or rounded to {copy.dtype}, or the base is another; {REMEDY}"
            )

    def close(self) -> None:
        """Close base and adapter."""
        self.base.close()
        self.adapter.close()


def mismatches(base: Checkpoint, adapter: Adapter) -> Iterator[str]:
    """Yield every way in which an adapter does not fit a base, as full sentences."""
    layers = 1 + max((_layer(name) or 0 for name in base.tensors), default=0)
    trained_on = (
        f"; it says it was trained on {adapter.config.base!r}" if adapter.config.base else ""
    )
    for pair in adapter.pairs.values():
        spec = base.tensors.get(pair.weight)
        if spec is None and pair.module == "lm_head":
            yield TIED
        elif spec is None:
            yield (
                f"adapter module {shown(pair.module)} is not in the base model "
                f"({layers} layers){trained_on}"
            )
        elif len(spec.shape) != 2 or "embed_tokens" in pair.module:
            yield f"adapter module {shown(pair.module)} is not a linear layer; {REMEDY}"
        elif spec.shape != (pair.b.shape[0], pair.a.shape[1]):
            yield (
                f"adapter module {shown(pair.module)} changes a weight of shape "
                f"({pair.b.shape[0]}, {pair.a.shape[1]}), the base has {spec.shape}{trained_on}"
            )
        elif pair.copy is not None and pair.copy.shape != spec.shape:
            yield (
                f"adapter tensor {shown(pair.copy.name)} has the shape {pair.copy.shape}, the "
                f"base's {pair.weight} {spec.shape}; {REMEDY}"
            )
        elif key := _leaves_out(adapter.config, pair.module):
            yield (
                f"adapter module {shown(pair.module)} is in {WEIGHTS}, but {key} in {CONFIG} "
                "leaves it out, and PEFT would pass over it; the two files do not belong together"
            )
    yield from _holes(base, adapter)


def _holes(base: Checkpoint, adapter: Adapter) -> Iterator[str]:
    """Yield the modules that a target of the adapter should have changed and did not."""
    config, kinds = adapter.config, adapter.kinds
    for target in config.targets:
        if kind_of(target) not in kinds:
            yield f"{CONFIG} names the target {shown(target)}, {WEIGHTS} has nothing for it"
    for name in () if config.selective else base.tensors:
        layer, module = _layer(name), name.removesuffix(".weight")
        if layer is None or (config.layers is not None and layer not in config.layers):
            continue
        left_out = name not in adapter.pairs and not _is(module, config.excluded)
        if left_out and kind_of(module) in kinds:
            yield (
                f"the adapter has no tensors for {shown(module)}, though it trains its siblings; "
                "get the whole adapter again"
            )


def _leaves_out(config: AdapterConfig, module: str) -> str | None:
    """Return the key of a configuration by which PEFT puts no pair on a module.

    As PEFT's check_target_module_exists; patterns are not run.
    """
    if not _is(module, config.targets):
        return "target_modules"
    if _is(module, config.excluded):
        return "exclude_modules"
    whole = module in config.targets or config.layers is None
    return None if whole or _layer(f"{module}.") in (config.layers or ()) else "layers_to_transform"


def _is(module: str, names: tuple[str, ...]) -> bool:
    # PEFT's rule: the whole name, or a dotted suffix of it.
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer(name: str) -> int | None:
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None
