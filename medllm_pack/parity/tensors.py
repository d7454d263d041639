"""Rungs *merge* and *weights*: every tensor of a GGUF file against the fine-tuned model's.

``W + scale · (B·A)`` is computed anew in float64 by torch and numpy from the inputs; names come
from gguf-py, dequantization too. Each tensor is read once and leaves a handful of sums behind; only
a tensor that is wrong is looked at again, to say what it is instead.

Knows nothing of llama.cpp as a runtime. Memory: some rows of a tensor, a few times over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from medllm_pack.gguf.layout import Slot
from medllm_pack.gguf.reader import GGUFFile
from medllm_pack.limits import Limits, WeightLimits
from medllm_pack.parity.checks import Check, TensorError, at_least, at_most, broken, skipped
from medllm_pack.parity.original import LowRank, Original, Weights
from medllm_pack.progress import Reporter

Floats = NDArray[np.float64]

EXACT = ("F32", "F16", "BF16")
_CHUNK = 1 << 21  # weights looked at together
_ALIKE = 0.5  # cosine above which a tensor is the base's with something added
_CHANGED = 0.01  # share of values above which a tensor was changed, not damaged


@dataclass(frozen=True, slots=True)
class Figures:
    """What was seen of one tensor. S: stored, W: base, D: scale · (B·A), E: expected.

    Attributes:
        name: in the GGUF file.
        source: in the checkpoint.
        kind: ggml type.
        wrong: values of an exact type that are not the expected ones.
        worst: largest error of a weight relative to the largest of its block.
        share: how much of D is in S - W; None where the adapter is silent.
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
    cosine_base: float
    worst: float
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
        return self.rmse <= self.allowed.rmse and self.worst <= self.allowed.worst_block


def check_tensors(
    path: Path, header: GGUFFile, original: Original, limits: Limits, *, report: Reporter
) -> tuple[list[Check], tuple[TensorError, ...]]:
    """Return the checks of the rungs *merge* and *weights* of a file, and each tensor's error."""
    comparer = Comparer(path, original, original.weights(), limits)
    problems = list(comparer.mismatches(header))
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        return [broken("weights.tensors", problems[0] + more)], ()
    report.step(f"weights of {path.name}", total_bytes=header.size - header.data_offset)
    found = []
    for slot in header.tensors:
        found.append(comparer.measure(slot))
        report.advance(slot.nbytes)
    slots = {slot.name: slot for slot in header.tensors}
    errors = tuple(TensorError(f.name, f.kind, f.rmse, f.cosine, f.worst) for f in found)
    return [_merge(comparer, slots, found), *_weights(comparer, slots, found)], errors


