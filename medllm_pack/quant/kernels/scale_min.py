"""Q2_K, Q4_K and Q5_K: super-blocks of sub-blocks that have a scale and a minimum each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medllm_pack.quant.kernels.lanes import (
    WIDTH,
    FloatRows,
    Floats,
    IntRows,
    Ints,
    any_lane,
    as_floats,
    float_rows,
    floats,
    inline,
    int_rows,
    ints,
    kernel,
    magnitude,
    root,
    select,
)
from medllm_pack.quant.kernels.pairs import PAIR, levels, scales_and_mins
from medllm_pack.quant.kernels.search import (
    between,
    from_half,
    load,
    nearest,
    pack_pairs,
    positive_scale,
    scale_tries,
    store,
    to_half,
    tries,
)

_Q2_TRIES = tries(-0.5, 0.1, 16, 3)
_Q4_TRIES = tries(-1.0, 0.1, 21, 15)
_Q5_TRIES = tries(-0.5, 0.1, 16, 31)
# With an importance matrix.
_FINE_2_TRIES = tries(-0.9, 0.05, 37, 3)
_FINE_4_TRIES = tries(-0.9, 0.05, 37, 15)
_FINE_5_TRIES = tries(-0.9, 0.05, 37, 31)
_SCALE_4_TRIES = scale_tries(4, 15)
_SCALE_6_TRIES = scale_tries(4, 63)

# ------------------------------------------------------------------------------ Q4_K and Q5_K


@kernel
def q4_k(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q4_K_ref``."""
    x, quants, words = float_rows(256), int_rows(256), int_rows(48)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        _q45_k(x, 15, _Q4_TRIES, words, quants)
        _pack_nibbles(quants, words, 4)
        store(words, 144, out, 144, first, blocks)


@kernel
def q4_k_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q4_K_impl``."""
    x, quants, words, weights = float_rows(256), int_rows(256), int_rows(48), float_rows(256)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        load(weights, 256, importance, first, blocks, period)
        _q45_k_weighted(x, weights, 15, _FINE_4_TRIES, words, quants)
        _pack_nibbles(quants, words, 4)
        store(words, 144, out, 144, first, blocks)


@kernel
def q5_k(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q5_K_ref``."""
    x, quants, words = float_rows(256), int_rows(256), int_rows(48)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        _q45_k(x, 31, _Q5_TRIES, words, quants)
        _pack_fifth_bits(quants, words)
        _pack_nibbles(quants, words, 12)
        store(words, 176, out, 176, first, blocks)


