"""Facts of the llama family as data: tensor names, shapes, row order of q and k, metadata.

Covers LLaMA-2 and Mistral shapes (grouped heads, tied embeddings, head_dim); a second family would
be a second file with the same functions. Sources: llama.cpp's ``conversion/llama.py`` and
``conversion/base.py`` as vendored in llama-cpp-python 0.3.36, and the GGUF specification.
Knows nothing of files or quantization.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType, Keys, RopeScalingType
from numpy.typing import NDArray

from medllm_pack.errors import CheckpointError, shown
from medllm_pack.gguf.layout import Entry

ARCHITECTURE = "llama"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Hugging Face name -> GGUF name; {} is the block number.
_OUTSIDE = {
    EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
_IN_BLOCK = {
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
}
# Buffers that older checkpoints carry; llama.cpp computes them itself.
_IGNORED = re.compile(
    r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq\Z|"
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq\Z"
)

OTHERS = "llama.cpp's convert_hf_to_gguf.py converts other models, after PEFT's merge"

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "LLaMAForCausalLM")


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What config.json says about the shape of the model, checked.

    Attributes:
        architecture: the Hugging Face class, such as ``LlamaForCausalLM``.
        n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim: sizes.
        context: positions the model was trained for.
        eps: epsilon of the root-mean-square norms.
        rope_base: base of the rotary frequencies.
        rope_factor: linear scaling of positions; None without scaling.
        vocab: rows of the embedding.
        tied: whether the head shares the embedding's weights.
    """

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    context: int
    eps: float
    rope_base: float
    rope_factor: float | None
    vocab: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that a model of the family must have.

    Attributes:
        name: GGUF name.
        source: name in the Hugging Face checkpoint.
        shape: row-major.
        heads: heads whose rows llama.cpp wants interleaved; None for all but q and k.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    heads: int | None = None