class Comparer:
    """Reads a file's tensors beside the ones they should be."""

    def __init__(self, path: Path, original: Original, weights: Weights, limits: Limits) -> None:
        config = original.transformers_config()
        self.limits = limits
        self.path, self.weights, self.pairs = path, weights, original.pairs
        self.layers = config.num_hidden_layers
        self.head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.sources = _names(weights, self.layers, tied=config.tie_word_embeddings)

    def mismatches(self, header: GGUFFile) -> Iterator[str]:
        """Yield every tensor that is missing, too many, or of another shape."""
        there = {slot.name: slot for slot in header.tensors}
        for name, source in self.sources.items():
            if name not in there:
                yield f"{name} is missing"
            elif there[name].shape != (shape := self.weights.shape(source)):
                yield f"{name} has the shape {there[name].shape}, the model's {shape}"
        yield from (f"{name} is not the model's" for name in there if name not in self.sources)

    def measure(self, slot: Slot, *, source: str | None = None, permuted: bool = True) -> Figures:
        """Compare a tensor with the one of its name.

        Args:
            slot: the tensor's place.
            source: another tensor of the checkpoint to compare with.
            permuted: whether rows of q and k are expected in llama.cpp's order.
        """
        source = source or self.sources[slot.name]
        sums, wrong, worst = np.zeros(9), 0, 0.0
        for stored, base, added in self._chunks(slot, source, permuted=permuted):
            exact = base + added
            expected = _as_stored(exact, slot.type)
            wrong += _count_wrong(stored, expected, exact)
            worst = max(worst, _worst(stored, expected, GGML_QUANT_SIZES[_type(slot)][0]))
            sums += _products(stored, base, added, expected)
        return _figures(
            slot, source, sums, wrong, worst,
            targeted=source in self.pairs, allowed=self.limits.weights(slot.type),
        )  # fmt: skip

    def _chunks(
        self, slot: Slot, source: str, *, permuted: bool
    ) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Yield stored values, base values and what the adapter adds, by groups of whole heads."""
        pair = self.pairs.get(source)
        turn = permuted and source.endswith((".q_proj.weight", ".k_proj.weight"))
        for start, stop in _groups(slot, self.head_dim):
            base = self.weights.rows(source, start, stop).double().numpy()
            added = _added(pair, start, stop, base)
            if turn:
                base, added = (_interleave(part, self.head_dim) for part in (base, added))
            yield self._stored(slot, start, stop).reshape(base.shape), base, added

    def _stored(self, slot: Slot, start: int, stop: int) -> Floats:
        rows = slot.shape[0] if len(slot.shape) > 1 else 1
        size = slot.nbytes // rows
        first, last = (start, stop) if len(slot.shape) > 1 else (0, 1)
        data = np.fromfile(
            self.path, np.uint8, (last - first) * size, offset=slot.offset + first * size
        )
        values: Floats = gguf.quants.dequantize(
            data.reshape(last - first, size), _type(slot)
        ).astype(np.float64)
        return values

    def explain(self, slot: Slot, seen: Figures) -> str:
        """Say what a wrong tensor is instead."""
        if seen.cosine == 0.0:
            return f"{slot.name} is all zero"
        if self.measure(slot, permuted=False).right:
            return f"{slot.name} has its rows in Hugging Face's order, not llama.cpp's"
        if other := self._twin(slot):
            return f"{slot.name} holds {other}"
        if seen.exact:
            return f"{slot.name}: {seen.wrong} of {seen.n} values differ"
        return (f"{slot.name} ({seen.kind}): relative error {seen.rmse:.3g}, "
                f"worst weight {seen.worst:.3g}")  # fmt: skip

    def _twin(self, slot: Slot) -> str | None:
        """Return the tensor of another layer that a tensor holds, judged by its first rows."""
        if not slot.name.startswith("blk."):
            return None
        _, block, kind = slot.name.split(".", 2)
        others = (f"blk.{i}.{kind}" for i in range(self.layers) if str(i) != block)
        return next((name for name in others if self._looks_like(slot, name)), None)

    def _looks_like(self, slot: Slot, name: str) -> bool:
        stored, base, added = next(self._chunks(slot, self.sources[name], permuted=True))
        expected = base + added
        norms = math.sqrt(float((stored**2).sum() * (expected**2).sum()))
        # Norms are all near one and therefore alike; only equal ones count.
        least = 1 - 1e-9 if stored.ndim == 1 else 0.99
        return norms > 0 and float((stored * expected).sum()) / norms > least


# --- the two rungs


def _merge(comparer: Comparer, slots: Mapping[str, Slot], found: Sequence[Figures]) -> Check:
    """Say whether exactly the adapter's targets hold the adapter, at PEFT's scale."""
    if not comparer.pairs:
        return skipped("merge.pairs", "the pack was made from weights that were already merged")
    targets = [_in_best_order(comparer, slots, f) for f in found if f.share is not None]
    known = [f for f in targets if f.right or f.cosine_base > _ALIKE]
    proven = [f for f in known if _holds_adapter(f, comparer.limits)]
    problems = [_merge_problem(f) for f in known if f not in proven]
    problems += [
        f"{f.name} was changed, and the adapter does not target it"
        for f in found
        if f.share is None and f.exact and f.wrong > _CHANGED * f.n and f.cosine_base > _ALIKE
        and len(slots[f.name].shape) > 1
    ]  # fmt: skip
    limit = f"= {len(comparer.pairs)} pairs"
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        return Check("merge.pairs", len(proven), limit, False, problems[0] + more)
    if len(proven) < len(comparer.pairs):
        unknown = len(comparer.pairs) - len(proven)
        detail = f"{unknown} targets are not the base's weights with anything added; see weights"
        return Check("merge.pairs", len(proven), limit, None, detail)
    shares = [f.share for f in proven if f.share is not None]
    detail = f"each target holds {min(shares):.4f} to {max(shares):.4f} of scale · (B·A)"
    return Check("merge.pairs", len(proven), limit, True, detail)


def _in_best_order(comparer: Comparer, slots: Mapping[str, Slot], seen: Figures) -> Figures:
    """Return the figures in the row order that fits; the order is the next rung's question."""
    if seen.right or seen.cosine_base > _ALIKE:
        return seen
    other = comparer.measure(slots[seen.name], permuted=False)
    return other if other.cosine_base > seen.cosine_base else seen


