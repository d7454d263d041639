"""Q3_K and Q6_K: super-blocks of sub-blocks that have a scale each, and no minimum."""

from __future__ import annotations

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
from medllm_pack.quant.kernels.search import (
    GROUP_MAX_EPS,
    as_int8,
    between,
    from_half,
    largest_of,
    level,
    load,
    nearest,
    pack_pairs,
    scale_tries,
    signed_levels,
    signed_scale,
    store,
    to_half,
)

_Q6_TRIES = scale_tries(9, 32, -1)
_Q3_TRIES = scale_tries(9, 4, -1)

# ------------------------------------------------------------------------------ Q6_K


@kernel
def q6_k(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q6_K_ref``."""
    x, quants, words, weights = float_rows(256), int_rows(256), int_rows(64), float_rows(256)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        for i in range(256):
            weights[i] = x[i] * x[i]
        _q6_k(x, weights, quants, words)
        store(words, 210, out, 210, first, blocks)


@kernel
def q6_k_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q6_K_impl``."""
    x, quants, words, weights = float_rows(256), int_rows(256), int_rows(64), float_rows(256)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        load(weights, 256, importance, first, blocks, period)
        _q6_k(x, weights, quants, words)
        store(words, 210, out, 210, first, blocks)


@inline
def _q6_k(x: FloatRows, weights: FloatRows, quants: IntRows, words: IntRows) -> None:
    scales, inverses = float_rows(16), float_rows(16)
    largest, extreme = floats(0.0), floats(0.0)
    for j in range(16):
        scale, inverse = signed_scale(x, weights, 16 * j, 16, 32, _Q6_TRIES, True)
        scales[j], inverses[j] = scale, inverse
        size = magnitude(scale)
        larger = size > largest
        largest = select(larger, size, largest)
        extreme = select(larger, scale, extreme)
    inverse = -128.0 / extreme
    d = to_half(1.0 / inverse)
    wide_d = from_half(d)
    for j in range(4):
        words[48 + j] = ints(0)
    for j in range(16):
        q = nearest(inverse * scales[j])
        scale_byte = select(q > 127, 127, q) & 0xFF
        words[48 + j // 4] |= scale_byte << (8 * (j % 4))
        _round(x, quants, j, wide_d * as_floats(as_int8(scale_byte)), inverses[j], 32)
    for half in range(2):
        for word in range(8):
            low, high, upper = ints(0), ints(0), ints(0)
            for i in range(4):
                at = 128 * half + 4 * word + i
                a, b, c, d_ = quants[at], quants[at + 32], quants[at + 64], quants[at + 96]
                low |= ((a & 0xF) | ((c & 0xF) << 4)) << (8 * i)
                high |= ((b & 0xF) | ((d_ & 0xF) << 4)) << (8 * i)
                top_bits = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d_ >> 4) << 6)
                upper |= top_bits << (8 * i)
            words[16 * half + word] = low
            words[16 * half + 8 + word] = high
            words[32 + 8 * half + word] = upper
    words[52] = d
    empty = largest < GROUP_MAX_EPS
    if any_lane(empty):
        for i in range(53):
            words[i] = select(empty, 0, words[i])


@inline
def _round(x: FloatRows, quants: IntRows, j: int, d: Floats, inverse: Floats, top: int) -> None:
    """Round 16 weights with the rounded scale; where that is zero, keep the search's levels."""
    for i in range(16 * j, 16 * j + 16):
        quants[i] = between(nearest(x[i] / d), -top, top - 1) + top
    zero = d == 0.0
    if any_lane(zero):
        found = int_rows(16)
        signed_levels(x, 16 * j, 16, inverse, top, found)
        for i in range(16):
            quants[16 * j + i] = select(zero, found[i], quants[16 * j + i])


# ------------------------------------------------------------------------------ Q3_K


@kernel
def q3_k(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q3_K_ref``."""
    x, quants, words, scales = float_rows(256), int_rows(256), int_rows(32), float_rows(16)
    scale_levels, found = int_rows(16), int_rows(16)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        largest, extreme = floats(0.0), floats(0.0)
        for j in range(16):
            scale = _descend(x, quants, 16 * j)
            scales[j] = scale
            size = magnitude(scale)
            larger = size > largest
            largest = select(larger, size, largest)
            extreme = select(larger, scale, extreme)
        inverse = -32.0 / extreme
        some = extreme != 0.0
        for j in range(16):
            q = between(as_int8(nearest(inverse * scales[j])), -32, 31) + 32
            scale_levels[j] = select(some, q, 0)
        d = select(some, to_half(1.0 / inverse), 0)
        wide_d = from_half(d)
        for j in range(16):
            scaled_d = wide_d * as_floats(scale_levels[j] - 32)
            zero = scaled_d == 0.0
            for i in range(16):
                found[i] = quants[16 * j + i]
            for i in range(16):
                q = between(nearest(x[16 * j + i] / scaled_d), -4, 3) + 4
                quants[16 * j + i] = select(zero, found[i], q)
        _pack_q3_k(d, scale_levels, quants, words)
        store(words, 110, out, 110, first, blocks)


@inline
def _descend(x: FloatRows, quants: IntRows, start: int) -> Floats:
    """``make_q3_quants``: fill the levels, counted from 0, and return the scale."""
    top = 4
    weights, weighted, found = float_rows(16), float_rows(16), float_rows(16)
    largest, extreme = largest_of(x, start, 16)
    inverse = float(-top) / extreme
    sum_lx, sum_l2 = floats(0.0), floats(0.0)
    for i in range(16):
        value = x[start + i]
        q = level(inverse * value, -top, top - 1)
        found[i] = q
        w = value * value
        weights[i] = w
        weighted[i] = w * value
        sum_lx += weighted[i] * q
        sum_l2 += w * q * q
    for _ in range(5):
        changed = False
        for i in range(16):
            w, old = weights[i], found[i]
            lx = sum_lx - weighted[i] * old
            l2 = sum_l2 - w * old * old
            q = level(x[start + i] * l2 / lx, -top, top - 1)
            moved = (lx > 0.0) & (q != old)
            if any_lane(moved):
                lx += weighted[i] * q
                l2 += w * q * q
                gain = lx * lx * sum_l2 > sum_lx * sum_lx * l2
                better = moved & (l2 > 0.0) & gain
                found[i] = select(better, q, old)
                sum_lx = select(better, lx, sum_lx)
                sum_l2 = select(better, l2, sum_l2)
                changed |= any_lane(better)
        if not changed:
            break
    empty = largest < GROUP_MAX_EPS
    for i in range(16):
        quants[start + i] = select(empty, 0, nearest(found[i]) + top)
    return select(empty | ~(sum_l2 > 0.0), 0.0, sum_lx / sum_l2)


@kernel
def q3_k_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q3_K_impl``."""
    x, quants, words, scales = float_rows(256), int_rows(256), int_rows(32), float_rows(16)
    scale_levels, inverses, weights = int_rows(16), float_rows(16), float_rows(256)
    totals = float_rows(16)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        load(weights, 256, importance, first, blocks, period)
        sum_x2 = floats(0.0)
        for i in range(256):
            sum_x2 += x[i] * x[i]
        sigma2 = 2.0 * sum_x2 / 256.0
        for i in range(256):
            weights[i] = weights[i] * root(sigma2 + x[i] * x[i])
        for j in range(16):
            total = floats(0.0)
            for i in range(16):
                total += weights[16 * j + i]
            totals[j] = total
            scales[j], inverses[j] = signed_scale(x, weights, 16 * j, 16, 4, _Q3_TRIES, True)
        scale, inverse = signed_scale(scales, totals, 0, 16, 32, _Q6_TRIES, False)
        d = to_half(scale)
        wide_d = from_half(d)
        signed_levels(scales, 0, 16, inverse, 32, scale_levels)
        for j in range(16):
            _round(x, quants, j, wide_d * as_floats(scale_levels[j] - 32), inverses[j], 4)
        _pack_q3_k(d, scale_levels, quants, words)
        store(words, 110, out, 110, first, blocks)


@inline
def _pack_q3_k(d: Ints, scale_levels: IntRows, quants: IntRows, words: IntRows) -> None:
    for word in range(8):
        packed = ints(0)
        for i in range(4):
            for j in range(8):
                packed |= (quants[32 * j + 4 * word + i] >> 2) << (8 * i + j)
        words[word] = packed
    pack_pairs(quants, words, 8)
    for word in range(24, 27):
        words[word] = ints(0)
    for j in range(8):
        both = (scale_levels[j] & 0xF) | ((scale_levels[j + 8] & 0xF) << 4)
        words[24 + j // 4] |= both << (8 * (j % 4))
    for j in range(16):
        words[26] |= (scale_levels[j] >> 4) << (8 * (j % 4) + 2 * (j // 4))
    words[27] = d
