"""PEFT LoRA adapters, and Merged: a checkpoint whose rows already hold the adapter.

Whoever reads from :class:`Merged` cannot tell that a merge is going on: it has the methods of
:class:`~medllm_pack.weights.safetensors.Checkpoint`. Knows nothing of GGUF.

A LoRA file can hold more than plain low-rank pairs. What changes the result in a way we do not
reproduce is refused by name; nothing is skipped in silence.

Memory: A and B of the tensor at hand, in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medllm_pack.errors import AdapterError, CheckpointError, shown
from medllm_pack.files import read_small
from medllm_pack.weights.safetensors import (
    Checkpoint,
    Rows,
    TensorFile,
    TensorSpec,
    Values,
    strict_json,
)

_T = TypeVar("_T")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_MAX_RANK = 256
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<module>[\w.]+)\.lora_(?P<side>[AB])(?:\.default)?\.weight\Z")

# Keys of adapter_config.json that do not change what the merged weights are.
_HARMLESS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
        "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
        "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
        "runtime_config", "target_modules", "task_type", "use_rslora",
        "bias",  # models that are packed have none; one in the file is refused as a tensor
    }
)  # fmt: skip
# Initialisations that also rewrite the base weights, so that W + BA is not the trained model.
_HARMLESS_INIT = frozenset({"gaussian", "default", "eva", "orthogonal", True, False, None})
_NAMED_REFUSALS = {
    "use_dora": "it is a DoRA adapter (it also rescales every column)",
    "modules_to_save": "it replaces whole modules (modules_to_save)",
    "trainable_token_indices": "it trains single tokens of the embedding",
    "lora_bias": "its low-rank pairs have biases (lora_bias)",
    "layer_replication": "it replicates layers of the base",
    "target_parameters": "it targets raw parameters (target_parameters)",
    "use_qalora": "it is a QALoRA adapter",
    "alora_invocation_tokens": "it is an activated LoRA, which works only unmerged",
    "loftq_config": "it was made for a LoftQ-quantized base",
    "corda_config": "it was initialised by CorDA, which rewrites the base",
    "arrow_config": "it routes between several adapters (Arrow)",
    "megatron_config": "it was made for Megatron's parallel layers",
}
_REMEDY = (
    "merge it with PEFT (merge_and_unload, save_pretrained), put the base's tokenizer.model beside "
    "the result, and build with --merged"
)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says, checked.

    Attributes:
        r: default rank.
        alpha: default numerator of the scale.
        rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
        targets: the module names it was trained on, as written; empty if a pattern was given,
            until :class:`Adapter` fills in the kinds of modules that its file holds.
        excluded: module names that were left out on purpose.
        selective: whether single modules were chosen, by full names or a pattern, so that some
            of a kind may be missing.
        layers: the layers it was restricted to; None for all.
        base: the model it says it was trained on.
    """

    r: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    targets: tuple[str, ...]
    excluded: tuple[str, ...]
    selective: bool
    layers: tuple[int, ...] | None
    base: str | None

    def scale(self, module: str, *, rank: int) -> float:
        """Return the factor of B·A for a module, after checking its rank.

        Raises:
            AdapterError: if the tensors have another rank than the configuration says.
        """
        expected = _by_pattern(self.rank_pattern, module, self.r)
        if rank != expected:
            raise AdapterError(
                f"adapter module {shown(module)} has rank {rank}, its configuration says "
                f"{expected}; the two files do not belong together"
            )
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True, slots=True)
class Pair:
    """The low-rank pair of one module: W becomes W + scale · (B·A).

    Attributes:
        module: module name in the base, such as ``model.layers.0.self_attn.q_proj``.
        a: spec of A, shape (r, in).
        b: spec of B, shape (out, r).
    """

    module: str
    a: TensorSpec
    b: TensorSpec
    scale: float

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
        return {_kind(pair.module) for pair in self.pairs.values()}

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

    def _matrix(self, spec: TensorSpec) -> NDArray[np.float64]:
        values = self.file.read(spec, 0, spec.rows).values().astype(np.float64)
        if not np.isfinite(values).all():
            raise AdapterError(f"adapter tensor {shown(spec.name)} holds NaN or infinity")
        return values


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

        a, b = self._matrices(pair)
        return add_low_rank(rows.values(), a, b[rows.start : rows.stop], pair.scale)

    def bypass_page_cache(self) -> None:
        """Read the base straight from the disk from now on."""
        self.base.bypass_page_cache()

    def digests(self) -> dict[str, tuple[int, str]]:
        """Return size and SHA-256 of every file of base and adapter, by name."""
        self.adapter.file.digest()  # raises if the file changed meanwhile
        return self.base.digests() | {WEIGHTS: (self.adapter.file.size, self.adapter.sha256)}

    def close(self) -> None:
        """Close base and adapter."""
        self.base.close()
        self.adapter.close()