@kernel
def q5_k_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q5_K_impl``."""
    x, quants, words, weights = float_rows(256), int_rows(256), int_rows(48), float_rows(256)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        load(weights, 256, importance, first, blocks, period)
        _q45_k_weighted(x, weights, 31, _FINE_5_TRIES, words, quants)
        _pack_fifth_bits(quants, words)
        _pack_nibbles(quants, words, 12)
        store(words, 176, out, 176, first, blocks)


@inline
def _q45_k(
    x: FloatRows, top: int, numerators: NDArray[np.float32], words: IntRows, quants: IntRows
) -> None:
    """Find scales, minimums and levels of eight sub-blocks; fill the first four words."""
    weights, scales, mins = float_rows(256), float_rows(8), float_rows(8)
    inverses, lows = float_rows(8), float_rows(8)
    scale_levels, min_levels = int_rows(8), int_rows(8)
    max_scale, max_min = floats(0.0), floats(0.0)
    for j in range(8):
        start = 32 * j
        sum_x2 = floats(0.0)
        for i in range(start, start + 32):
            sum_x2 += x[i] * x[i]
        average = root(sum_x2 / 32.0)
        for i in range(start, start + 32):
            weights[i] = average + magnitude(x[i])
    found = scales, mins, inverses, lows
    for j in range(0, 8, PAIR):
        scales_and_mins(x, weights, 32 * j, 32, top, numerators, False, found, j)
    for j in range(8):
        max_scale = select(scales[j] > max_scale, scales[j], max_scale)
        max_min = select(mins[j] > max_min, mins[j], max_min)
    inverse_scale = select(max_scale > 0.0, 63.0 / max_scale, 0.0)
    inverse_min = select(max_min > 0.0, 63.0 / max_min, 0.0)
    for j in range(8):
        scale_levels[j] = _byte_up_to_63(inverse_scale * scales[j])
        min_levels[j] = _byte_up_to_63(inverse_min * mins[j])
    d, m = to_half(max_scale / 63.0), to_half(max_min / 63.0)
    _finish(x, top, d, m, scale_levels, min_levels, inverses, lows, words, quants)


@inline
def _byte_up_to_63(x: Floats) -> Ints:
    byte = nearest(x) & 0xFF
    return select(byte > 63, 63, byte)


@inline
def _q45_k_weighted(
    x: FloatRows,
    weights: FloatRows,
    top: int,
    numerators: NDArray[np.float32],
    words: IntRows,
    quants: IntRows,
) -> None:
    """Do the same with an importance matrix, which ``weights`` holds at first."""
    scales, mins, totals = float_rows(8), float_rows(8), float_rows(8)
    inverses, lows = float_rows(8), float_rows(8)
    scale_levels, min_levels = int_rows(8), int_rows(8)
    sum_x2 = floats(0.0)
    for i in range(256):
        sum_x2 += x[i] * x[i]
    sigma2 = 2.0 * sum_x2 / 256.0
    for j in range(8):
        start, total = 32 * j, floats(0.0)
        for i in range(start, start + 32):
            weights[i] = weights[i] * root(sigma2 + x[i] * x[i])
            total += weights[i]
        totals[j] = total
    found = scales, mins, inverses, lows
    for j in range(0, 8, PAIR):
        scales_and_mins(x, weights, 32 * j, 32, top, numerators, False, found, j)
    d = to_half(positive_scale(scales, 8, totals, 63, _SCALE_6_TRIES, scale_levels))
    m = to_half(positive_scale(mins, 8, totals, 63, _SCALE_6_TRIES, min_levels))
    if top == 31:
        for j in range(8):
            scale_levels[j] = select(scale_levels[j] > 63, 63, scale_levels[j])
            min_levels[j] = select(min_levels[j] > 63, 63, min_levels[j])
    _finish(x, top, d, m, scale_levels, min_levels, inverses, lows, words, quants)


@inline
def _finish(
    x: FloatRows,
    top: int,
    d: Ints,
    m: Ints,
    scale_levels: IntRows,
    min_levels: IntRows,
    inverses: FloatRows,
    lows: FloatRows,
    words: IntRows,
    quants: IntRows,
) -> None:
    """Pack the scales as both formats do, and round the weights with the rounded scales."""
    words[0] = d | (m << 16)
    words[1], words[2], words[3] = ints(0), ints(0), ints(0)
    wide_d, wide_m = from_half(d), from_half(m)
    for j in range(4):
        scale, minimum = scale_levels[j], min_levels[j]
        scale_4, min_4 = scale_levels[j + 4], min_levels[j + 4]
        words[1] |= ((scale | ((scale_4 >> 4) << 6)) & 0xFF) << (8 * j)
        words[2] |= ((minimum | ((min_4 >> 4) << 6)) & 0xFF) << (8 * j)
        words[3] |= ((scale_4 & 0xF) | ((min_4 & 0xF) << 4)) << (8 * j)
    for j in range(8):
        # get_scale_min_k4
        shift = 8 * (j % 4)
        scale, minimum, both = words[1] >> shift, words[2] >> shift, words[3] >> shift
        if j < 4:
            scale, minimum = scale & 63, minimum & 63
        else:
            scale = (both & 0xF) | (((scale >> 6) & 3) << 4)
            minimum = ((both >> 4) & 0xF) | (((minimum >> 6) & 3) << 4)
        scaled_d, scaled_m = wide_d * as_floats(scale), wide_m * as_floats(minimum)
        _round(x, quants, 32 * j, 32, scaled_d, scaled_m, inverses[j], lows[j], top)


@inline
def _round(
    x: FloatRows,
    quants: IntRows,
    start: int,
    count: int,
    d: Floats,
    m: Floats,
    inverse: Floats,
    low: Floats,
    top: int,
) -> None:
    """Round weights with the rounded scale; where that is zero, keep the search's levels."""
    for i in range(start, start + count):
        quants[i] = between(nearest((x[i] + m) / d), 0, top)
    zero = d == 0.0
    if any_lane(zero):
        for i in range(start, start + count):
            quants[i] = select(zero, levels(x[i], inverse, low, top), quants[i])


