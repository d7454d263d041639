"""What still counts as the same model: the limits of ``medllm-pack parity``, as data.

The shipped ones are quant_recipes/limits.toml; a recipe sets others in its table ``[parity]``,
which has the same form and names only what differs. What differs stays known, so that a limit that
was loosened is told wherever the verdict is. Knows nothing of how anything is measured.

    >>> Limits().logits("q8_0") == Limits(RecipeLimits()).logits("q8_0")
    True
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from medllm_pack import resources
from medllm_pack.errors import RecipeError, shown
from medllm_pack.files import read_small
from medllm_pack.tables import Table, parse_table

FILE: Final = "limits.toml"
OTHER: Final = "other"  # the row of what has none of its own
_NAMED: Final = ("variants", "tensors")  # groups that have a row for each name
# Of these a smaller limit is the looser one, of all others a larger one.
_LEAST: Final = ("top1_clear", "agreement")

# Beyond these bounds a limit would refuse nothing: a model that knows nothing of a language has a
# divergence of some nats, and a tensor of zeros a relative error of 1.
Nats = Annotated[float, Field(gt=0, le=20)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=10)]
Lead = Annotated[float, Field(gt=0, le=2)]
Keys = tuple[str, ...]  # the keys that lead to a limit
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


@dataclass(frozen=True, slots=True)
class LogitLimits:
    """See :class:`VariantTable`."""

    kld_mean: float
    kld_p99: float
    top1_clear: float
    ppl_ratio: float


@dataclass(frozen=True, slots=True)
class WeightLimits:
    """See :class:`TensorTable`."""

    rmse: float
    worst_block: float


@dataclass(frozen=True, slots=True)
class Departure:
    """A limit that is not the shipped one.

    Attributes:
        path: such as ``("variants", "q4_k_m", "kld_mean")``.
        shipped: the shipped limit.
        used: the recipe's.
    """

    path: Keys
    shipped: float
    used: float

    @property
    def looser(self) -> bool:
        """Whether it lets pass what the shipped one refuses."""
        return (self.used < self.shipped) is (self.path[-1] in _LEAST)

    def document(self) -> dict[str, Any]:
        """Return it as it stands in parity.json and pack.json."""
        return {
            "name": ".".join(self.path), "shipped": self.shipped, "used": self.used,
            "looser": self.looser,
        }  # fmt: skip


class Limits:
    """The limits that count for a pack.

    Args:
        recipe: what its recipe sets; the shipped ones count for the rest.
    """

    def __init__(self, recipe: LimitTable | None = None) -> None:
        self._own = dict(_leaves(recipe.model_dump())) if recipe else {}

    def logits(self, quant: str) -> LogitLimits:
        """Return the limits of a variant, such as ``q4_k_m``."""
        return LogitLimits(*(self._value(path) for path in _paths("variants", quant, LogitLimits)))

    def weights(self, kind: str) -> WeightLimits:
        """Return the limits of a ggml type, such as ``Q4_K``."""
        return WeightLimits(*(self._value(path) for path in _paths("tensors", kind, WeightLimits)))

    def merge(self, *, exact: bool) -> float:
        """Return how far the adapter's share may be from 1."""
        return self._value(("merge", "exact" if exact else "quantized"))

    def greedy_tie(self, quant: str) -> float | None:
        """Return the lead below which another token will do; None if quantized."""
        path = ("generation", "ties", quant)
        return self._value(path) if path in _usual() else None

    @property
    def greedy_agreement(self) -> float:
        """Least share of tokens that the reference would have written."""
        return self._value(("generation", "agreement"))

    @property
    def served_agreement(self) -> float:
        """Least share of tokens that a server must write as llama.cpp does."""
        return self._value(("served", "agreement"))

    @property
    def served_tie(self) -> float:
        """Lead below which another token of a server will do."""
        return self._value(("served", "tie"))

    def departures(
        self, quant: str, *, kinds: Iterable[str], rungs: Collection[str]
    ) -> tuple[Departure, ...]:
        """Return every limit that counted for a variant and is not the shipped one.

        Args:
            quant: the variant.
            kinds: ggml types of its tensors.
            rungs: what was looked at, such as ``served``.
        """
        paths = [*_paths("variants", quant, LogitLimits)]
        paths += [
            path for kind in sorted(set(kinds)) for path in _paths("tensors", kind, WeightLimits)
        ]
        paths += [path for path in _usual() if path[0] in rungs and _concerns(path, quant)]
        found = (Departure(path, _usual()[_known(path)], self._value(path)) for path in paths)
        return tuple(departure for departure in found if departure.used != departure.shipped)

    def _value(self, path: Keys) -> float:
        usual = _known(path)
        return self._own.get(path, self._own.get(usual, _usual()[usual]))


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
    rows = {group: getattr(table, group) for group in _NAMED}
    missing = [
        f"{group}.{OTHER}: this row is missing" for group in rows if OTHER not in rows[group]
    ]
    missing += [f"{name}: this limit is missing" for name in _gaps("", table)]
    if missing:
        raise RecipeError(FILE, missing)
    return table


def row(name: str, rows: Iterable[str]) -> str:
    """Return the row that counts for a name: the longest that it begins with, or ``other``.

    >>> row("q4_k_m-clinica", ["q4_k_m", "q4_k_s", "other"])
    'q4_k_m'
    """
    fitting = [known for known in rows if name.startswith(known) and known != OTHER]
    return max(fitting, key=len, default=OTHER)


def described(departure: Mapping[str, Any]) -> str:
    """Return a departure of parity.json or pack.json in words."""
    word = "looser" if departure["looser"] else "stricter"
    return f"{departure['name']} {departure['used']:g} ({word}; shipped {departure['shipped']:g})"


def unknown_variants(table: LimitTable | None, own: Collection[str]) -> list[str]:
    """Return a sentence for each variant with limits that is neither shipped nor the recipe's own.

    Args:
        table: of a recipe.
        own: names of the recipe's variants.
    """
    known = [name for name in shipped().variants if name != OTHER]
    return [
        f"parity.variants.{name}: there is no such variant; shipped are {', '.join(known)}"
        for name in (table.variants if table else ())
        if name not in known and name not in own
    ]


@cache
def _usual() -> Mapping[Keys, float]:
    """Return the shipped limits by the keys that lead to them."""
    return MappingProxyType(dict(_leaves(shipped().model_dump())))


def _known(path: Keys) -> Keys:
    """Return the keys of the shipped limit that counts for a name of its own."""
    group, name, *rest = path
    if group not in _NAMED:
        return path
    return (group, row(name, (known[1] for known in _usual() if known[0] == group)), *rest)


def _paths(group: str, name: str, limits: type[LogitLimits | WeightLimits]) -> Iterator[Keys]:
    return ((group, name, field.name) for field in fields(limits))


def _concerns(path: Keys, quant: str) -> bool:
    return path[0] not in _NAMED and ("ties" not in path or quant in path)


def _leaves(document: Mapping[str, Any], *path: str) -> Iterator[tuple[Keys, float]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, *path, key)
        else:
            yield (*path, key), value


def _gaps(path: str, value: Any) -> Iterator[str]:
    """Yield the path of every limit that is absent."""
    if isinstance(value, Table):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _gaps(f"{path}.{key}".lstrip("."), inner)
    elif value is None:
        yield path