def _holds_adapter(seen: Figures, limits: Limits) -> bool:
    assert seen.share is not None
    allowed = limits.merge(exact=seen.exact)
    return (seen.exact and seen.wrong == 0) or abs(seen.share - 1) <= allowed + 5 * seen.noise


def _merge_problem(seen: Figures) -> str:
    share = seen.share or 0.0
    if abs(share) < 0.1:
        return f"{seen.name} holds nothing of the adapter (share {share:.3f})"
    return f"{seen.name} holds {share:.3f} times what the adapter adds"


def _weights(
    comparer: Comparer, slots: Mapping[str, Slot], found: Sequence[Figures]
) -> Iterator[Check]:
    """Yield the checks of the weights: exact where the type is, within limits elsewhere."""
    exact = [f for f in found if f.exact]
    wrong = [f for f in exact if not f.right]
    detail = f"{len(exact)} tensors of exact types are the reference's"
    yield Check(
        "weights.exact", sum(f.wrong for f in wrong), "= 0 values differ", not wrong,
        _explained(comparer, slots, wrong) or detail,
    )  # fmt: skip
    coarse = [f for f in found if not f.exact]
    if not coarse:
        return
    reasons = _explained(comparer, slots, [f for f in coarse if not f.right])
    worst = max(coarse, key=lambda f: f.rmse / f.allowed.rmse)
    yield at_most("weights.rmse", worst.rmse, worst.allowed.rmse, reasons or _at(worst))
    worst = min(coarse, key=lambda f: f.cosine)
    least = math.sqrt(max(1 - worst.allowed.rmse**2, 0))
    yield at_least("weights.cosine", worst.cosine, least, reasons or _at(worst))
    worst = max(coarse, key=lambda f: f.worst / f.allowed.worst_block)
    yield at_most(
        "weights.worst_block", worst.worst, worst.allowed.worst_block, reasons or _at(worst)
    )


def _at(seen: Figures) -> str:
    return f"nearest to its limit: {seen.name} ({seen.kind})"


def _explained(comparer: Comparer, slots: Mapping[str, Slot], wrong: Sequence[Figures]) -> str:
    """Explain the first tensors that are wrong and count the rest."""
    said = [comparer.explain(slots[seen.name], seen) for seen in wrong[:3]]
    if len(wrong) > len(said):
        said.append(f"and {len(wrong) - len(said)} more tensors")
    return "; ".join(said)


# --- arithmetic


