"""A PEFT LoRA adapter on disk: its configuration and its low-rank pairs.

Every tensor of its file belongs to exactly one pair, or it is refused. Knows nothing of the base
that it changes, nor of the arithmetic.

Memory: A and B of the tensor at hand, in float64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from medllm_pack.errors import AdapterError, CheckpointError, shown
from medllm_pack.files import read_small
from medllm_pack.weights.adapter_config import CONFIG, REMEDY, AdapterConfig, parse_config
from medllm_pack.weights.documents import strict_json
from medllm_pack.weights.header import TensorSpec
from medllm_pack.weights.safetensors import TensorFile

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>[\w.]+)\.(?P<part>lora_A|lora_B|base_layer)(?:\.default)?\.weight\Z"
)
_SIDE = re.compile(r"\.lora_[AB](\.|\Z)")


@dataclass(frozen=True, slots=True)
class Pair:
    """The low-rank pair of one module: W becomes W + scale · (B·A).

    Attributes:
        module: module name in the base, such as ``model.layers.0.self_attn.q_proj``.
        a: spec of A, shape (r, in).
        b: spec of B, shape (out, r).
        copy: spec of the weight without the pair, which PEFT stores where the head is a target;
            it must be the base's.
    """

    module: str
    a: TensorSpec
    b: TensorSpec
    scale: float
    copy: TensorSpec | None = None

    @property
    def weight(self) -> str:
        """Name of the base tensor that the pair changes."""
        return f"{self.module}.weight"


class Adapter:
    """A LoRA adapter on disk: its configuration and its pairs by base tensor name."""

    def __init__(self, config: AdapterConfig, file: TensorFile) -> None:
        self.file = file
        # Hashed now: later its tensors are read by several threads, in any order.
        self.sha256 = file.digest()
        self.pairs: Mapping[str, Pair] = MappingProxyType(_pair_up(config, file))
        if not any(map(self._adds, self.pairs.values())):
            raise AdapterError(
                f"every pair in {WEIGHTS} is zero, as before training: the result would be the "
                "base. Save the adapter again from the trained model"
            )
        targets = config.targets or tuple(sorted(self.kinds))
        self.config = replace(config, targets=targets)

    @classmethod
    def open(cls, paths: Mapping[str, Path]) -> Adapter:
        """Open an adapter from its files by name.

        Raises:
            AdapterError: if it is not a plain LoRA adapter, or a file is missing or damaged.
        """
        for name in (CONFIG, WEIGHTS):
            if name not in paths:
                raise AdapterError(f"the adapter has no {name}; PEFT's save_pretrained writes it")
        try:
            document = strict_json(read_small(paths[CONFIG]), what=CONFIG)
            file = TensorFile(paths[WEIGHTS], name=WEIGHTS)
        except CheckpointError as error:
            raise AdapterError(f"adapter: {error}") from error
        try:
            return cls(parse_config(document), file)
        except BaseException:
            file.close()
            raise

    @property
    def kinds(self) -> set[str]:
        """Last names of the modules it changes, such as ``q_proj``."""
        return {kind_of(pair.module) for pair in self.pairs.values()}

    @property
    def n_tensors(self) -> int:
        """Tensors in the adapter's file; every one belongs to exactly one pair."""
        return len(self.file.tensors)

    def matrices(self, pair: Pair) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return A, shape (r, in), and B, shape (out, r), in float64.

        Raises:
            AdapterError: if a value is NaN or infinite.
        """
        a, b = (self._matrix(spec) for spec in (pair.a, pair.b))
        return a, b

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _adds(self, pair: Pair) -> bool:
        return all(self.file.read(s, 0, s.rows).values().any() for s in (pair.a, pair.b))

    def _matrix(self, spec: TensorSpec) -> NDArray[np.float64]:
        values = self.file.read(spec, 0, spec.rows).values().astype(np.float64)
        if not np.isfinite(values).all():
            raise AdapterError(f"adapter tensor {shown(spec.name)} holds NaN or infinity")
        return values


def kind_of(module: str) -> str:
    """Return the last name of a module, such as ``q_proj``."""
    return module.rsplit(".", 1)[-1]


def _pair_up(config: AdapterConfig, file: TensorFile) -> dict[str, Pair]:
    parts: dict[str, dict[str, TensorSpec]] = {}
    for spec in file.tensors:
        match = _PART.match(spec.name.removeprefix(_PREFIX))
        if match is None or not spec.name.startswith(_PREFIX) or len(spec.shape) != 2:
            raise AdapterError(f"adapter tensor {shown(spec.name)} {_what_else(spec)}")
        if match["part"] in parts.setdefault(match["module"], {}):
            raise AdapterError(f"adapter tensor {shown(spec.name)} is there twice")
        parts[match["module"]][match["part"]] = spec
    return {
        f"{module}.weight": _make_pair(config, module, pair)
        for module, pair in sorted(parts.items())
    }


def _make_pair(config: AdapterConfig, module: str, pair: Mapping[str, TensorSpec]) -> Pair:
    copy = pair.get("base_layer")
    if copy is not None and len(pair) == 1:
        raise AdapterError(f"adapter tensor {shown(copy.name)} {_what_else(copy)}")
    for part in ("lora_A", "lora_B"):
        if part not in pair:
            raise AdapterError(f"adapter module {shown(module)} has no {part}")
    a, b = pair["lora_A"], pair["lora_B"]
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"adapter module {shown(module)}: A has rank {a.shape[0]}, B has rank {b.shape[1]}"
        )
    return Pair(module, a, b, config.scale(module, rank=a.shape[0]), copy)


def _what_else(spec: TensorSpec) -> str:
    """Say what a tensor is that belongs to no low-rank pair, and the way around."""
    if _SIDE.search(spec.name):
        # PEFT passes over names that it does not know: its merge would be the base.
        return (
            f"is not what PEFT stores ({_PREFIX}MODULE.lora_A.weight, of two sizes), and PEFT "
            "would not load it; save it again with save_pretrained, a sharded model gathered"
        )
    if ".lora_" in spec.name:
        return f"is not the A or B of a linear layer; {REMEDY}"
    if spec.name.endswith((".bias", ".bias.default")):
        return f"is a trained bias, and biases are not packed; {REMEDY}"
    # PEFT saves embeddings whole when they are targets, or when the vocabulary grew.
    return f"is a whole weight that replaces the base's: a trained or resized one; {REMEDY}"
