"""The search for a scale and a minimum that several formats share, two sub-blocks at a time.

Additions to a sum wait for each other, and those of the other sub-block fill that time (docs/log.md
has what that is worth). As in search.py, what is kept of the best try is the scale its levels came
from, not the levels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medllm_pack.quant.kernels.lanes import (
    FloatRows,
    Floats,
    Ints,
    any_lane,
    float_rows,
    floats,
    inline,
    magnitude,
    select,
)
from medllm_pack.quant.kernels.search import between, level, nearest, tame_level

PAIR = 2
_PAIR_ROWS = PAIR * 32
_TAME = float(1 << 22)  # below this, nearest_int does not wrap around


@inline
def scales_and_mins(
    x: FloatRows,
    weights: FloatRows,
    start: int,
    count: int,
    top: int,
    numerators: NDArray[np.float32],
    absolute: bool,
    found: tuple[FloatRows, FloatRows, FloatRows, FloatRows],
    at: int,
) -> None:
    """``make_qkx2_quants``, which with its weights given is ``make_qkx3_quants`` too, twice.

    The two sub-blocks follow each other from ``start`` on. Rows ``at`` and ``at`` + 1 of what was
    ``found`` are filled: scales, (negated) minimums, and the inverse scales and the minimums of the
    best levels.
    """
    scales, mins, inverses, lows = found
    trial, best, error = float_rows(_PAIR_ROWS), float_rows(PAIR), float_rows(PAIR)
    least, high, low = float_rows(PAIR), float_rows(PAIR), float_rows(PAIR)
    inverse, scale, offset = float_rows(PAIR), float_rows(PAIR), float_rows(PAIR)
    totals, determinant = (float_rows(PAIR), float_rows(PAIR)), float_rows(PAIR)
    sums = float_rows(PAIR), float_rows(PAIR), float_rows(PAIR)
    _measure(x, weights, start, count, least, high, totals)
    for s in range(PAIR):
        low[s] = select(least[s] > 0.0, 0.0, least[s])
        inverse[s] = float(top) / (high[s] - low[s])
        scale[s], offset[s] = 1.0 / inverse[s], low[s]
        scales[at + s], mins[at + s] = scale[s], -low[s]
        inverses[at + s], lows[at + s] = inverse[s], low[s]
    _try_levels(x, weights, start, count, top, inverse, low, False, trial, sums)
    _add_errors(x, weights, start, count, scale, offset, trial, absolute, best)
    for k in range(numerators.size):
        wild = floats(0.0) != 0.0
        for s in range(PAIR):
            span = high[s] - low[s]
            inverse[s] = numerators[k] / span
            wild |= ~(magnitude(inverse[s] * span) < _TAME)
            wild |= ~(magnitude(inverse[s] * (least[s] - low[s])) < _TAME)
        if any_lane(wild):
            _try_levels(x, weights, start, count, top, inverse, low, False, trial, sums)
        else:
            _try_levels(x, weights, start, count, top, inverse, low, True, trial, sums)
        _fit(totals, sums, scale, offset, determinant)
        _add_errors(x, weights, start, count, scale, offset, trial, absolute, error)
        for s in range(PAIR):
            better = (determinant[s] > 0.0) & (error[s] < best[s])
            best[s] = select(better, error[s], best[s])
            scales[at + s] = select(better, scale[s], scales[at + s])
            inverses[at + s] = select(better, inverse[s], inverses[at + s])
            lows[at + s] = select(better, low[s], lows[at + s])
            # The next try measures from the new minimum.
            low[s] = select(better, offset[s], low[s])
    for s in range(PAIR):
        flat = high[s] <= select(least[s] > 0.0, 0.0, least[s])
        scales[at + s] = select(flat, 0.0, scales[at + s])
        mins[at + s] = select(flat, mins[at + s], -low[s])
        inverses[at + s] = select(flat, 0.0, inverses[at + s])


@inline
def _measure(
    x: FloatRows,
    weights: FloatRows,
    start: int,
    count: int,
    least: FloatRows,
    high: FloatRows,
    totals: tuple[FloatRows, FloatRows],
) -> None:
    """Fill in the extremes of two sub-blocks, and the sums of w and of w x."""
    sum_w, sum_x = totals
    for s in range(PAIR):
        first = start + s * count
        least[s], high[s] = x[first], x[first]
        sum_w[s], sum_x[s] = weights[first], weights[first] * x[first]
    for i in range(start + 1, start + count):
        for s in range(PAIR):
            value, w = x[i + s * count], weights[i + s * count]
            least[s] = select(value < least[s], value, least[s])
            high[s] = select(value > high[s], value, high[s])
            sum_w[s] += w
            sum_x[s] += w * value


@inline
def _try_levels(
    x: FloatRows,
    weights: FloatRows,
    start: int,
    count: int,
    top: int,
    inverse: FloatRows,
    low: FloatRows,
    tame: bool,
    trial: FloatRows,
    sums: tuple[FloatRows, FloatRows, FloatRows],
) -> None:
    """Fill in the levels of two sub-blocks, and the sums of w l, w l l and w l x."""
    sum_l, sum_l2, sum_xl = sums
    for s in range(PAIR):
        sum_l[s], sum_l2[s], sum_xl[s] = floats(0.0), floats(0.0), floats(0.0)
    for i in range(count):
        for s in range(PAIR):
            value = x[start + s * count + i]
            scaled = inverse[s] * (value - low[s])
            q = tame_level(scaled, 0, top) if tame else level(scaled, 0, top)
            trial[PAIR * i + s] = q
            wq = weights[start + s * count + i] * q
            sum_l[s] += wq
            sum_l2[s] += wq * q
            sum_xl[s] += wq * value


@inline
def _fit(
    totals: tuple[FloatRows, FloatRows],
    sums: tuple[FloatRows, FloatRows, FloatRows],
    scale: FloatRows,
    offset: FloatRows,
    determinant: FloatRows,
) -> None:
    """Fill in the scale and the minimum that fit the levels best."""
    sum_w, sum_x = totals
    sum_l, sum_l2, sum_xl = sums
    for s in range(PAIR):
        d = sum_w[s] * sum_l2[s] - sum_l[s] * sum_l[s]
        this_scale = (sum_w[s] * sum_xl[s] - sum_x[s] * sum_l[s]) / d
        this_low = (sum_l2[s] * sum_x[s] - sum_l[s] * sum_xl[s]) / d
        positive = this_low > 0.0
        scale[s] = select(positive, sum_xl[s] / sum_l2[s], this_scale)
        offset[s], determinant[s] = select(positive, 0.0, this_low), d


@inline
def _add_errors(
    x: FloatRows,
    weights: FloatRows,
    start: int,
    count: int,
    scale: FloatRows,
    offset: FloatRows,
    trial: FloatRows,
    absolute: bool,
    error: FloatRows,
) -> None:
    """Fill in the weighted errors of the levels with a scale and a minimum."""
    for s in range(PAIR):
        error[s] = floats(0.0)
    for i in range(count):
        for s in range(PAIR):
            at = start + s * count + i
            diff = scale[s] * trial[PAIR * i + s] + offset[s] - x[at]
            diff = magnitude(diff) if absolute else diff * diff
            error[s] += weights[at] * diff


@inline
def levels(x: Floats, inverse: Floats, low: Floats, top: int) -> Ints:
    """Return the levels of a sub-block for what :func:`scales_and_mins` found."""
    return between(nearest(inverse * (x - low)), 0, top)