def _names(weights: Weights, layers: int, *, tied: bool) -> dict[str, str]:
    """Return GGUF name -> checkpoint name, by gguf-py's table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    found = {}
    for source in weights:
        name = table.get_name(source, try_suffixes=(".weight",))
        # Rotary frequencies have a name there and are not stored; a tied head is the embedding.
        if name and "rope_freqs" not in name and "rot" not in name.split(".")[-2]:
            found[name] = source
    if tied:
        found.pop("output.weight", None)
    return found


def _type(slot: Slot) -> GGMLQuantizationType:
    return GGMLQuantizationType[slot.type]


def _groups(slot: Slot, head_dim: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows: whole heads, at most about ``_CHUNK`` weights."""
    rows = slot.shape[0]
    step = rows if len(slot.shape) == 1 else max(_CHUNK // slot.shape[1] // head_dim, 1) * head_dim
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _added(pair: LowRank | None, start: int, stop: int, base: Floats) -> Floats:
    if pair is None:
        return np.zeros_like(base)
    added: Floats = (pair.scale * (pair.b[start:stop] @ pair.a)).numpy()  # (rows, r) @ (r, in)
    return added


def _interleave(rows: Floats, head_dim: int) -> Floats:
    """Return whole heads in llama.cpp's order: row 2i + j is Hugging Face's i + j · d/2."""
    order = np.arange(len(rows)).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).ravel()
    return rows[order]


def _as_stored(exact: Floats, kind: str) -> Floats:
    """Round as a sound file does: norms to F32, matrices to F16, and BF16 from there."""
    if exact.ndim == 1:
        return exact.astype(np.float32).astype(np.float64)
    halves = exact.astype(np.float16)
    if kind != "BF16":
        return halves.astype(np.float64)
    import torch

    rounded: Floats = torch.from_numpy(halves).float().bfloat16().double().numpy()
    return rounded


def _count_wrong(stored: Floats, expected: Floats, exact: Floats) -> int:
    wrong = stored != expected
    if not wrong.any():
        return 0
    # Both neighbours are right where float64's own rounding decides between them.
    gap = np.abs(stored - exact) - np.abs(expected - exact)
    return int((wrong & ~(gap <= 1e-12 * np.abs(exact))).sum())


def _worst(stored: Floats, expected: Floats, block: int) -> float:
    """Return the largest error relative to the largest weight of its block.

    Blocks of next to nothing, as the rows of unused tokens have, count by the tensor's usual size.
    """
    if block == 1:
        return 0.0  # an exact type
    errors = np.abs(stored - expected).reshape(-1, block).max(axis=1)
    sizes = np.abs(expected).reshape(-1, block).max(axis=1)
    usual = math.sqrt(float((expected**2).mean()))
    return float((errors / np.maximum(sizes, usual or 1.0)).max())


def _products(stored: Floats, base: Floats, added: Floats, expected: Floats) -> Floats:
    """Return the nine sums that the figures are made of."""
    s, w, d, e = (part.ravel() for part in (stored, base, added, expected))
    x = s - e
    return np.array([s @ s, e @ e, s @ e, x @ x, s @ w, w @ w, s @ d, w @ d, d @ d])


def _figures(
    slot: Slot,
    source: str,
    sums: Floats,
    wrong: int,
    worst: float,
    *,
    targeted: bool,
    allowed: WeightLimits,
) -> Figures:
    ss, ee, se, xx, sw, ww, sd, wd, dd = (float(value) for value in sums)
    n = math.prod(slot.shape)
    return Figures(
        slot.name, source, slot.type, n, wrong,
        rmse=_ratio(math.sqrt(xx), math.sqrt(ee)),
        cosine=_ratio(se, math.sqrt(ss * ee)) if ss + ee else 1.0,
        cosine_base=_ratio(sw, math.sqrt(ss * ww)),
        worst=worst,
        share=(_ratio(sd - wd, dd) if dd else 1.0) if targeted else None,
        noise=_ratio(math.sqrt(xx / n), math.sqrt(dd)),
        allowed=allowed,
    )  # fmt: skip


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf
