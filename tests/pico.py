"""Pico models on disk: real checkpoints of some megabytes, with values anyone can recompute.

Weights come from an integer hash, so they are the same bits on every machine and look random to a
quantizer. Files are written by the safetensors library, not by code of ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[Any]

TEXT = (
    "Paciente de 64 anos, hipertenso, admitido com dor torácica.\n"
    "Exame físico: PA 130x80 mmHg, FC 88 bpm, SpO2 96% em ar ambiente.\n"
    "Conduta: mantida a medicação, solicitados exames de controle.\n"
    "A manhã estava fria e a rua, cheia de gente a caminho do trabalho.\n"
)


@dataclass(frozen=True)
class Pico:
    """Shape of a pico model; the defaults are LLaMA-2-like."""

    layers: int = 2
    width: int = 256
    ff: int = 512
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 320
    tied: bool = False
    architecture: str = "LlamaForCausalLM"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield Hugging Face names and shapes."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.width)
        for i in range(self.layers):
            at = f"model.layers.{i}."
            yield f"{at}input_layernorm.weight", (self.width,)
            yield f"{at}self_attn.q_proj.weight", (q, self.width)
            yield f"{at}self_attn.k_proj.weight", (kv, self.width)
            yield f"{at}self_attn.v_proj.weight", (kv, self.width)
            yield f"{at}self_attn.o_proj.weight", (self.width, q)
            yield f"{at}post_attention_layernorm.weight", (self.width,)
            yield f"{at}mlp.gate_proj.weight", (self.ff, self.width)
            yield f"{at}mlp.up_proj.weight", (self.ff, self.width)
            yield f"{at}mlp.down_proj.weight", (self.width, self.ff)
        yield "model.norm.weight", (self.width,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.width)

    def config(self, **changes: Any) -> dict[str, Any]:
        """Return config.json as transformers 4 wrote it."""
        return {
            "architectures": [self.architecture],
            "model_type": "mistral" if "Mistral" in self.architecture else "llama",
            "hidden_size": self.width, "intermediate_size": self.ff,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": self.tied, "hidden_act": "silu",
            "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
        } | changes  # fmt: skip


LLAMA = Pico()
MISTRAL = Pico(heads=8, kv_heads=2, head_dim=32, architecture="MistralForCausalLM")


def ramp(shape: tuple[int, ...], salt: int, *, scale: float = 0.08) -> NDArray[np.float32]:
    """Return values in ±scale from an integer hash; a few of them ten times as large."""
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(salt * 1_000_003)
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) ^ (index >> np.uint64(7))
    mixed = (mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(32)
    values = (mixed.astype(np.float64) / 2**32 - 0.5) * 2 * scale
    values[mixed % np.uint64(997) == 0] *= 10
    return values.astype(np.float32).reshape(shape)


def weights(shape: Pico, dtype: str) -> dict[str, Array]:
    """Return all tensors; BF16 as the float32 values that BF16 holds exactly."""
    result: dict[str, Array] = {}
    for salt, (name, size) in enumerate(shape.tensors()):
        values = ramp(size, salt) + (1 if len(size) == 1 else 0)
        result[name] = as_dtype(values.astype(np.float32), dtype)
    return result


def as_dtype(values: NDArray[np.float32], dtype: str) -> Array:
    """Round float32 values to what ``dtype`` can hold."""
    if dtype == "F16":
        return values.astype(np.float16)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return rounded.astype(np.uint32).view(np.float32)
    return values


def write_model(
    folder: Path,
    shape: Pico = LLAMA,
    *,
    dtype: str = "F16",
    shards: int = 1,
    tensors: dict[str, Array] | None = None,
    tokenizer: bytes | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as transformers does; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = weights(shape, dtype) if tensors is None else tensors
    if shards == 1:
        save(folder / "model.safetensors", data, dtype)
    else:
        _write_shards(folder, data, dtype, shards)
    document = shape.config() if config is None else config
    (folder / "config.json").write_text(json.dumps(document, indent=2))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "add_bos_token": True,
                    "add_eos_token": False,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "unk_token": "<unk>",
                    "tokenizer_class": "LlamaTokenizer",
                }
            )  # fmt: skip
        )
    return folder


def save(path: Path, data: dict[str, Array], dtype: str) -> None:
    """Save with the safetensors library; BF16 through torch, which numpy lacks."""
    if dtype != "BF16":
        save_file({k: np.ascontiguousarray(v) for k, v in data.items()}, path)
        return
    import torch
    from safetensors.torch import save_file as save_torch

    save_torch({k: torch.from_numpy(v.copy()).to(torch.bfloat16) for k, v in data.items()}, path)


def _write_shards(folder: Path, data: dict[str, Array], dtype: str, shards: int) -> None:
    names = sorted(data)
    per_shard = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[i * per_shard : (i + 1) * per_shard]
        save(folder / file, {name: data[name] for name in chosen}, dtype)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def train_tokenizer(folder: Path, *, vocab: int = 320) -> bytes:
    """Train a SentencePiece model with LLaMA-2's conventions on a few sentences."""
    import sentencepiece as spm

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=vocab, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
        character_coverage=1.0,
    )  # fmt: skip
    return (folder / "spm.model").read_bytes()


