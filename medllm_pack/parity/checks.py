"""What a check is, and what a ladder of checks says about a variant.

A rung is one question ("are these the weights?"); it may need several checks. The first check
that fails names the place where things went wrong. Knows nothing of how anything is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from medllm_pack.limits import Departure
    from medllm_pack.parity.measures import Spread

Rung = Literal[
    "file", "settings", "merge", "weights", "tokens", "template", "logits", "generation", "served"
]  # fmt: skip

# What usually lies behind the first rung that fails.
CAUSES: Mapping[Rung, str] = MappingProxyType(
    {
        "file": "the file was changed after the build, damaged on the disk, or renamed",
        "settings": "the header was made from another config.json, or edited",
        "merge": "the adapter was not merged, merged with another scale, or another one was",
        "weights": "rows in the wrong order, tensors under each other's names, or damaged data",
        "tokens": "the vocabulary of another model, or a tokenizer that was edited",
        "template": "a Modelfile that was edited, or a style that was not made for this tokenizer",
        "logits": "a setting or a weight that differs, or a quantization that costs too much",
        "generation": "weights or settings that differ slightly",
        "served": "the server holds another template, or runs the file in another way",
    }
)

_NEAR = 0.01  # to one


@dataclass(frozen=True, slots=True)
class Check:
    """One measured value against its limit.

    Attributes:
        name: the rung, and after a dot what was measured, such as ``logits.kld_mean``.
        measured: the value; None if it could not be measured.
        limit: what it was compared with, such as ``<= 0.001``.
        passed: the verdict; None if the question does not arise for this pack.
        detail: what was found, in one sentence.
    """

    name: str
    measured: float | int | None
    limit: str
    passed: bool | None
    detail: str

    @property
    def rung(self) -> Rung:
        """The rung that the check belongs to."""
        rung: Rung = self.name.partition(".")[0]  # type: ignore[assignment]
        return rung

    @property
    def found(self) -> str:
        """What was found; with the value, where the sentence does not hold it."""
        if not isinstance(self.measured, float):
            return self.detail
        return (
            f"{self.measured:{form(self.measured)}}, which should be {self.limit} ({self.detail})"
        )

    def document(self) -> dict[str, Any]:
        """Return the check as it stands in parity.json."""
        return {
            "name": self.name, "measured": rounded(self.measured), "limit": self.limit,
            "passed": self.passed, "detail": self.detail,
        }  # fmt: skip


def at_most(name: str, measured: float, limit: float, detail: str) -> Check:
    """Return the check that a value stays at or below a limit; NaN never does."""
    return Check(name, measured, f"<= {limit:g}", bool(measured <= limit), detail)


def at_least(name: str, measured: float, limit: float, detail: str) -> Check:
    """Return the check that a value reaches a limit; NaN never does."""
    return Check(name, measured, f">= {limit:g}", bool(measured >= limit), detail)


def broken(name: str, reason: str) -> Check:
    """Return a check that failed because nothing could be measured."""
    return Check(name, None, "measurable", False, reason)


def skipped(name: str, reason: str) -> Check:
    """Return a check whose question does not arise."""
    return Check(name, None, "", None, f"not asked: {reason}")


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a stored tensor lies from the model's.

    Attributes:
        name: in the GGUF file.
        type: ggml type.
        rmse: root mean square error, relative to the root mean square of the tensor.
        cosine: between stored and expected values.
        worst: largest error of a weight, relative to the largest of its block.
    """

    name: str
    type: str
    rmse: float
    cosine: float
    worst: float

    def document(self) -> dict[str, Any]:
        """Return the tensor as it stands in parity.json."""
        return {
            "name": self.name, "type": self.type, "rmse": rounded(self.rmse),
            "cosine": rounded(self.cosine), "worst": rounded(self.worst),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one variant, in the order of the ladder.

    Attributes:
        quant: the variant, such as ``q4_k_m``.
        figures: key figures by name, for pack.json; empty if there are none.
        spread: how the divergences are spread; None if there are none.
        tensors: every tensor that could be compared, in the order of the file.
        size: bytes of the file; None if it could not be read.
        departures: the limits that counted and are not the shipped ones.
    """

    quant: str
    checks: tuple[Check, ...]
    figures: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    spread: Spread | None = None
    tensors: tuple[TensorError, ...] = ()
    size: int | None = None
    departures: tuple[Departure, ...] = ()

    @property
    def failed(self) -> Check | None:
        """The first check that failed."""
        return next((check for check in self.checks if check.passed is False), None)

    @property
    def passed(self) -> bool:
        """Whether no check says no."""
        return self.failed is None

    def document(self) -> dict[str, Any]:
        """Return the verdict as it stands in parity.json."""
        return {
            "quant": self.quant,
            "passed": self.passed,
            "failed": self.failed.name if self.failed else None,
            "figures": {name: rounded(value) for name, value in self.figures.items()},
            "kld": self.spread
            and {
                "counts": list(self.spread.counts),
                "quantiles": [rounded(value) for value in self.spread.quantiles],
            },
            "tensors": [tensor.document() for tensor in self.tensors],
            "size": self.size,
            "limits": [departure.document() for departure in self.departures],
            "checks": [check.document() for check in self.checks],
        }


def form(value: float) -> str:
    """Return how many digits to write: more beside one, where shares and cosines lie.

    >>> f"{0.999976:{form(0.999976)}}", f"{0.0186325:{form(0.0186325)}}"
    ('0.999976', '0.01863')
    """
    return ".6g" if abs(value - 1) < _NEAR else ".4g"


def rounded(value: float | int | None) -> float | int | str | None:
    """Return a value with six significant digits; what JSON has no number for, as text."""
    if value is None or isinstance(value, int):
        return value
    short = float(f"{value:.6g}")
    return short if abs(short) < float("inf") else str(short)
