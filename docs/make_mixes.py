"""Writes docs/mixes.md: the size of every shipped mix, by arithmetic.

Run it after a change of a mix: python -m docs.make_mixes. A test fails when the page is stale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from medllm_pack.gguf.layout import padded, row_bytes
from medllm_pack.gguf.llama import LlamaConfig, tensors
from medllm_pack.quant.mixes import (
    BLOCK,
    FALLBACK,
    Mix,
    ModelShape,
    choose_type,
    load_mix,
    mix_names,
    requires_importance,
)

PAGE = Path(__file__).with_name("mixes.md")

LLAMA = LlamaConfig(
    architecture="LlamaForCausalLM", n_layer=32, n_embd=4096, n_ff=11008, n_head=32, n_head_kv=32,
    head_dim=128, context=4096, eps=1e-5, rope_base=1e4, rope_factor=None, vocab=32000, tied=False,
)  # fmt: skip
MISTRAL = LlamaConfig(
    architecture="MistralForCausalLM", n_layer=32, n_embd=4096, n_ff=14336, n_head=32, n_head_kv=8,
    head_dim=128, context=32768, eps=1e-5, rope_base=1e4, rope_factor=None, vocab=32000, tied=False,
)  # fmt: skip

_TEXT = """\
# Mixes

A mix says which tensor gets which type. Each is a file in `quant_recipes/mixes/`, named as in
`--quant f16,q4_k_m`: a default type and rules, of which the first that fits a tensor wins. The
shipped ones choose what llama.cpp chooses; the tests ask llama.cpp about every mix on many shapes
of model.

Bits per weight and GB (10⁹ bytes) are arithmetic over all tensors of the model; the file also has
a header with the vocabulary, of about 1 MB. "Matrix" marks the mixes that need an importance
matrix; they are counted with one, the others without. The last column counts the tensors of
LLaMA-2-7B by type; with them go {norms} norms in F32.

{table}

## Rules that hold for every mix

- Norms, and whatever else has one dimension, are F32.
- A model without `output.weight` uses `token_embd.weight` in its place, which then gets the
  output's type.
- A row must be a whole number of the type's blocks: 256 weights, or 32 for {small}.
  A tensor with other rows gets another type; where 32 does not divide the row either, F16.

| instead of | it gets |
| --- | --- |
{fallbacks}

## The file

    name = "Q4_K_M"             # as in file names
    file_type = 15              # llama.cpp's number for general.file_type
    default = "Q4_K"            # type of the tensors that no rule fits
    summary = "…"               # one sentence

    [[rule]]                    # every condition that is given must hold
    tensors = ["attn_v"]        # token_embd output attn_q attn_k attn_v attn_output
                                # ffn_gate ffn_up ffn_down
    layers = "more bits"        # optional; see below
    min_grouping = 4            # optional: heads that share a key-value head, at least
    model = "70B"               # optional: 80 blocks with grouped heads
    importance = true           # optional: with (true) or without (false) an importance matrix
    type = "Q6_K"
    fallback = "Q8_0"           # optional: instead of the usual one

`layers` of a model with n blocks, counted from 0, fractions rounded down:

| words | blocks i |
| --- | --- |
| `first 4` | i < 4 |
| `first 1/8` | i < n/8 |
| `middle 6/8` | n/8 ≤ i < 7n/8 |
| `more bits` | i < n/8, or i ≥ 7n/8, or (i − n/8) mod 3 = 2 |

A mix of your own is a copy with changes; where a mix is named, give the path of its `.toml` file.
"""


@dataclass(frozen=True)
class Size:
    """What a mix makes of a model: bytes, weights, and matrices by type."""

    nbytes: int
    weights: int
    types: Counter[str]
    needs_matrix: bool

    @property
    def bits(self) -> float:
        """Bits for one weight."""
        return 8 * self.nbytes / self.weights


def measure(mix: Mix, config: LlamaConfig) -> Size:
    """Return the size of a model, with an importance matrix only if the mix needs one."""
    without = _measure(mix, config, importance=False)
    return _measure(mix, config, importance=True) if without.needs_matrix else without


def _measure(mix: Mix, config: LlamaConfig, *, importance: bool) -> Size:
    model = ModelShape(config.n_layer, config.n_head, config.n_head_kv, config.tied)
    nbytes, weights, types, needs = 0, 0, Counter[str](), False
    for tensor in tensors(config):
        kind = choose_type(
            mix, tensor=tensor.name, shape=tensor.shape, model=model, importance=importance
        )
        nbytes += padded(prod(tensor.shape[:-1]) * row_bytes(kind, tensor.shape[-1]))
        weights += prod(tensor.shape)
        types[kind] += len(tensor.shape) > 1
        needs |= requires_importance(mix, tensor=tensor.name, kind=kind)
    return Size(nbytes, weights, +types, needs)


def page() -> str:
    """Return the text of docs/mixes.md."""
    norms = sum(len(tensor.shape) == 1 for tensor in tensors(LLAMA))
    small = [kind for kind, size in BLOCK.items() if size == 32]
    return _TEXT.format(
        table="\n".join(_table()),
        norms=norms,
        small=", ".join(small),
        fallbacks="\n".join(_fallbacks()),
    )


def _table() -> list[str]:
    return [
        "| mix | LLaMA-2-7B bits | GB | Mistral-7B bits | GB | matrix | types in LLaMA-2-7B |",
        "| --- | --: | --: | --: | --: | --- | --- |",
        *(_row(load_mix(name)) for name in mix_names()),
    ]


def _fallbacks() -> Iterator[str]:
    for smaller in dict.fromkeys(FALLBACK.values()):
        kinds = [kind for kind, other in FALLBACK.items() if other == smaller]
        yield f"| {', '.join(kinds)} | {smaller} |"


def _row(mix: Mix) -> str:
    llama, mistral = measure(mix, LLAMA), measure(mix, MISTRAL)
    types = ", ".join(f"{kind} {count}" for kind, count in llama.types.most_common())
    matrix = "needed" if llama.needs_matrix else ""
    sizes = " | ".join(f"{size.bits:.2f} | {size.nbytes / 1e9:.2f}" for size in (llama, mistral))
    return f"| `{mix.name.lower()}` | {sizes} | {matrix} | {types} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