def adapter_config(**changes: Any) -> dict[str, Any]:
    """Return an adapter_config.json with the keys that PEFT writes."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16,
        "lora_dropout": 0.1, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "modules_to_save": None, "use_dora": False,
        "use_rslora": False, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {},
        "alpha_pattern": {}, "layers_to_transform": None, "layers_pattern": None,
        "base_model_name_or_path": "example/base", "revision": None,
    } | changes  # fmt: skip


def adapter_tensors(
    shape: Pico, *, r: int = 8, targets: tuple[str, ...] = ("q_proj", "v_proj")
) -> dict[str, Array]:
    """Return A and B of every target, named as PEFT saves them."""
    result: dict[str, Array] = {}
    salt = 10_000
    for name, size in shape.tensors():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets:
            result[f"base_model.model.{module}.lora_A.weight"] = ramp((r, size[1]), salt)
            result[f"base_model.model.{module}.lora_B.weight"] = ramp((size[0], r), salt + 1)
            salt += 2
    return result


def write_adapter(
    folder: Path,
    shape: Pico = LLAMA,
    *,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Array] | None = None,
    dtype: str = "F32",
) -> Path:
    """Write a PEFT LoRA adapter; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    document = adapter_config() if config is None else config
    (folder / "adapter_config.json").write_text(json.dumps(document))
    data = adapter_tensors(shape) if tensors is None else tensors
    save(
        folder / "adapter_model.safetensors",
        {k: as_dtype(v, dtype) for k, v in data.items()},
        dtype,
    )
    return folder


def write_head_adapter(folder: Path, copy: Array, *, dtype: str = "F32") -> Path:
    """Write an adapter of q and the head, with the head's own weight as PEFT stores it."""
    targets = ("q_proj", "lm_head")
    tensors = adapter_tensors(LLAMA, targets=targets)
    tensors["base_model.model.lm_head.base_layer.weight"] = copy
    config = adapter_config(target_modules=list(targets))
    return write_adapter(folder, config=config, tensors=tensors, dtype=dtype)


def with_rows(shape: Pico, vocab: int) -> Pico:
    """Return the shape with another number of embedding rows."""
    return replace(shape, vocab=vocab)


def write_recipe(folder: Path, sources: Mapping[str, Path], *, text: str = "") -> Path:
    """Write a recipe whose sources are folders; return its path.

    ``text`` goes to the top of the file, before the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pico.toml"
    tables = "".join(f'[{role}]\nsource = "{place}"\n' for role, place in sources.items())
    path.write_text(
        f"""name = "Pico"
summary = "a pico model"
variants = ["f16", "q4_k_m"]
template = "continuacao"
ollama = "pico"
{text}
{tables}
[license]
id = "apache-2.0"
name = "Apache License 2.0"

[card]
title = "Pico"
summary = "A pico model."
languages = ["pt"]
""",
        encoding="utf-8",
    )
    return path