def parse_config(document: Mapping[str, Any]) -> LlamaConfig:
    """Check the content of config.json.

    Raises:
        CheckpointError: if it is another family, or asks for what llama.cpp would not do alike.
    """
    architectures = document.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in _ARCHITECTURES:
        raise CheckpointError(
            f"config.json describes {shown(name)}; LLaMA-2 and Mistral shapes are packed "
            f"({', '.join(_ARCHITECTURES[:2])}). {OTHERS}"
        )
    for fact in _refusals(document):
        raise CheckpointError(f"config.json: {fact}")
    n_head, n_embd = _size(document, "num_attention_heads"), _size(document, "hidden_size")
    n_head_kv = _size(document, "num_key_value_heads", default=n_head)
    head_dim = _size(document, "head_dim", default=n_embd // n_head)
    if n_head % n_head_kv or head_dim % 2:
        raise CheckpointError(
            f"config.json: {n_head} heads do not divide into {n_head_kv} groups of even "
            f"dimension (head_dim {head_dim})"
        )
    base, factor = _rope(document)
    return LlamaConfig(
        architecture=name,
        n_layer=_size(document, "num_hidden_layers"),
        n_embd=n_embd,
        n_ff=_size(document, "intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        context=_size(document, "max_position_embeddings"),
        eps=_positive(document.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_base=base,
        rope_factor=factor,
        vocab=_size(document, "vocab_size"),
        tied=document.get("tie_word_embeddings", False) is True,
    )


def tensors(config: LlamaConfig) -> Iterator[Tensor]:
    """Yield every tensor that a model of this shape has."""
    embd, ff = config.n_embd, config.n_ff
    q, kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    shapes = {
        "attn_norm": (embd,), "ffn_norm": (embd,), "attn_q": (q, embd), "attn_k": (kv, embd),
        "attn_v": (kv, embd), "attn_output": (embd, q), "ffn_gate": (ff, embd),
        "ffn_up": (ff, embd), "ffn_down": (embd, ff), "token_embd": (config.vocab, embd),
        "output_norm": (embd,), "output": (config.vocab, embd),
    }  # fmt: skip
    heads = {"attn_q": config.n_head, "attn_k": config.n_head_kv}
    for source, name in _OUTSIDE.items():
        if source != HEAD or not config.tied:
            yield Tensor(name, source, shapes[name.split(".")[0]])
    for block in range(config.n_layer):
        for source, name in _IN_BLOCK.items():
            kind = name.split(".")[2]
            yield Tensor(name.format(block), source.format(block), shapes[kind], heads.get(kind))


def is_ignored(name: str, *, tied: bool) -> bool:
    """Say whether a checkpoint tensor is left out on purpose.

    Rotary frequencies are computed anew; with tied embeddings the model never reads a head.
    """
    return bool(_IGNORED.match(name)) or (tied and name == HEAD)


def interleave(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Return whole heads of q or k rows in llama.cpp's order.

    Hugging Face stores a head as two halves (0…d/2-1, d/2…d-1); llama.cpp rotates neighbours, so
    the halves are interleaved: (heads, 2, d/2, in) -> (heads, d/2, 2, in).
    """
    columns = rows.shape[-1]
    halves = rows.reshape(-1, 2, head_dim // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1, columns)


def metadata(config: LlamaConfig) -> tuple[Entry, ...]:
    """Return the ``llama.*`` pairs, in the order in which convert_hf_to_gguf writes them."""
    u32, f32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
    values: list[tuple[str, GGUFValueType, int | float | str]] = [
        (Keys.LLM.BLOCK_COUNT, u32, config.n_layer),
        (Keys.LLM.CONTEXT_LENGTH, u32, config.context),
        (Keys.LLM.EMBEDDING_LENGTH, u32, config.n_embd),
        (Keys.LLM.FEED_FORWARD_LENGTH, u32, config.n_ff),
        (Keys.Attention.HEAD_COUNT, u32, config.n_head),
        (Keys.Attention.HEAD_COUNT_KV, u32, config.n_head_kv),
    ]
    if config.rope_factor is not None:
        values += [
            (Keys.Rope.SCALING_TYPE, GGUFValueType.STRING, RopeScalingType.LINEAR.value),
            (Keys.Rope.SCALING_FACTOR, f32, config.rope_factor),
        ]
    values += [
        (Keys.Rope.FREQ_BASE, f32, config.rope_base),
        (Keys.Attention.LAYERNORM_RMS_EPS, f32, config.eps),
        (Keys.Attention.KEY_LENGTH, u32, config.head_dim),
        (Keys.Attention.VALUE_LENGTH, u32, config.head_dim),
        (Keys.LLM.VOCAB_SIZE, u32, config.vocab),
        (Keys.Rope.DIMENSION_COUNT, u32, config.head_dim),
    ]
    return tuple(Entry(key.format(arch=ARCHITECTURE), kind, value) for key, kind, value in values)


def size_label(parameters: int) -> str:
    """Return a count of weights as model pages show it: 6738415616 -> ``6.74B``."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= scale:
            value = parameters / scale
            digits = 2 if value < 100 else 0
            return f"{value:.{digits}f}{unit}"
    return str(parameters)


def _refusals(document: Mapping[str, Any]) -> Iterator[str]:
    if "auto_map" in document:
        yield "it asks for code of its own (auto_map), which is never run here"
    if document.get("quantization_config"):
        yield (
            "the weights are quantized (quantization_config); name the 16-bit model that they "
            "were made from, or dequantize them"
        )
    if document.get("hidden_act", "silu") != "silu":
        yield f"hidden_act is {shown(document['hidden_act'])}; llama.cpp's llama has silu"
    for key in ("attention_bias", "mlp_bias"):
        if document.get(key):
            yield f"{key} is set; biases are not packed"
    if document.get("pretraining_tp", 1) not in (0, 1, None):
        yield f"pretraining_tp is {shown(document['pretraining_tp'])}; merge the slices first"


def _rope(document: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return rotary base and linear factor; transformers 5 keeps both in rope_parameters."""
    parameters = document.get("rope_parameters") or document.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"config.json: the rope scaling is {shown(parameters)}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    base = parameters.get("rope_theta", document.get("rope_theta", 10000.0))
    factor = parameters.get("factor") if kind == "linear" else None
    if kind not in ("default", "linear", None):
        raise CheckpointError(
            f"config.json: rope scaling of type {shown(kind)} is not packed, linear scaling is. "
            f"{OTHERS}"
        )
    if factor is not None:
        factor = _positive(factor, "rope factor")
    return _positive(base, "rope_theta"), factor


def _size(document: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = document.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"config.json: {key} is {shown(value)}, not a positive size")
    return value


def _positive(value: Any, key: str) -> float:
    number = float(value) if isinstance(value, int | float) else math.nan
    if not (number > 0 and math.isfinite(number)):
        raise CheckpointError(f"config.json: {key} is {shown(value)}, not a positive number")
    return number
