"""Which tensor gets which type: mixes read from TOML, and the choice they make.

A mix is a default type and an ordered list of rules; the first rule that fits a tensor wins. The
shipped mixes choose what llama.cpp chooses for the llama family without experts (``src/
llama-quant.cpp`` as vendored in llama-cpp-python 0.3.36). Knows nothing of weights or of files
other than its own.

    >>> choose_type(
    ...     load_mix("q4_k_m"),
    ...     tensor="blk.3.attn_v.weight",
    ...     shape=(4096, 4096),
    ...     model=ModelShape(n_layer=32, n_head=32, n_head_kv=32, tied=False),
    ...     importance=False,
    ... )
    'Q6_K'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from medllm_pack import resources
from medllm_pack.errors import UsageError, shown
from medllm_pack.files import read_small
from medllm_pack.home import expanded
from medllm_pack.tables import Table, parse_table

_FOLDER = "quant_recipes/mixes"

# By size of LLaMA-2-7B, the largest first.
_NAMES: Final = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_k_m", "q5_k_s",
    "q5_0", "q4_1", "q4_k_m", "q4_k_s", "iq4_nl", "q4_0", "iq4_xs", "q3_k_l",
    "q3_k_m", "iq3_m", "iq3_s", "q3_k_s", "iq3_xs", "iq3_xxs", "q2_k", "iq2_m",
    "q2_k_s", "iq2_s", "iq2_xs", "iq2_xxs", "tq2_0", "iq1_m", "tq1_0", "iq1_s",
)  # fmt: skip

TensorKind = Literal[
    "token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output",
    "ffn_gate", "ffn_up", "ffn_down",
]  # fmt: skip
TypeName = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K",
    "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS",
    "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0",
]  # fmt: skip
_OUTSIDE: Final = ("token_embd", "output")
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight")
_FIRST = re.compile(r"first (?:1/)?[1-9][0-9]{0,3}")

# Weights that share a scale; a row must be a whole number of such blocks. 256 where not named.
BLOCK: Final = {
    "F32": 1, "F16": 1, "BF16": 1,
    "Q8_0": 32, "Q5_1": 32, "Q5_0": 32, "Q4_1": 32, "Q4_0": 32, "IQ4_NL": 32,
}  # fmt: skip
# What a row that is no multiple of 256 gets instead (tensor_type_fallback). Where 32 does not
# divide it either, it stays F16.
FALLBACK: Final = {
    "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0",
    "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ2_XS": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ1_S": "IQ4_NL",
    "TQ2_0": "Q4_0", "TQ1_0": "Q4_0",
}  # fmt: skip
# Types that are noise without an importance matrix (tensor_requires_imatrix).
_NEEDY: Final = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
_Q2_K_S: Final = 21  # LLAMA_FTYPE_MOSTLY_Q2_K_S

Text = Annotated[str, Field(min_length=1)]


class Rule(Table):
    """A type for some tensors; every condition that is given must hold."""

    # strict=False: TOML has lists where we keep tuples.
    tensors: tuple[TensorKind, ...] = Field(
        strict=False, min_length=1, description="tensors it is for"
    )
    layers: Text | None = Field(None, description="blocks it is for, in words")
    min_grouping: int | None = Field(
        None, gt=1, description="only if at least so many heads share a key-value head"
    )
    model: Literal["70B"] | None = Field(
        None, description="only LLaMA-2-70B's form: 80 blocks with grouped heads"
    )
    importance: bool | None = Field(
        None, description="only with (true) or without (false) an importance matrix"
    )
    type: TypeName = Field(description="the type these tensors get")
    fallback: TypeName | None = Field(
        None, description="instead of the usual fallback, if the type's blocks do not fit the row"
    )

    @field_validator("layers")
    @classmethod
    def _is_understood(cls, layers: str | None) -> str | None:
        if layers in (None, "middle 6/8", "more bits") or _FIRST.fullmatch(str(layers)):
            return layers
        raise ValueError(
            f"{shown(layers)} is not understood; write 'first 4', 'first 1/8', 'middle 6/8' "
            "or 'more bits'"
        )

    @model_validator(mode="after")
    def _has_layers_to_choose(self) -> Rule:
        outside = [kind for kind in self.tensors if kind in _OUTSIDE]
        if self.layers and outside:
            raise ValueError(f"{outside[0]} is in no block; give it a rule without layers")
        return self

    @property
    def is_conditional(self) -> bool:
        """Whether it may leave one of its tensors to the next rule."""
        conditions = (self.layers, self.min_grouping, self.model, self.importance)
        return any(condition is not None for condition in conditions)


class Mix(Table):
    """A file type: the type of most tensors, and rules for the others."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,31}$", description="as in file names, like Q4_K_M"
    )
    file_type: int = Field(
        ge=0, lt=1 << 32, description="llama.cpp's number for general.file_type (LLAMA_FTYPE)"
    )
    default: TypeName = Field(description="type of the tensors that no rule fits")
    summary: Text = Field(description="what it is for, in a sentence")
    rules: tuple[Rule, ...] = Field(
        (), strict=False, alias="rule", description="the first that fits a tensor wins"
    )

    @field_validator("rules")
    @classmethod
    def _are_reached(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        settled: set[str] = set()
        for number, rule in enumerate(rules):
            if settled.issuperset(rule.tensors):
                raise ValueError(
                    f"rule {number} is never reached; an earlier one without conditions settles "
                    f"{', '.join(rule.tensors)}"
                )
            if not rule.is_conditional:
                settled.update(rule.tensors)
        return rules


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a choice depends on, beside the tensor.

    Attributes:
        n_layer: blocks.
        n_head: attention heads.
        n_head_kv: key-value heads.
        tied: whether the model has no output.weight and uses token_embd in its place.
    """

    n_layer: int
    n_head: int
    n_head_kv: int
    tied: bool

    @property
    def grouping(self) -> int:
        """Heads that share a key-value head."""
        return self.n_head // self.n_head_kv

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for LLaMA-2-70B (LLM_TYPE_70B in ``models/llama.cpp``)."""
        return self.n_layer == 80 and self.n_head != self.n_head_kv


def mix_names() -> tuple[str, ...]:
    """Return the names of the shipped mixes, from large to small files."""
    return _NAMES


def load_mix(name: str) -> Mix:
    """Read a mix: a shipped name in any case, or the path of a TOML file.

    Raises:
        UsageError: if there is no such mix.
        RecipeError: with every problem of the file.
        SourceError: if the file cannot be read.
    """
    if name.lower() in _NAMES:
        return _read(resources.folder(_FOLDER) / f"{name.lower()}.toml")
    if name.endswith(".toml"):
        return _read(expanded(name))
    near = get_close_matches(name.lower(), _NAMES, n=2)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise UsageError(
        f"there is no mix {shown(name)}.{hint} Shipped: {', '.join(_NAMES)}; "
        "your own is named by the path of its .toml file"
    )


def choose_type(
    mix: Mix, *, tensor: str, shape: tuple[int, ...], model: ModelShape, importance: bool
) -> str:
    """Return the ggml type of a tensor.

    Args:
        mix: where the rules are.
        tensor: GGUF name, such as ``blk.3.attn_v.weight``.
        shape: row-major, (rows, columns) or (columns,).
        model: the model that the tensor is of.
        importance: whether the file is made with an importance matrix.
    """
    if len(shape) < 2:
        return "F32"  # norms; llama.cpp leaves them as its converter writes them
    block, kind = _place(tensor)
    if kind == "token_embd" and model.tied:
        kind = "output"  # it does the output's work
    for rule in mix.rules:
        if kind in rule.tensors and _holds(rule, block, model, importance):
            return _fitting(rule.type, shape[-1], fallback=rule.fallback)
    return _fitting(mix.default, shape[-1])


def requires_importance(mix: Mix, *, tensor: str, kind: str) -> bool:
    """Say whether a tensor of type ``kind`` must not be quantized without an importance matrix."""
    if _place(tensor)[1] in _OUTSIDE:
        return False
    # The one K-quant of which llama.cpp asks it, and only in Q2_K_S files.
    return kind in _NEEDY or (kind == "Q2_K" and mix.file_type == _Q2_K_S)


def _read(path: Path) -> Mix:
    return parse_table(Mix, read_small(path, limit=1 << 20), subject=path.name)


def _place(tensor: str) -> tuple[int, str]:
    """Return block and kind; tensors outside the blocks count as block 0."""
    match = _NAME.fullmatch(tensor)
    return (int(match[1] or 0), match[2]) if match else (0, tensor)


def _holds(rule: Rule, block: int, model: ModelShape, importance: bool) -> bool:
    return (
        (rule.layers is None or _is_among(rule.layers, block, model.n_layer))
        and (rule.min_grouping is None or model.grouping >= rule.min_grouping)
        and (rule.model is None or model.is_70b)
        and (rule.importance is None or importance == rule.importance)
    )


def _is_among(layers: str, block: int, n: int) -> bool:
    """Say whether a block is among those that the words mean, of n; fractions round down."""
    eighth, last = n // 8, 7 * n // 8
    if layers == "more bits":  # use_more_bits: both ends, and every third between
        return block < eighth or block >= last or (block - eighth) % 3 == 2
    if layers == "middle 6/8":
        return eighth <= block < last
    part = layers.removeprefix("first ")
    return block < (n // int(part[2:]) if part.startswith("1/") else int(part))


def _fitting(kind: str, columns: int, *, fallback: str | None = None) -> str:
    smaller = fallback or FALLBACK.get(kind, kind)
    return next((k for k in (kind, smaller) if columns % BLOCK.get(k, 256) == 0), "F16")
