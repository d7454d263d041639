"""The form of limits: quant_recipes/limits.toml, and the table ``[parity]`` of a recipe.

Knows what a limit may be, not what it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from medllm_pack import resources
from medllm_pack.errors import RecipeError, shown
from medllm_pack.files import read_small
from medllm_pack.tables import Table, parse_table

FILE: Final = "limits.toml"
OTHER: Final = "other"  # the row of what has none of its own
NAMED: Final = ("variants", "tensors")  # groups that have a row for each name

# Beyond these bounds a limit would refuse nothing: a model that knows nothing of a language has a
# divergence of some nats, and a tensor of zeros a relative error of 1.
Nats = Annotated[float, Field(gt=0, le=20)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=10)]
Lead = Annotated[float, Field(gt=0, le=4)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.\-]{0,31}$")]


class _Given(Table):
    """Limits of which some may be absent; what is absent is not written down either."""

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value not in (None, {})}


class VariantTable(_Given):
    """Limits of a variant's predictions against the reference's."""

    kld_mean: Nats | None = Field(
        default=None, description="largest mean KL divergence, nats a token"
    )
    kld_p99: Nats | None = Field(default=None, description="largest 99th percentile of it")
    top1_clear: Share | None = Field(
        default=None,
        description="least share of the same likeliest token where the reference is clear",
    )
    ppl_ratio: Ratio | None = Field(
        default=None, description="largest departure of the ratio of perplexities from 1"
    )


class TensorTable(_Given):
    """Limits of one tensor of a quantized type."""

    rmse: Part | None = Field(
        default=None, description="largest root mean square error, of the tensor's"
    )
    worst_block: Lead | None = Field(
        default=None, description="largest error of a weight, of the largest weight of its block"
    )
    worst_block_matrix: Lead | None = Field(
        default=None, description="the same in a file that was made with an importance matrix"
    )
    worst_row: Lead | None = Field(default=None, description="largest error of a row, of the row")


class MergeTable(_Given):
    """How far the adapter's share of a tensor may be from 1, before noise of the quantizer."""

    exact: Part | None = Field(default=None, description="in a tensor of an exact type")
    quantized: Part | None = Field(default=None, description="in a quantized tensor")


class TieTable(_Given):
    """How far below its best the reference's logit of a written token may be."""

    f32: Lead | None = Field(default=None, description="for an F32 variant")
    f16: Lead | None = Field(default=None, description="for an F16 variant")
    bf16: Lead | None = Field(default=None, description="for a BF16 variant")


class GenerationTable(_Given):
    """What an unquantized variant must write greedily."""

    agreement: Share | None = Field(
        default=None, description="least share of tokens that the reference would have written"
    )
    ties: TieTable = Field(
        default=TieTable(), description="lead in logits below which either will do"
    )


class ServedTable(_Given):
    """What a server must write that holds a variant."""

    agreement: Share | None = Field(
        default=None, description="least share of tokens that llama.cpp writes from the same file"
    )
    tie: Lead | None = Field(default=None, description="lead in logits below which either will do")


class LimitTable(_Given):
    """All limits, or some of them."""

    variants: dict[Name, VariantTable] = Field(
        default={}, description="variant, such as q4_k_m -> limits"
    )
    tensors: dict[str, TensorTable] = Field(
        default={}, description="ggml type, such as Q4_K -> limits"
    )
    merge: MergeTable = Field(default=MergeTable(), description="how much of the adapter is found")
    generation: GenerationTable = Field(default=GenerationTable(), description="greedy texts")
    served: ServedTable = Field(default=ServedTable(), description="greedy texts of a server")


class RecipeLimits(LimitTable):
    """What a recipe sets instead of the shipped limits."""

    @field_validator("tensors")
    @classmethod
    def _are_types(cls, tensors: dict[str, TensorTable]) -> dict[str, TensorTable]:
        known = shipped().tensors
        if unknown := [kind for kind in tensors if kind not in known]:
            raise ValueError(f"there is no type {shown(unknown[0])}; there are {', '.join(known)}")
        return tensors


@cache
def shipped() -> LimitTable:
    """Return the shipped limits.

    Raises:
        RecipeError: if the installed file is damaged.
    """
    return complete(parse_table(LimitTable, read_small(path(), limit=1 << 20), subject=FILE))


def path() -> Path:
    """Return the file of the shipped limits."""
    return resources.folder("quant_recipes") / FILE


def complete(table: LimitTable) -> LimitTable:
    """Return limits of which none is missing.

    Raises:
        RecipeError: naming those that are.
    """
    rows = {group: getattr(table, group) for group in NAMED}
    missing = [
        f"{group}.{OTHER}: this row is missing" for group in rows if OTHER not in rows[group]
    ]
    missing += [f"{name}: this limit is missing" for name in _gaps("", table)]
    if missing:
        raise RecipeError(FILE, missing)
    return table


def _gaps(path: str, value: Any) -> Iterator[str]:
    """Yield the path of every limit that is absent."""
    if isinstance(value, Table):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _gaps(f"{path}.{key}".lstrip("."), inner)
    elif value is None:
        yield path
