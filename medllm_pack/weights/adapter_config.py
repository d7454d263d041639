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
# Initialisations that leave the base as it is; all others rewrite it, so that W + BA is not the
# trained model.
_HARMLESS_INIT = frozenset({"gaussian", "default", "eva", "orthogonal", "mica", True, False, None})
# Of those, the ones that PEFT does not repeat when it loads the adapter: they were random, or need
# the training data. Tried with 0.21.2: CorDA is an error, the others give another model.
_LOST_INIT = re.compile(r"pissa_niter_\d+|corda|lora_ga")
_LOST_BASE: Final = (
    "which rewrites the base as nothing can repeat; convert it where it was trained "
    "(save_pretrained with path_initial_model_for_weight_conversion), or merge it into the base "
    "that was saved there"
)
_NAMED_REFUSALS = {
    "use_dora": "it is a DoRA adapter (it also rescales every column)",
    "modules_to_save": "it replaces whole modules (modules_to_save)",
    "trainable_token_indices": "it trains single tokens of the embedding",
    "target_parameters": "it targets raw parameters (target_parameters)",
    "loftq_config": "it was made for a LoftQ-quantized base",
    "megatron_config": "it was made for Megatron's parallel layers",
}
# What PEFT does not merge either, or not rightly (tried with 0.21.2), and what to do instead.
_REFUSALS_OF_PEFT = {
    "lora_bias": "its low-rank pairs have biases (lora_bias), for which a LLaMA has no place; "
    "train one without",
    "layer_replication": "it replicates layers of the base, and PEFT merges what each copy learned "
    "into one; store the base with its layers repeated, numbered anew and counted in config.json, "
    "and take layer_replication out of the adapter's configuration",
    "use_qalora": "it is a QALoRA adapter, made for a GPTQ base, into which PEFT does not merge "
    "either; train a plain one",
    "alora_invocation_tokens": "it is an activated LoRA, which is at work behind some tokens only, "
    "and merged it would be everywhere; train a plain one",
    "arrow_config": "it routes between several adapters (Arrow), which nothing merged can do; name "
    "one of them",
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
    kind = document.get("peft_type")
    if kind is None:
        raise AdapterError(f"{CONFIG} has no peft_type: it is not the configuration of PEFT's LoRA")
    if kind != "LORA":
        raise AdapterError(
            f"{CONFIG} has the peft_type {shown(kind)}; only LORA is merged here. If PEFT merges "
            f"that, {REMEDY}"
        )
    for reason in _refusals(document):
        raise AdapterError(f"the adapter cannot be merged here: {reason}")
    targets, excluded = (_names(document, key) for key in ("target_modules", "exclude_modules"))
    return AdapterConfig(
        r=_rank(document.get("r"), "r"),
        alpha=_number(document.get("lora_alpha"), "lora_alpha"),
        dropout=_number(document.get("lora_dropout", 0.0), "lora_dropout"),
        rslora=_flag(document, "use_rslora"),
        rank_pattern={k: _rank(v, "rank_pattern") for k, v in _pattern(document, "rank_pattern")},
        alpha_pattern={
            k: _number(v, "alpha_pattern") for k, v in _pattern(document, "alpha_pattern")
        },
        fan_in_fan_out=_flag(document, "fan_in_fan_out"),
        targets=targets or (),
        excluded=excluded or (),
        selective=targets is None or excluded is None or any("." in name for name in targets),
        layers=_layers(document.get("layers_to_transform")),
        base=str(document["base_model_name_or_path"])
        if document.get("base_model_name_or_path")
        else None,
    )


def _refusals(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield why it is not merged, with the way around."""
    for key, value in document.items():
        if key in _HARMLESS or _is_off(value):
            continue
        # A PEFT that does not know a key drops it with a warning.
        unknown = (
            f"{CONFIG} sets {shown(key)}, which is not known here; with a version of PEFT that "
            f"knows it (others pass over it), {REMEDY}"
        )
        named = f"{_NAMED_REFUSALS[key]}; {REMEDY}" if key in _NAMED_REFUSALS else unknown
        yield _REFUSALS_OF_PEFT.get(key, named)
    init = document.get("init_lora_weights", True)
    if isinstance(init, str) and _LOST_INIT.fullmatch(init):
        yield f"it was initialised by {shown(init)}, {_LOST_BASE}"
    elif not isinstance(init, str | bool | None) or init not in _HARMLESS_INIT:
        yield f"it was initialised by {shown(init)}, which rewrites the base weights; {REMEDY}"


def _is_off(value: Any) -> bool:
    # What PEFT writes for what is not used. A number says something even if it is 0.
    return value is None or value is False or value in ("", [], {})


def _flag(document: Mapping[str, Any], key: str) -> bool:
    value = document.get(key)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{CONFIG}: {key} is {shown(value)}, neither true nor false")
    return value is True


def _pattern(document: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    patterns = document.get(key) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{CONFIG}: {key} is {shown(patterns)}, not an object")
    for pattern, value in patterns.items():
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
            f"{CONFIG}: {key} is {shown(value)}; ranks from 1 to {_MAX_RANK} are merged here; "
            f"{REMEDY}"
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
