"""Rungs *file*, in part, and *settings*: what the header says the file is, and how to run it.

gguf-py knows what kind of file bears which number, transformers reads config.json. What that does
not say must not stand in the header: llama.cpp would go by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import LlamaFileType

from medllm_pack.errors import shown
from medllm_pack.gguf.reader import GGUFFile
from medllm_pack.parity.checks import Check
from medllm_pack.parity.original import Original

# GGUF key -> attribute of transformers' configuration.
_SETTINGS = {
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.vocab_size": "vocab_size",
}


def check_variant(header: GGUFFile, entry: Mapping[str, Any]) -> Check:
    """Compare what kind of file it is with the variant's name, and types with pack.json."""
    wrong = list(_variant_problems(header, entry))
    detail = "; ".join(wrong) or "the types of the tensors are the variant's"
    return Check("file.variant", len(wrong), "= 0 differ", not wrong, detail)


def check_settings(metadata: Mapping[str, Any], original: Original) -> Check:
    """Compare the header's hyperparameters with config.json as transformers reads it."""
    expected = dict(_expected_settings(original))
    unknown = dict.fromkeys(key for key in metadata if key.startswith("llama."))
    wrong = [
        f"{key} is {shown(metadata.get(key))}, the model has {value}"
        for key, value in (unknown | expected).items()
        if not _same(metadata.get(key), value)
    ]
    return Check("settings", len(wrong), "= 0 differ", not wrong,
                 "; ".join(wrong) or "the header says what config.json says")  # fmt: skip


def _variant_problems(header: GGUFFile, entry: Mapping[str, Any]) -> Iterator[str]:
    name, key = str(entry["quant"]).upper(), "general.file_type"
    known = {kind.name.partition("_")[2]: int(kind) for kind in LlamaFileType}
    if name in known and header.metadata.get(key) != known[name]:  # else it is a mix of one's own
        yield f"{key} is {shown(header.metadata.get(key))}, of {name} it is {known[name]}"
    types = Counter(slot.type for slot in header.tensors)
    if types != entry["types"]:
        yield f"the tensors are {_listed(types)}, pack.json says {_listed(entry['types'])}"


def _listed(types: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(types.items()))


def _expected_settings(original: Original) -> Iterator[tuple[str, Any]]:
    config = original.transformers_config()
    yield "general.architecture", "llama"
    for key, attribute in _SETTINGS.items():
        yield key, getattr(config, attribute)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        yield f"llama.{key}", head_dim
    base, factor = _rope(config)
    yield "llama.rope.freq_base", base
    yield "llama.rope.scaling.type", None if factor is None else "linear"
    yield "llama.rope.scaling.factor", factor


def _rope(config: Any) -> tuple[float, float | None]:
    """Return base and linear factor; transformers 5 keeps both together, 4 did not."""
    scaling = getattr(config, "rope_parameters", None) or config.rope_scaling or {}
    base = scaling.get("rope_theta") or config.rope_theta
    return float(base), scaling.get("factor") if scaling.get("rope_type") == "linear" else None


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, float):
        return bool(np.float32(found) == np.float32(expected))
    return bool(found == expected)