@inline
def _pack_nibbles(quants: IntRows, words: IntRows, first: int) -> None:
    """Pack the low four bits: weights i and i + 32 of 64 in one byte."""
    for word in range(32):
        start = 64 * (word // 8) + 4 * (word % 8)
        packed = ints(0)
        for i in range(start, start + 4):
            byte = (quants[i] & 0xF) | ((quants[i + 32] & 0xF) << 4)
            packed |= byte << (8 * (i - start))
        words[first + word] = packed


@inline
def _pack_fifth_bits(quants: IntRows, words: IntRows) -> None:
    """Pack the fifth bits: bit j of byte i belongs to weight 32 * j + i."""
    for word in range(8):
        packed = ints(0)
        for i in range(4):
            for j in range(8):
                packed |= (quants[32 * j + 4 * word + i] >> 4) << (8 * i + j)
        words[4 + word] = packed


# ------------------------------------------------------------------------------ Q2_K


@kernel
def q2_k(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q2_K_ref``."""
    x, quants, words, weights = float_rows(256), int_rows(256), int_rows(32), float_rows(256)
    scales, mins, inverses, lows = float_rows(16), float_rows(16), float_rows(16), float_rows(16)
    found = scales, mins, inverses, lows
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        for i in range(256):
            weights[i] = magnitude(x[i])
        max_scale, max_min = floats(0.0), floats(0.0)
        for j in range(0, 16, PAIR):
            scales_and_mins(x, weights, 16 * j, 16, 3, _Q2_TRIES, True, found, j)
        for j in range(16):
            max_scale = select(scales[j] > max_scale, scales[j], max_scale)
            max_min = select(mins[j] > max_min, mins[j], max_min)
        some_scale, some_min = max_scale > 0.0, max_min > 0.0
        inverse_scale, inverse_min = 15.0 / max_scale, 15.0 / max_min
        for j in range(4):
            words[j] = ints(0)
        for j in range(16):
            scale = select(some_scale, nearest(inverse_scale * scales[j]) & 0xFF, 0)
            minimum = select(some_min, nearest(inverse_min * mins[j]) << 4, 0)
            words[j // 4] |= ((scale | minimum) & 0xFF) << (8 * (j % 4))
        d = to_half(select(some_scale, max_scale / 15.0, 0.0))
        m = to_half(select(some_min, max_min / 15.0, 0.0))
        _finish_q2_k(x, d, m, inverses, lows, words, quants)
        store(words, 84, out, 84, first, blocks)


@kernel
def q2_k_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q2_K_impl``."""
    x, quants, words, weights = float_rows(256), int_rows(256), int_rows(32), float_rows(256)
    scales, mins, inverses, lows = float_rows(16), float_rows(16), float_rows(16), float_rows(16)
    totals, scale_levels, min_levels = float_rows(16), int_rows(16), int_rows(16)
    found = scales, mins, inverses, lows
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        load(weights, 256, importance, first, blocks, period)
        sum_x2 = floats(0.0)
        for i in range(256):
            sum_x2 += x[i] * x[i]
        sigma2 = sum_x2 / 256.0
        for j in range(16):
            total = floats(0.0)
            for i in range(16 * j, 16 * j + 16):
                weights[i] = weights[i] * root(sigma2 + x[i] * x[i])
                total += weights[i]
            totals[j] = total
        for j in range(0, 16, PAIR):
            scales_and_mins(x, weights, 16 * j, 16, 3, _FINE_2_TRIES, False, found, j)
        d = to_half(positive_scale(scales, 16, totals, 15, _SCALE_4_TRIES, scale_levels))
        m = to_half(positive_scale(mins, 16, totals, 15, _SCALE_4_TRIES, min_levels))
        for j in range(4):
            words[j] = ints(0)
        for j in range(16):
            byte = (scale_levels[j] | (min_levels[j] << 4)) & 0xFF
            words[j // 4] |= byte << (8 * (j % 4))
        _finish_q2_k(x, d, m, inverses, lows, words, quants)
        store(words, 84, out, 84, first, blocks)


@inline
def _finish_q2_k(
    x: FloatRows,
    d: Ints,
    m: Ints,
    inverses: FloatRows,
    lows: FloatRows,
    words: IntRows,
    quants: IntRows,
) -> None:
    wide_d, wide_m = from_half(d), from_half(m)
    for j in range(16):
        both = words[j // 4] >> (8 * (j % 4))
        scaled_d = wide_d * as_floats(both & 0xF)
        scaled_m = wide_m * as_floats((both >> 4) & 0xF)
        _round(x, quants, 16 * j, 16, scaled_d, scaled_m, inverses[j], lows[j], 3)
    pack_pairs(quants, words, 4)
    words[20] = d | (m << 16)