def parse_config(document: Mapping[str, Any]) -> AdapterConfig:
    """Check the content of adapter_config.json.

    Raises:
        AdapterError: if it is not LoRA, or asks for something that is not done here.
    """
    if document.get("peft_type") != "LORA":
        raise AdapterError(
            f"{CONFIG} has the peft_type {shown(document.get('peft_type'))}; only LORA is merged"
        )
    for reason in _refusals(document):
        raise AdapterError(f"the adapter cannot be merged here: {reason}; {_REMEDY}")
    targets, excluded = (_names(document, key) for key in ("target_modules", "exclude_modules"))
    return AdapterConfig(
        r=_rank(document.get("r"), "r"),
        alpha=_number(document.get("lora_alpha"), "lora_alpha"),
        dropout=_number(document.get("lora_dropout", 0.0), "lora_dropout"),
        rslora=document.get("use_rslora", False) is True,
        rank_pattern={k: _rank(v, "rank_pattern") for k, v in _pattern(document, "rank_pattern")},
        alpha_pattern={
            k: _number(v, "alpha_pattern") for k, v in _pattern(document, "alpha_pattern")
        },
        fan_in_fan_out=document.get("fan_in_fan_out", False) is True,
        targets=targets or (),
        excluded=excluded or (),
        selective=targets is None or excluded is None or any("." in name for name in targets),
        layers=_layers(document.get("layers_to_transform")),
        base=str(document["base_model_name_or_path"])
        if document.get("base_model_name_or_path")
        else None,
    )


def mismatches(base: Checkpoint, adapter: Adapter) -> Iterator[str]:
    """Yield every way in which an adapter does not fit a base, as full sentences."""
    layers = 1 + max((_layer(name) or 0 for name in base.tensors), default=0)
    trained_on = (
        f"; it says it was trained on {adapter.config.base!r}" if adapter.config.base else ""
    )
    for pair in adapter.pairs.values():
        spec = base.tensors.get(pair.weight)
        if spec is None:
            yield (
                f"adapter module {shown(pair.module)} is not in the base model "
                f"({layers} layers){trained_on}"
            )
        elif len(spec.shape) != 2 or "embed_tokens" in pair.module:
            yield f"adapter module {shown(pair.module)} is not a linear layer; {_REMEDY}"
        elif spec.shape != (pair.b.shape[0], pair.a.shape[1]):
            yield (
                f"adapter module {shown(pair.module)} changes a weight of shape "
                f"({pair.b.shape[0]}, {pair.a.shape[1]}), the base has {spec.shape}{trained_on}"
            )
    yield from _holes(base, adapter)


def _holes(base: Checkpoint, adapter: Adapter) -> Iterator[str]:
    """Yield the modules that a target of the adapter should have changed and did not."""
    config, kinds = adapter.config, adapter.kinds
    for target in config.targets:
        if _kind(target) not in kinds:
            yield f"{CONFIG} names the target {shown(target)}, {WEIGHTS} has nothing for it"
    for name in () if config.selective else base.tensors:
        layer, module = _layer(name), name.removesuffix(".weight")
        if layer is None or (config.layers is not None and layer not in config.layers):
            continue
        left_out = name not in adapter.pairs and not _is(module, config.excluded)
        if left_out and _kind(module) in kinds:
            yield (
                f"the adapter has no tensors for {shown(module)}, though it trains its siblings; "
                "get the whole adapter again"
            )


def _pair_up(config: AdapterConfig, file: TensorFile) -> dict[str, Pair]:
    sides: dict[str, dict[str, TensorSpec]] = {}
    for spec in file.tensors:
        match = _PAIR.match(spec.name.removeprefix(_PREFIX))
        if match is None or not spec.name.startswith(_PREFIX) or len(spec.shape) != 2:
            raise AdapterError(f"adapter tensor {shown(spec.name)} {_what_else(spec)}; {_REMEDY}")
        if match["side"] in sides.setdefault(match["module"], {}):
            raise AdapterError(f"adapter tensor {shown(spec.name)} is there twice")
        sides[match["module"]][match["side"]] = spec
    return {
        f"{module}.weight": _make_pair(config, module, pair)
        for module, pair in sorted(sides.items())
    }


def _make_pair(config: AdapterConfig, module: str, pair: Mapping[str, TensorSpec]) -> Pair:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise AdapterError(f"adapter module {shown(module)} has no lora_{missing}")
    a, b = pair["A"], pair["B"]
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"adapter module {shown(module)}: A has rank {a.shape[0]}, B has rank {b.shape[1]}"
        )
    return Pair(module, a, b, config.scale(module, rank=a.shape[0]))


def _refusals(document: Mapping[str, Any]) -> Iterator[str]:
    for key, value in document.items():
        if key in _HARMLESS or not value:
            continue
        yield _NAMED_REFUSALS.get(key, f"{CONFIG} sets {shown(key)}, which is not known here")
    init = document.get("init_lora_weights", True)
    if not isinstance(init, str | bool | None) or init not in _HARMLESS_INIT:
        yield f"it was initialised by {shown(init)}, which rewrites the base weights"


def _pattern(document: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    for pattern, value in (document.get(key) or {}).items():
        # PEFT reads these keys as regular expressions; only literal names are followed here.
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise AdapterError(
                f"{CONFIG}: the {key} key {shown(pattern)} is not a plain name; {_REMEDY}"
            )
        yield pattern, value


def _by_pattern(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    # PEFT's get_pattern_key: the first key that is the module or a dotted suffix of it.
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if module == name or (name == pattern and module.endswith(f".{name}")):
            return value
    return default


def _rank(value: Any, key: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise AdapterError(
            f"{CONFIG}: {key} is {shown(value)}; ranks from 1 to {_MAX_RANK} are read"
        )
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{CONFIG}: {key} is {shown(value)}, not a finite number")
    return float(value)


def _names(document: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    """Return module names; None if a regular expression stands there, which is never run."""
    value = document.get(key) or []
    if not isinstance(value, str | list):
        raise AdapterError(f"{CONFIG}: {key} is {shown(value)}, not a list of names")
    return None if isinstance(value, str) else tuple(sorted(map(str, value)))


def _is(module: str, names: tuple[str, ...]) -> bool:
    # PEFT's rule: the whole name, or a dotted suffix of it.
    return any(module == name or module.endswith(f".{name}") for name in names)


def _kind(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _what_else(spec: TensorSpec) -> str:
    """Say what a tensor is that belongs to no low-rank pair."""
    if ".lora_" in spec.name:
        return "is not the A or B of a linear layer"
    if spec.name.endswith((".bias", ".bias.default")):
        return "is a trained bias, and biases are not packed"
    # PEFT saves embeddings whole when they are targets, or when the vocabulary grew.
    return "is a whole weight that replaces the base's: a trained or resized one"


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    layers = [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise AdapterError(f"{CONFIG}: layers_to_transform is {shown(value)}")
    return tuple(layers)


def _layer(name: str) -> int | None:
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None
