"""IQ4_NL and IQ4_XS: four bits that choose from sixteen values that are not evenly spread."""

from __future__ import annotations

import numpy as np

from medllm_pack.quant.kernels.lanes import (
    WIDTH,
    FloatRows,
    Floats,
    IntRows,
    Ints,
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
    between,
    largest_of,
    load,
    nearest,
    pack_bytes,
    store,
    to_half,
)

# kvalues_iq4nl
_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
# best_index_int8 takes the upper of two neighbours from half way on. Its differences are exact
# wherever they come near each other, so comparing with the half is the same.
_HALVES = (_VALUES[1:] + _VALUES[:-1]) / np.float32(2)
_TRIES = _VALUES[0] + np.arange(-7, 8, dtype=np.float32)


@kernel
def iq4_nl(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_iq4_nl`` without an importance matrix."""
    x, weights, quants = float_rows(32), float_rows(32), int_rows(32)
    packed, words = int_rows(20), int_rows(16)
    for first in range(0, blocks, WIDTH):
        load(x, 32, rows, first, blocks, blocks)
        for i in range(32):
            weights[i] = x[i] * x[i]
        _iq4_nl(x, weights, quants, packed, words)
        store(words, 18, out, 18, first, blocks)


@kernel
def iq4_nl_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_iq4_nl`` with an importance matrix."""
    x, weights, quants = float_rows(32), float_rows(32), int_rows(32)
    packed, words = int_rows(20), int_rows(16)
    for first in range(0, blocks, WIDTH):
        load(x, 32, rows, first, blocks, blocks)
        load(weights, 32, importance, first, blocks, period)
        _weigh(x, weights, 32)
        _iq4_nl(x, weights, quants, packed, words)
        store(words, 18, out, 18, first, blocks)


@inline
def _iq4_nl(
    x: FloatRows, weights: FloatRows, quants: IntRows, packed: IntRows, words: IntRows
) -> None:
    scale = _scale(x, weights, 0)
    inverse = select(scale != 0.0, 1.0 / scale, 0.0)
    d = to_half(scale)
    packed[0], packed[1] = d & 0xFF, d >> 8
    for i in range(32):
        quants[i] = _index(inverse * x[i])
    for i in range(16):
        packed[2 + i] = quants[i] | (quants[i + 16] << 4)
    packed[18], packed[19] = ints(0), ints(0)
    pack_bytes(packed, words, 5)


@kernel
def iq4_xs(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_iq4_xs`` without an importance matrix."""
    x, weights, quants, words = float_rows(256), float_rows(256), int_rows(256), int_rows(48)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        for i in range(256):
            weights[i] = x[i] * x[i]
        _iq4_xs(x, weights, quants, words)
        store(words, 136, out, 136, first, blocks)


@kernel
def iq4_xs_weighted(rows: int, importance: int, period: int, out: int, blocks: int) -> None:
    """``quantize_iq4_xs`` with an importance matrix."""
    x, weights, quants, words = float_rows(256), float_rows(256), int_rows(256), int_rows(48)
    for first in range(0, blocks, WIDTH):
        load(x, 256, rows, first, blocks, blocks)
        load(weights, 256, importance, first, blocks, period)
        _weigh(x, weights, 256)
        _iq4_xs(x, weights, quants, words)
        store(words, 136, out, 136, first, blocks)


@inline
def _iq4_xs(x: FloatRows, weights: FloatRows, quants: IntRows, words: IntRows) -> None:
    scales = float_rows(8)
    largest, extreme = floats(0.0), floats(0.0)
    for j in range(8):
        scales[j] = _scale(x, weights, 32 * j)
        size = magnitude(scales[j])
        larger = size > largest
        largest = select(larger, size, largest)
        extreme = select(larger, scales[j], extreme)
    d = -extreme / 32.0
    inverse = select(d != 0.0, 1.0 / d, 0.0)
    words[0] = to_half(d)
    words[1] = ints(0)
    for j in range(8):
        q = between(nearest(inverse * scales[j]), -32, 31)
        scaled = d * as_floats(q)
        scaled_inverse = select(scaled != 0.0, 1.0 / scaled, 0.0)
        for i in range(32 * j, 32 * j + 32):
            quants[i] = _index(scaled_inverse * x[i])
        q += 32
        words[0] |= (q >> 4) << (16 + 2 * j)
        words[1] |= (q & 0xF) << (4 * j)
    for word in range(32):
        start = 32 * (word // 4) + 4 * (word % 4)
        packed = ints(0)
        for i in range(4):
            packed |= (quants[start + i] | (quants[start + i + 16] << 4)) << (8 * i)
        words[2 + word] = packed


@inline
def _weigh(x: FloatRows, weights: FloatRows, count: int) -> None:
    sigma2 = floats(0.0)
    for i in range(count):
        sigma2 += x[i] * x[i]
    sigma2 *= 2.0 / count
    for i in range(count):
        weights[i] = weights[i] * root(sigma2 + x[i] * x[i])


@inline
def _scale(x: FloatRows, weights: FloatRows, start: int) -> Floats:
    """Return the scale of 32 weights: the search of ``quantize_row_iq4_nl_impl``."""
    largest, extreme = largest_of(x, start, 32)
    inverse = 1.0 / (-extreme / _VALUES[0])
    sum_qx, sum_q2 = _sums(x, weights, start, inverse)
    scale = select(sum_q2 > 0.0, sum_qx / sum_q2, 0.0)
    best = scale * sum_qx
    for k in range(_TRIES.size):
        sum_qx, sum_q2 = _sums(x, weights, start, _TRIES[k] / extreme)
        better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best * sum_q2)
        this_scale = sum_qx / sum_q2
        scale = select(better, this_scale, scale)
        best = select(better, this_scale * sum_qx, best)
    return select(largest < GROUP_MAX_EPS, 0.0, scale)


@inline
def _sums(x: FloatRows, weights: FloatRows, start: int, inverse: Floats) -> tuple[Floats, Floats]:
    sum_qx, sum_q2 = floats(0.0), floats(0.0)
    for i in range(start, start + 32):
        scaled = inverse * x[i]
        q = floats(_VALUES[0])
        for k in range(15):
            q = select(scaled < _HALVES[k], q, _VALUES[k + 1])
        wq = weights[i] * q
        sum_qx += wq * x[i]
        sum_q2 += wq * q
    return sum_qx, sum_q2


@inline
def _index(x: Floats) -> Ints:
    """``best_index_int8``: NaN ends at the last value, as there."""
    index = ints(0)
    for k in range(15):
        index = select(x < _HALVES[k], index, k + 1)
    return index
