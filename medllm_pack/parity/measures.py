"""How far two models' predictions lie apart, token by token.

The reference's logits against a variant's: KL divergence, agreement on the likeliest token, and the
perplexity of both. In float64. Knows nothing of files, models or limits.

Memory: the logits of one text, a few times over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Nats between the two likeliest tokens: below, which one leads says little.
CLEAR = 0.7  # one is twice as likely as the other

# Edges of the histogram of divergences, the same for every model: four to a factor of ten.
KLD_EDGES: tuple[float, ...] = tuple(float(f"{10 ** (k / 4):.6g}") for k in range(-40, 9))
KLD_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Spread:
    """How the divergences of all positions are spread.

    Attributes:
        counts: positions up to the first edge of ``KLD_EDGES``, between two edges (the upper one
            included), and beyond the last.
        quantiles: in nats, at ``KLD_QUANTILES``.
    """

    counts: tuple[int, ...]
    quantiles: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Distance:
    """One text, position by position.

    Attributes:
        kld: KL(reference || variant) after each id, in nats.
        agrees: whether both find the same token likeliest.
        clear: whether the reference prefers its likeliest token clearly to the next.
        surprise_reference, surprise: -log p of the id that really follows; one value less.
        difference: largest difference of two logits, after taking out a common shift.
    """

    kld: Floats
    agrees: NDArray[np.bool_]
    clear: NDArray[np.bool_]
    surprise_reference: Floats
    surprise: Floats
    difference: float


def compare(
    reference: NDArray[np.float32], variant: NDArray[np.float32], ids: Sequence[int]
) -> Distance:
    """Compare the logits after each id of a text, shape (ids, vocabulary)."""
    p, q = _log_softmax(reference), _log_softmax(variant)
    # Rounding can leave a sum of -1e-17; a divergence is never negative.
    kld = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
    follows = np.asarray(ids[1:], dtype=np.intp)
    at = np.arange(len(follows))
    return Distance(
        kld, reference.argmax(axis=1) == variant.argmax(axis=1), _is_clear(p),
        -p[at, follows], -q[at, follows], float(np.abs(p - q).max()),
    )  # fmt: skip


def summarize(distances: Sequence[Distance]) -> dict[str, float]:
    """Return the key figures over all positions of all texts."""
    kld = np.concatenate([d.kld for d in distances])
    reference = np.concatenate([d.surprise_reference for d in distances])
    variant = np.concatenate([d.surprise for d in distances])
    agrees = np.concatenate([d.agrees for d in distances])
    clear = np.concatenate([d.clear for d in distances])
    ratio, error = _perplexity_ratio(reference, variant)
    return {
        "tokens": len(kld),
        "kld_mean": float(kld.mean()),
        "kld_median": float(np.median(kld)),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "kld_p999": float(np.quantile(kld, 0.999)),
        "kld_max": float(kld.max()),
        "top1": _share(agrees),
        "top1_clear": _share(agrees[clear]),
        "tokens_clear": int(clear.sum()),
        "ppl_reference": _perplexity(reference),
        "ppl": _perplexity(variant),
        "ppl_ratio": ratio,
        "ppl_ratio_error": error,
        "logit_difference": max(d.difference for d in distances),
    }


def spread(distances: Sequence[Distance]) -> Spread:
    """Return how the divergences are spread over all positions of all texts."""
    kld = np.concatenate([d.kld for d in distances])
    counts = np.bincount(np.searchsorted(KLD_EDGES, kld), minlength=len(KLD_EDGES) + 1)
    quantiles = np.quantile(kld, KLD_QUANTILES)
    return Spread(tuple(map(int, counts)), tuple(map(float, quantiles)))


def _log_softmax(logits: NDArray[np.float32]) -> Floats:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _is_clear(p: Floats) -> NDArray[np.bool_]:
    second, best = np.partition(p, -2, axis=1)[:, -2:].T
    return np.asarray(best - second > CLEAR)


def _share(agrees: NDArray[np.bool_]) -> float:
    return float(agrees.mean()) if len(agrees) else 1.0


def _perplexity(surprise: Floats) -> float:
    return float(np.exp(surprise.mean())) if len(surprise) else math.nan


def _perplexity_ratio(reference: Floats, variant: Floats) -> tuple[float, float]:
    """Return exp of the mean difference, and its standard error over tokens."""
    if len(reference) < 2:
        return math.nan, math.nan
    gap = variant - reference
    ratio = float(np.exp(gap.mean()))
    return ratio, ratio * float(gap.std(ddof=1)) / math.sqrt(len(gap))
