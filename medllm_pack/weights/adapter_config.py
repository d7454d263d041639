"""What PEFT's adapter_config.json says, checked.

A LoRA adapter can be more than plain low-rank pairs. What changes the result in a way we do not
reproduce is refused by name; nothing is skipped in silence. Knows nothing of tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from medllm_pack.errors import AdapterError, shown

_T = TypeVar("_T")

CONFIG: Final = "adapter_config.json"
# What to do with an adapter that is not merged here.
REMEDY: Final = (
    "merge it with PEFT (merge_and_unload, save_pretrained), put the base's tokenizer.model beside "
    "the result, and build with --merged"
)
_MAX_RANK = 256

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


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says, checked.

    Attributes:
        r: default rank.
        alpha: default numerator of the scale.
        rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
        targets: the module names it was trained on, as written; empty if a pattern was given,
            until lora.py fills in the kinds of modules that the adapter's file holds.
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
        raise AdapterError(f"the adapter cannot be merged here: {reason}; {REMEDY}")
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
                f"{CONFIG}: the {key} key {shown(pattern)} is not a plain name; {REMEDY}"
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


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    layers = [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise AdapterError(f"{CONFIG}: layers_to_transform is {shown(value)}")
    return tuple(layers)
