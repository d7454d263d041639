"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights.

Without an importance matrix a lane has a block. With one it has a row, because the mean square of
the whole row goes into the weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medllm_pack.quant.kernels.lanes import (
    WIDTH,
    FloatRows,
    Floats,
    IntRows,
    Ints,
    bits_of,
    float_rows,
    floats,
    from_bits,
    inline,
    int_rows,
    ints,
    kernel,
    magnitude,
    root,
    select,
    spread,
    transpose_in,
    truncated,
)
from medllm_pack.quant.kernels.pairs import PAIR, levels, scales_and_mins
from medllm_pack.quant.kernels.search import (
    as_int8,
    largest_of,
    load,
    pack_bytes,
    scale_tries,
    signed_levels,
    signed_scale,
    store,
    to_half,
    tries,
)

_FLT_MAX = float(np.finfo(np.float32).max)
# With an importance matrix.
_Q4_0_TRIES = scale_tries(9, 8, -1)
_Q5_0_TRIES = scale_tries(9, 16, -1)
_Q4_1_TRIES = tries(-0.9, 0.05, 37, 15)
_Q5_1_TRIES = tries(-0.9, 0.05, 37, 31)


@kernel
def q8_0(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q8_0_ref``; ggml has no use for an importance matrix here."""
    x, packed, words = float_rows(32), int_rows(36), int_rows(16)
    packed[34], packed[35] = ints(0), ints(0)
    for first in range(0, blocks, WIDTH):
        load(x, 32, rows, first, blocks, blocks)
        largest = floats(0.0)
        for i in range(32):
            size = magnitude(x[i])
            largest = select(largest > size, largest, size)
        scale = largest / 127.0
        inverse = _inverse(scale)
        d = to_half(scale)
        packed[0], packed[1] = d & 0xFF, d >> 8
        for i in range(32):
            packed[2 + i] = _rounded(inverse * x[i]) & 0xFF
        pack_bytes(packed, words, 9)
        store(words, 34, out, 34, first, blocks)


@inline
def _rounded(x: Floats) -> Ints:
    """``(int) roundf(x)``: ties away from zero, by adding the float before 0.5 to the magnitude."""
    return truncated(x + from_bits((bits_of(x) & 0x80000000) | 0x3EFFFFFF))


@inline
def _inverse(scale: Floats) -> Floats:
    return select(scale != 0.0, 1.0 / scale, 0.0)


@kernel
def q4_0(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q4_0_ref``."""
    x, quants, packed, words = float_rows(32), int_rows(32), int_rows(24), int_rows(16)
    for first in range(0, blocks, WIDTH):
        load(x, 32, rows, first, blocks, blocks)
        _, extreme = largest_of(x, 0, 32)
        scale = extreme / -8.0
        inverse = _inverse(scale)
        for i in range(32):
            quants[i] = _byte_up_to(15, x[i] * inverse + 8.5)
        _pack_4(to_half(scale), quants, packed, words)
        store(words, 18, out, 18, first, blocks)


@inline
def _byte_up_to(top: int, x: Floats) -> Ints:
    """``(uint8_t) MIN(top, (int8_t) x)``."""
    q = as_int8(truncated(x))
    return select(q > top, top, q) & 0xFF


@kernel
def q5_0(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q5_0_ref``."""
    x, quants, packed, words = float_rows(32), int_rows(32), int_rows(24), int_rows(16)
    for first in range(0, blocks, WIDTH):
        load(x, 32, rows, first, blocks, blocks)
        _, extreme = largest_of(x, 0, 32)
        scale = extreme / -16.0
        inverse = _inverse(scale)
        for i in range(32):
            quants[i] = _byte_up_to(31, x[i] * inverse + 16.5)
        _pack_5(to_half(scale), quants, packed, words)
        store(words, 22, out, 22, first, blocks)


@kernel
def q4_1(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q4_1_ref``."""
    x, quants, packed, words = float_rows(32), int_rows(32), int_rows(24), int_rows(16)
    for first in range(0, blocks, WIDTH):
        load(x, 32, rows, first, blocks, blocks)
        low, scale = _range(x, 15)
        inverse = _inverse(scale)
        for i in range(32):
            quants[i] = _byte_up_to(15, (x[i] - low) * inverse + 0.5)
        _pack_4_min(to_half(scale), to_half(low), quants, packed, words)
        store(words, 20, out, 20, first, blocks)


@kernel
def q5_1(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q5_1_ref``."""
    x, quants, packed, words = float_rows(32), int_rows(32), int_rows(24), int_rows(16)
    for first in range(0, blocks, WIDTH):
        load(x, 32, rows, first, blocks, blocks)
        low, scale = _range(x, 31)
        inverse = _inverse(scale)
        for i in range(32):
            quants[i] = truncated((x[i] - low) * inverse + 0.5) & 0xFF
        _pack_5_min(to_half(scale), to_half(low), quants, packed, words)
        store(words, 24, out, 24, first, blocks)


@inline
def _range(x: FloatRows, top: int) -> tuple[Floats, Floats]:
    low, high = floats(_FLT_MAX), floats(-_FLT_MAX)
    for i in range(32):
        low = select(x[i] < low, x[i], low)
        high = select(x[i] > high, x[i], high)
    return low, (high - low) / float(top)


# ------------------------------------------------------------------------------ packing


@inline
def _pack_4(d: Ints, quants: IntRows, packed: IntRows, words: IntRows) -> None:
    packed[0], packed[1] = d & 0xFF, d >> 8
    for i in range(16):
        packed[2 + i] = (quants[i] | (quants[i + 16] << 4)) & 0xFF
    packed[18], packed[19] = ints(0), ints(0)
    pack_bytes(packed, words, 5)


@inline
def _pack_4_min(d: Ints, m: Ints, quants: IntRows, packed: IntRows, words: IntRows) -> None:
    packed[0], packed[1], packed[2], packed[3] = d & 0xFF, d >> 8, m & 0xFF, m >> 8
    for i in range(16):
        packed[4 + i] = (quants[i] | (quants[i + 16] << 4)) & 0xFF
    pack_bytes(packed, words, 5)


@inline
def _pack_5(d: Ints, quants: IntRows, packed: IntRows, words: IntRows) -> None:
    packed[0], packed[1] = d & 0xFF, d >> 8
    _pack_low_and_fifth(quants, packed, 2)
    packed[22], packed[23] = ints(0), ints(0)
    pack_bytes(packed, words, 6)


@inline
def _pack_5_min(d: Ints, m: Ints, quants: IntRows, packed: IntRows, words: IntRows) -> None:
    packed[0], packed[1], packed[2], packed[3] = d & 0xFF, d >> 8, m & 0xFF, m >> 8
    _pack_low_and_fifth(quants, packed, 4)
    pack_bytes(packed, words, 6)


@inline
def _pack_low_and_fifth(quants: IntRows, packed: IntRows, at: int) -> None:
    for j in range(4):
        fifth = ints(0)
        for i in range(8):
            fifth |= ((quants[8 * j + i] >> 4) & 1) << i
        packed[at + j] = fifth
    for i in range(16):
        packed[at + 4 + i] = (quants[i] & 0xF) | ((quants[i + 16] & 0xF) << 4)


# ------------------------------------------------------------------------------ with importance


@inline
def _mean_square(x: FloatRows, rows: int, columns: int, first: int, count: int) -> Floats:
    """Return the mean square of whole rows, a row to a lane."""
    total = floats(0.0)
    for start in range(0, columns, WIDTH):
        transpose_in(x, 0, rows + 4 * start, 4 * columns, first, count - 1, count)
        for i in range(WIDTH):
            total += x[i] * x[i]
    return total / columns


@inline
def _load_weighted(
    x: FloatRows,
    weights: FloatRows,
    at: int,
    sigma2: Floats,
    rows: int,
    importance: int,
    columns: int,
    start: int,
    first: int,
    count: int,
) -> None:
    """Load 32 columns of ``WIDTH`` rows, and their weights."""
    for i in range(0, 32, WIDTH):
        place = rows + 4 * (start + i)
        transpose_in(x, at + i, place, 4 * columns, first, count - 1, count)
    for i in range(32):
        value = x[at + i]
        weights[at + i] = spread(importance + 4 * (start + i)) * root(sigma2 + value * value)


@inline
def _signed(
    x: FloatRows, weights: FloatRows, quants: IntRows, top: int, numerators: NDArray[np.float32]
) -> Ints:
    scale, inverse = signed_scale(x, weights, 0, 32, top, numerators, True)
    signed_levels(x, 0, 32, inverse, top, quants)
    return to_half(scale)


@inline
def _load_pair(
    x: FloatRows,
    weights: FloatRows,
    sigma2: Floats,
    rows: int,
    importance: int,
    columns: int,
    j: int,
    first: int,
    count: int,
) -> None:
    """Load blocks ``j`` and ``j`` + 1 of ``WIDTH`` rows; the last one twice if it is alone."""
    for s in range(PAIR):
        start = 32 * min(j + s, columns // 32 - 1)
        _load_weighted(x, weights, 32 * s, sigma2, rows, importance, columns, start, first, count)


@inline
def _with_min(
    x: FloatRows, quants: IntRows, top: int, found: tuple[FloatRows, ...], s: int
) -> tuple[Ints, Ints]:
    """Fill in the levels of a block; return the scale and the minimum as halves."""
    scales, mins, inverses, lows = found
    for i in range(32):
        quants[i] = levels(x[32 * s + i], inverses[s], lows[s], top)
    return to_half(scales[s]), to_half(-mins[s])


@kernel
def q4_0_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q4_0_impl``."""
    x, weights, quants = float_rows(32), float_rows(32), int_rows(32)
    packed, words = int_rows(24), int_rows(16)
    count, columns = blocks // period, 32 * period
    for first in range(0, count, WIDTH):
        sigma2 = _mean_square(x, rows, columns, first, count)
        for j in range(period):
            _load_weighted(x, weights, 0, sigma2, rows, importance, columns, 32 * j, first, count)
            d = _signed(x, weights, quants, 8, _Q4_0_TRIES)
            _pack_4(d, quants, packed, words)
            store(words, 18, out + 18 * j, 18 * period, first, count)


@kernel
def q5_0_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q5_0_impl``."""
    x, weights, quants = float_rows(32), float_rows(32), int_rows(32)
    packed, words = int_rows(24), int_rows(16)
    count, columns = blocks // period, 32 * period
    for first in range(0, count, WIDTH):
        sigma2 = _mean_square(x, rows, columns, first, count)
        for j in range(period):
            _load_weighted(x, weights, 0, sigma2, rows, importance, columns, 32 * j, first, count)
            d = _signed(x, weights, quants, 16, _Q5_0_TRIES)
            _pack_5(d, quants, packed, words)
            store(words, 22, out + 22 * j, 22 * period, first, count)


@kernel
def q4_1_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q4_1_impl``."""
    x, weights, quants = float_rows(64), float_rows(64), int_rows(32)
    packed, words = int_rows(24), int_rows(16)
    found = float_rows(2), float_rows(2), float_rows(2), float_rows(2)
    count, columns = blocks // period, 32 * period
    for first in range(0, count, WIDTH):
        sigma2 = _mean_square(x, rows, columns, first, count)
        for j in range(0, period, PAIR):
            _load_pair(x, weights, sigma2, rows, importance, columns, j, first, count)
            scales_and_mins(x, weights, 0, 32, 15, _Q4_1_TRIES, False, found, 0)
            for s in range(min(PAIR, period - j)):
                d, m = _with_min(x, quants, 15, found, s)
                _pack_4_min(d, m, quants, packed, words)
                store(words, 20, out + 20 * (j + s), 20 * period, first, count)


@kernel
def q5_1_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_row_q5_1_impl``."""
    x, weights, quants = float_rows(64), float_rows(64), int_rows(32)
    packed, words = int_rows(24), int_rows(16)
    found = float_rows(2), float_rows(2), float_rows(2), float_rows(2)
    count, columns = blocks // period, 32 * period
    for first in range(0, count, WIDTH):
        sigma2 = _mean_square(x, rows, columns, first, count)
        for j in range(0, period, PAIR):
            _load_pair(x, weights, sigma2, rows, importance, columns, j, first, count)
            scales_and_mins(x, weights, 0, 32, 31, _Q5_1_TRIES, False, found, 0)
            for s in range(min(PAIR, period - j)):
                d, m = _with_min(x, quants, 31, found, s)
                _pack_5_min(d, m, quants, packed, words)
                store(words, 24, out + 24 * (j + s), 24 * period, first, count)
