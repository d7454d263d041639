"""Write a LLaMA-shaped checkpoint and a LoRA with random weights, of any size, in little memory.

    python benchmarks/make_checkpoint.py --shape 7b --out /data/random-7b

Makes OUT/base (shards of 10 GB at most, as transformers writes them), OUT/adapter (r = 8 on q_proj
and v_proj) and nothing that has a meaning: the weights are noise with the spread of real ones.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

SHARD_BYTES = 10**10  # transformers' limit for years; LLaMA-2-7B lies in two such files
_POOL = 1 << 25  # random halves that tensors are cut from, so that a 13 GB file takes no hour


Tensor = tuple[str, tuple[int, ...]]  # name and shape


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int
    width: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    architecture: str = "LlamaForCausalLM"

    def tensors(self) -> Iterator[Tensor]:
        """Yield names and shapes in the order of the model's modules."""
        kv = self.width // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.width)
        for i in range(self.layers):
            at = f"model.layers.{i}."
            yield f"{at}self_attn.q_proj.weight", (self.width, self.width)
            yield f"{at}self_attn.k_proj.weight", (kv, self.width)
            yield f"{at}self_attn.v_proj.weight", (kv, self.width)
            yield f"{at}self_attn.o_proj.weight", (self.width, self.width)
            yield f"{at}mlp.gate_proj.weight", (self.ff, self.width)
            yield f"{at}mlp.up_proj.weight", (self.ff, self.width)
            yield f"{at}mlp.down_proj.weight", (self.width, self.ff)
            yield f"{at}input_layernorm.weight", (self.width,)
            yield f"{at}post_attention_layernorm.weight", (self.width,)
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.vocab, self.width)

    def shards(self, most: int) -> list[list[Tensor]]:
        """Return the tensors of each file, none above ``most`` bytes, as transformers fills them.

        Files take tensors in the order of the modules; in a file they lie by name.
        """
        shards: list[list[Tensor]] = [[]]
        room = most
        for name, shape in self.tensors():
            size = 2 * math.prod(shape)
            if size > room and shards[-1]:
                shards.append([])
                room = most
            shards[-1].append((name, shape))
            room -= size
        return [sorted(shard) for shard in shards]

    def config(self) -> dict[str, object]:
        """Return config.json."""
        return {
            "architectures": [self.architecture],
            "model_type": "mistral" if "Mistral" in self.architecture else "llama",
            "hidden_size": self.width, "intermediate_size": self.ff,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float16",
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


SHAPES = {
    "1b": Shape(22, 2048, 5632, 32, 4),
    "7b": Shape(32, 4096, 11008, 32, 32),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, architecture="MistralForCausalLM"),
    "13b": Shape(40, 5120, 13824, 40, 40),
}


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="of a file, at most")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model; rows above it are unused")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = Shape(**(shape.__dict__ | {"layers": arguments.layers}))
    make(shape, arguments.out, most=arguments.shard_bytes, tokenizer=arguments.tokenizer)


def make(
    shape: Shape, out: Path, *, most: int = SHARD_BYTES, tokenizer: Path | None = None
) -> None:
    """Write OUT/base, in files of at most ``most`` bytes, and OUT/adapter."""
    pool = (np.random.default_rng(1).standard_normal(_POOL) * 0.02).astype(np.float16)
    base = out / "base"
    base.mkdir(parents=True, exist_ok=True)
    shards = shape.shards(most)
    weight_map: dict[str, str] = {}
    for i, chosen in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        write(base / name, chosen, pool, "F16")
        weight_map |= {tensor: name for tensor, _ in chosen}
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps(shape.config(), indent=2))
    if tokenizer is not None:
        (base / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    _make_adapter(shape, out / "adapter", pool)


def _make_adapter(shape: Shape, folder: Path, pool: NDArray[np.float16]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pairs: list[Tensor] = []
    for name, size in shape.tensors():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = "base_model.model." + name.removesuffix(".weight")
            pairs += [(f"{module}.lora_A.weight", (8, size[1])),
                      (f"{module}.lora_B.weight", (size[0], 8))]  # fmt: skip
    write(folder / "adapter_model.safetensors", sorted(pairs), pool, "F16")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16,
        "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write(
    path: Path,
    tensors: list[Tensor],
    pool: NDArray[np.float16],
    dtype: str,
) -> None:
    """Write a safetensors file of noise cut from ``pool``; norms are ones."""
    header, offset = {}, 0
    for name, shape in tensors:
        size = 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for salt, (_, shape) in enumerate(tensors):
            if len(shape) == 1:
                file.write(np.ones(shape, dtype=np.float16).tobytes())
            else:
                _write_noise(file, math.prod(shape), salt, pool)


def _write_noise(file: BinaryIO, count: int, salt: int, pool: NDArray[np.float16]) -> None:
    start = (salt * 7919) % (_POOL // 2)
    while count > 0:
        part = pool[start : start + count]
        file.write(part.data)
        count -= part.size
        start = 0


if __name__ == "__main__":
    main()
