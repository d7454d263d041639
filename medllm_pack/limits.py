"""What still counts as the same model: the limits of ``medllm-pack parity``, as data.

The shipped ones are quant_recipes/limits.toml; a recipe sets others in its table ``[parity]``,
which has the same form and names only what differs. What differs stays known, so that a limit that
was loosened is told wherever the verdict is. Knows nothing of how anything is measured.

    >>> Limits().logits("q8_0") == Limits(LimitTable()).logits("q8_0")
    True
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from types import MappingProxyType
from typing import Any, Final

from medllm_pack.limit_tables import NAMED, OTHER, LimitTable, shipped

Keys = tuple[str, ...]  # that lead to a limit

# Of these a smaller limit is the looser one, of all others a larger one.
_LEAST: Final = ("top1_clear", "agreement")


@dataclass(frozen=True, slots=True)
class LogitLimits:
    """See :class:`VariantTable`."""

    kld_mean: float
    kld_p99: float
    top1_clear: float
    ppl_ratio: float


@dataclass(frozen=True, slots=True)
class WeightLimits:
    """See :class:`TensorTable`; ``worst_block`` is the one that counts for the file."""

    rmse: float
    worst_block: float
    worst_row: float


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
        matrix: whether its files were made with an importance matrix.
    """

    def __init__(self, recipe: LimitTable | None = None, *, matrix: bool = False) -> None:
        self._block = "worst_block_matrix" if matrix else "worst_block"
        self._own = dict(_leaves(recipe.model_dump())) if recipe else {}

    def logits(self, quant: str) -> LogitLimits:
        """Return the limits of a variant, such as ``q4_k_m``."""
        return LogitLimits(*(self._value(path) for path in _variant_paths(quant)))

    def weights(self, kind: str) -> WeightLimits:
        """Return the limits of a ggml type, such as ``Q4_K``."""
        return WeightLimits(*(self._value(path) for path in self._tensor_paths(kind)))

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
        paths = [*_variant_paths(quant)]
        paths += [path for kind in sorted(set(kinds)) for path in self._tensor_paths(kind)]
        paths += [path for path in _usual() if path[0] in rungs and _concerns(path, quant)]
        found = (Departure(path, _usual()[_known(path)], self._value(path)) for path in paths)
        return tuple(departure for departure in found if departure.used != departure.shipped)

    def _tensor_paths(self, kind: str) -> Sequence[Keys]:
        return [("tensors", kind, name) for name in ("rmse", self._block, "worst_row")]

    def _value(self, path: Keys) -> float:
        usual = _known(path)
        return self._own.get(path, self._own.get(usual, _usual()[usual]))


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
    if group not in NAMED:
        return path
    return (group, row(name, (known[1] for known in _usual() if known[0] == group)), *rest)


def _variant_paths(quant: str) -> Iterator[Keys]:
    return (("variants", quant, field.name) for field in fields(LogitLimits))


def _concerns(path: Keys, quant: str) -> bool:
    return path[0] not in NAMED and ("ties" not in path or quant in path)


def _leaves(document: Mapping[str, Any], *path: str) -> Iterator[tuple[Keys, float]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, *path, key)
        else:
            yield (*path, key), value
