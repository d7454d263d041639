"""What is seen of each tensor of GGUF files, beside what it should be.

The model's weights are read once for all files. Each tensor leaves a handful of sums behind; only
one that is wrong is looked at again (tensors.py), to say what it is instead. gguf-py dequantizes.

Memory: some rows of a tensor, a few times over, for each thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from medllm_pack import ahead
from medllm_pack.gguf.layout import Slot
from medllm_pack.gguf.reader import GGUFFile
from medllm_pack.limits import Limits, WeightLimits
from medllm_pack.parity.wanted import Floats, Rows, Wanted, as_bfloat, widened

EXACT = ("F32", "F16", "BF16")
_MOST_LOST = 0.3  # of W, that a quantizer may leave; below it is not there


@dataclass(frozen=True, slots=True)
class Figures:
    """What was seen of one tensor. S: stored, W: base, D: scale · (B·A), E: expected.

    Attributes:
        name: in the GGUF file.
        source: in the checkpoint.
        kind: ggml type.
        n: weights.
        wrong: values of an exact type that are not the expected ones.
        rmse: of S - E, relative to that of E.
        cosine: between S and E.
        alike: how much S is W with D added in any measure, a multiple correlation.
        worst: largest error of a weight relative to the largest of its block.
        row: largest error of a row, relative to the row; 0 where the type is exact.
        share: how much of D was added to W; None where the adapter is silent.
        noise: standard error of ``share``.
        allowed: limits of its type.
    """

    name: str
    source: str
    kind: str
    n: int
    wrong: int
    rmse: float
    cosine: float
    alike: float
    worst: float
    row: float
    share: float | None
    noise: float
    allowed: WeightLimits

    @property
    def exact(self) -> bool:
        """Whether the type holds F16 values without loss."""
        return self.kind in EXACT

    @property
    def right(self) -> bool:
        """Whether the tensor is what it should be, as far as its type allows."""
        if self.exact:
            return self.wrong == 0
        held = self.rmse <= self.allowed.rmse and self.worst <= self.allowed.worst_block
        return held and self.row <= self.allowed.worst_row


@dataclass(frozen=True)
class Stored:
    """A GGUF file whose tensors are looked at."""

    path: Path
    header: GGUFFile

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """Places by tensor name."""
        return {slot.name: slot for slot in self.header.tensors}

    def mismatches(self, wanted: Wanted) -> Iterator[str]:
        """Yield every tensor that is missing, too many, or of another shape."""
        for name, source in wanted.sources.items():
            if name not in self.slots:
                yield f"{name} is missing"
            elif (found := self.slots[name].shape) != (shape := wanted.shape(source)):
                yield f"{name} has the shape {found}, the model's {shape}"
        yield from (f"{name} is not the model's" for name in self.slots
                    if name not in wanted.sources)  # fmt: skip

    def rows(self, slot: Slot, start: int, stop: int) -> Floats:
        """Return some rows of a tensor, or a vector, dequantized."""
        size = slot.nbytes // (slot.shape[0] if len(slot.shape) > 1 else 1)
        first, last = (start, stop) if len(slot.shape) > 1 else (0, 1)
        data = np.fromfile(
            self.path, np.uint8, (last - first) * size, offset=slot.offset + first * size
        )
        values = gguf.quants.dequantize(data.reshape(last - first, size), _type(slot.type))
        return widened(values).reshape(stop - start, *slot.shape[1:])


def look(
    files: Sequence[Stored], wanted: Wanted, limits: Limits, *, threads: int
) -> Iterator[tuple[str, list[Figures]]]:
    """Look at every tensor of the model; yield its name, and what was seen in each file.

    Args:
        files: they have no mismatch with the model.
        wanted: the model.
        limits: of types.
        threads: tensors looked at at once.
    """

    def work(name: str) -> tuple[str, list[Figures]]:
        return name, _see(files, name, wanted, limits, permuted=True)

    yield from ahead.each(work, wanted.sources, workers=threads, name="weights")


def look_at(file: Stored, name: str, wanted: Wanted, limits: Limits, *, permuted: bool) -> Figures:
    """Look at one tensor of one file.

    Args:
        file: where it is.
        name: of the tensor.
        wanted: the model.
        limits: of types.
        permuted: whether rows of q and k are expected in llama.cpp's order.
    """
    return _see([file], name, wanted, limits, permuted=permuted)[0]


def _see(
    files: Sequence[Stored], name: str, wanted: Wanted, limits: Limits, *, permuted: bool
) -> list[Figures]:
    source = wanted.sources[name]
    slots = [file.slots[name] for file in files]
    sums = [_Sums(slot.type) for slot in slots]
    for start, stop in wanted.groups(source):
        rows = wanted.rows(source, start, stop, permuted=permuted)
        for file, slot, total in zip(files, slots, sums, strict=True):
            total.add(file.rows(slot, start, stop), rows)
    targeted = source in wanted.pairs
    return [
        total.figures(slot, source, targeted=targeted, allowed=limits.weights(slot.type))
        for slot, total in zip(slots, sums, strict=True)
    ]


def _type(kind: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[kind]


class _Sums:
    """Adds up what is seen of one tensor in one file."""

    def __init__(self, kind: str) -> None:
        self._kind, self._block = kind, GGML_QUANT_SIZES[_type(kind)][0]
        self._wrong, self._worst, self._row, self._n = 0, 0.0, 0.0, 0
        self._products = np.zeros(9)

    def add(self, stored: Floats, rows: Rows) -> None:
        """Add some rows."""
        expected = as_bfloat(rows.stored) if self._kind == "BF16" else rows.stored
        self._products += _products(stored, expected, rows)
        self._n += stored.size
        if self._kind in EXACT:
            self._wrong += _count_wrong(stored, expected, rows.exact)
        else:
            usual = math.sqrt(float(self._products[1]) / self._n)
            self._worst = _largest(self._worst, _worst(stored, expected, self._block, usual))
            self._row = _largest(self._row, _worst_row(stored, expected, usual))

    def figures(self, slot: Slot, source: str, *, targeted: bool, allowed: WeightLimits) -> Figures:
        """Return what all rows of the tensor came to."""
        ss, ee, se, xx, sw, ww, sd, wd, dd = (float(value) for value in self._products)
        share, alike = _fit(ss, sw, ww, sd, wd, dd)
        return Figures(
            slot.name, source, slot.type, self._n, self._wrong,
            rmse=_ratio(math.sqrt(xx), math.sqrt(ee)),
            cosine=_ratio(se, math.sqrt(ss * ee)) if ss + ee else 1.0,
            alike=alike,
            worst=self._worst,
            row=self._row,
            share=share if targeted else None,
            noise=_ratio(math.sqrt(xx / self._n), math.sqrt(dd)),
            allowed=allowed,
        )  # fmt: skip


def _count_wrong(stored: Floats, expected: Floats, exact: Floats) -> int:
    wrong = stored != expected
    if not wrong.any():
        return 0
    # Both neighbours are right where float64's own rounding decides between them.
    gap = np.abs(stored - exact) - np.abs(expected - exact)
    return int((wrong & ~(gap <= 1e-12 * np.abs(exact))).sum())


def _worst(stored: Floats, expected: Floats, block: int, usual: float) -> float:
    """Return the largest error relative to the largest weight of its block.

    Blocks of next to nothing, as the rows of unused tokens have, count by the usual size of what
    was read of the tensor.
    """
    errors = np.abs(stored - expected).reshape(-1, block).max(axis=1)
    sizes = np.abs(expected).reshape(-1, block).max(axis=1)
    return float((errors / np.maximum(sizes, usual or 1.0)).max())


def _worst_row(stored: Floats, expected: Floats, usual: float) -> float:
    """Return the largest error of a row relative to the row, or to a tenth of a usual one."""
    if stored.ndim < 2:
        return 0.0
    x, columns = stored - expected, stored.shape[1]
    errors = np.sqrt(np.einsum("ij,ij->i", x, x) / columns)
    sizes = np.sqrt(np.einsum("ij,ij->i", expected, expected) / columns)
    return float((errors / np.maximum(sizes, usual / 10 or 1.0)).max())


def _largest(known: float, found: float) -> float:
    return math.inf if math.isnan(found) else max(known, found)


def _products(stored: Floats, expected: Floats, rows: Rows) -> Floats:
    """Return the nine sums that the figures are made of."""
    s, e, w = stored.ravel(), expected.ravel(), rows.base.ravel()
    x = s - e
    found = [_dot(s, s), _dot(e, e), _dot(s, e), _dot(x, x), _dot(s, w), _dot(w, w)]
    if rows.added is None:
        return np.array([*found, 0.0, 0.0, 0.0])
    d = rows.added.ravel()
    return np.array([*found, _dot(s, d), _dot(w, d), _dot(d, d)])


def _fit(ss: float, sw: float, ww: float, sd: float, wd: float, dd: float) -> tuple[float, float]:
    """Return how much of D was added to W, and how well S is a sum of both, from their products.

    Quantizers shrink what they round, by a tenth and more at two bits. What is left of W alone
    would then count against a small D; of both together as much is left, so the ratio is right.
    """
    alone = _ratio(sw, math.sqrt(ss * ww))
    both = ww * dd - wd * wd
    if both <= 1e-9 * ww * dd:  # D is nothing, or nothing but W
        return 1.0, alone
    of_w, of_d = (sw * dd - sd * wd) / both, (sd * ww - sw * wd) / both
    alike = math.sqrt(max(_ratio(of_w * sw + of_d * sd, ss), 0.0))
    return (of_d / of_w if of_w > _MOST_LOST else of_d), alike


def _dot(a: Floats, b: Floats) -> float:
    # Not BLAS, whose threads and those that look at other tensors would wait for each other.
    return float(np.einsum("i,i", a, b))


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf
