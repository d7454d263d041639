"""The searches of ggml-quants.c that several formats share, one block or sub-block to a lane.

Each function names the C function whose operations it repeats. Where that one keeps the levels of
the best try in an array, these keep the scale that they came from: the levels are needed only if
the rounded scale of a sub-block turns out to be zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medllm_pack.quant.kernels.lanes import (
    STAGE_ROWS,
    WIDTH,
    FloatRows,
    Floats,
    IntRows,
    Ints,
    any_lane,
    as_floats,
    bits_of,
    copy_lane,
    float_rows,
    floats,
    from_bits,
    inline,
    int_rows,
    ints,
    magnitude,
    rounded,
    select,
    transpose_in,
    transpose_out,
)

GROUP_MAX_EPS = np.float32(1e-15)  # ggml-quants.c: a block below this is all zero
_MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest whole number in the low bits
_MAGIC_BITS = 0x4B400000
_MANTISSA = 0x7FFFFF


def tries(start: float, step: float, count: int, top: int) -> NDArray[np.float32]:
    """Return the numerators that a search tries: ``start + step * i + top``, in float32."""
    steps = np.arange(count, dtype=np.float32)
    return np.float32(start) + np.float32(step) * steps + np.float32(top)


def scale_tries(span: int, top: int, sign: int = 1) -> NDArray[np.float32]:
    """Return ``sign * (top + 0.1f * i)`` for i from -span to span, without 0."""
    steps = np.array([i for i in range(-span, span + 1) if i], dtype=np.float32)
    return np.float32(sign) * (np.float32(0.1) * steps + np.float32(top))


@inline
def nearest(x: Floats) -> Ints:
    """``nearest_int``, with what it gives for values that are too large for it."""
    return (bits_of(x + _MAGIC) & _MANTISSA) - 0x400000


@inline
def between(x: Ints, low: int, high: int) -> Ints:
    """``MAX(low, MIN(high, x))``."""
    x = select(x > high, high, x)
    return select(x < low, low, x)


@inline
def as_int8(x: Ints) -> Ints:
    """``(int8_t) x``."""
    byte = x & 0xFF
    return select(byte > 127, byte - 256, byte)


@inline
def level(x: Floats, low: int, high: int) -> Floats:
    """``(float) MAX(low, MIN(high, nearest_int(x)))``, without leaving the bits of the sum."""
    bits = (bits_of(x + _MAGIC) & _MANTISSA) | 0x4B000000
    return from_bits(between(bits, _MAGIC_BITS + low, _MAGIC_BITS + high)) - _MAGIC


@inline
def tame_level(x: Floats, low: int, high: int) -> Floats:
    """:func:`level` of what is below 2**22 in size; there, clamping may come before rounding."""
    x = select(x > float(low), x, float(low))
    return rounded(select(x < float(high), x, float(high)))


@inline
def to_half(x: Floats) -> Ints:
    """``GGML_FP32_TO_FP16``: the 16 bits of the nearest half, ties to even."""
    base = (magnitude(x) * 2.0**112) * 2.0**-110
    bits = bits_of(x)
    exponent = bits & 0x7F800000
    exponent = select(exponent < 0x38800000, 0x38800000, exponent)
    rounded = bits_of(from_bits(exponent + 0x07800000) + base)
    half = ((rounded >> 13) & 0x7C00) + (rounded & 0x0FFF)
    return ((bits >> 16) & 0x8000) | select(x != x, 0x7E00, half)


@inline
def from_half(half: Ints) -> Floats:
    """``GGML_FP16_TO_FP32``."""
    plain = half & 0x7FFF
    normal = from_bits((plain << 13) + 0x70000000) * 2.0**-112
    small = from_bits(plain | 0x3F000000) - 0.5
    return from_bits(((half & 0x8000) << 16) | bits_of(select(plain < 0x400, small, normal)))


@inline
def load(rows: FloatRows, count: int, address: int, first: int, blocks: int, period: int) -> None:
    """Fill ``count`` rows with the weights of the next blocks, a block to a lane.

    Lanes behind the last block get a copy of it. ``period`` is the number of blocks after which
    the input begins again: that of one row for an importance matrix.
    """
    for i in range(0, count, WIDTH):
        transpose_in(rows, i, address + 4 * i, 4 * count, first, blocks - 1, period)


@inline
def store(words: IntRows, size: int, out: int, stride: int, first: int, blocks: int) -> None:
    """Write ``size`` bytes of words for each lane that has a block, ``stride`` bytes apart."""
    stage = int_rows(STAGE_ROWS)
    for i in range(0, (size + 3) // 4, WIDTH):
        transpose_out(words, i, stage)
    for lane in range(min(WIDTH, blocks - first)):
        copy_lane(stage, lane, out + (first + lane) * stride, size)


@inline
def signed_scale(
    x: FloatRows,
    weights: FloatRows,
    start: int,
    count: int,
    top: int,
    numerators: NDArray[np.float32],
    tame: bool,
) -> tuple[Floats, Floats]:
    """``make_qx_quants`` with its weights given, or x squared as ``rmse_type`` 1 says.

    ``tame`` says that x is finite. No level is wild then: the inverse scale times the largest is
    about ``top``, and a block whose largest is too small for that is all zero in the end.

    Returns:
        The scale; the inverse scale of the best levels.
    """
    weighted = float_rows(32)
    largest, extreme = largest_of(x, start, count)
    inverse = float(-top) / extreme
    sum_lx, sum_l2 = floats(0.0), floats(0.0)
    for i in range(count):
        value, w = x[start + i], weights[start + i]
        scaled = inverse * value
        q = tame_level(scaled, -top, top - 1) if tame else level(scaled, -top, top - 1)
        weighted[i] = w * value
        sum_lx += weighted[i] * q
        sum_l2 += w * q * q
    scale = select(sum_l2 != 0.0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    best_inverse = inverse
    for k in range(numerators.size):
        inverse = numerators[k] / extreme
        sum_lx, sum_l2 = floats(0.0), floats(0.0)
        for i in range(count):
            scaled = inverse * x[start + i]
            q = tame_level(scaled, -top, top - 1) if tame else level(scaled, -top, top - 1)
            sum_lx += weighted[i] * q
            sum_l2 += weights[start + i] * q * q
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        this_scale = sum_lx / sum_l2
        best = select(better, this_scale * sum_lx, best)
        scale = select(better, this_scale, scale)
        best_inverse = select(better, inverse, best_inverse)
    return select(largest < GROUP_MAX_EPS, 0.0, scale), best_inverse


@inline
def signed_levels(
    x: FloatRows, start: int, count: int, inverse: Floats, top: int, found: IntRows
) -> None:
    """Fill in the levels, counted from 0, for what :func:`signed_scale` found."""
    largest, _ = largest_of(x, start, count)
    empty = largest < GROUP_MAX_EPS
    for i in range(count):
        q = between(nearest(inverse * x[start + i]), -top, top - 1) + top
        found[i] = select(empty, 0, q)


@inline
def largest_of(x: FloatRows, start: int, count: int) -> tuple[Floats, Floats]:
    """Return the largest magnitude, and the first value that has it."""
    largest, extreme = floats(0.0), floats(0.0)
    for i in range(count):
        size = magnitude(x[start + i])
        larger = size > largest
        largest = select(larger, size, largest)
        extreme = select(larger, x[start + i], extreme)
    return largest, extreme


@inline
def positive_scale(
    x: FloatRows,
    count: int,
    weights: FloatRows,
    top: int,
    numerators: NDArray[np.float32],
    found: IntRows,
) -> Floats:
    """``make_qp_quants``: fill ``found`` with levels, which are bytes, and return the scale."""
    largest = floats(0.0)
    for i in range(count):
        largest = select(largest > x[i], largest, x[i])
    inverse = float(top) / largest
    scale = 1.0 / inverse
    best = floats(0.0)
    for i in range(count):
        diff = x[i] - scale * as_floats(nearest(inverse * x[i]) & 0xFF)
        best += weights[i] * diff * diff
    for k in range(numerators.size):
        this_inverse = numerators[k] / largest
        scale = 1.0 / this_inverse
        error = floats(0.0)
        for i in range(count):
            q = nearest(this_inverse * x[i])
            diff = x[i] - scale * as_floats(select(q > top, top, q))
            error += weights[i] * diff * diff
        better = error < best
        best = select(better, error, best)
        inverse = select(better, this_inverse, inverse)
    sum_lx, sum_l2 = floats(0.0), floats(0.0)
    for i in range(count):
        q = nearest(inverse * x[i])
        q = select(q > top, top, q)
        found[i] = q & 0xFF
        wide = as_floats(q)
        sum_lx += weights[i] * x[i] * wide
        sum_l2 += weights[i] * wide * wide
    for _ in range(5):
        changed = False
        for i in range(count):
            w, old = weights[i], as_floats(found[i])
            lx = sum_lx - w * x[i] * old
            l2 = sum_l2 - w * old * old
            q = nearest(x[i] * l2 / lx)
            q = select(q > top, top, q)
            moved = (lx > 0.0) & (l2 > 0.0) & (q != found[i])
            if any_lane(moved):
                wide = as_floats(q)
                lx += w * x[i] * wide
                l2 += w * wide * wide
                better = moved & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
                found[i] = select(better, q & 0xFF, found[i])
                sum_lx = select(better, lx, sum_lx)
                sum_l2 = select(better, l2, sum_l2)
                changed |= any_lane(better)
        if not changed:
            break
    empty = largest < GROUP_MAX_EPS
    for i in range(count):
        found[i] = select(empty, 0, found[i])
    return select(empty | ~(sum_l2 > 0.0), 0.0, sum_lx / sum_l2)


@inline
def pack_pairs(quants: IntRows, words: IntRows, first: int) -> None:
    """Pack the low two bits: weights i, i + 32, i + 64 and i + 96 of 128 in one byte."""
    for word in range(16):
        start = 128 * (word // 8) + 4 * (word % 8)
        packed = ints(0)
        for i in range(4):
            for j in range(4):
                packed |= (quants[start + i + 32 * j] & 3) << (8 * i + 2 * j)
        words[first + word] = packed


@inline
def pack_bytes(packed: IntRows, words: IntRows, count: int) -> None:
    """Make ``count`` words of four bytes each."""
    for word in range(count):
        low = packed[4 * word] | (packed[4 * word + 1] << 8)
        words[word] = low | (packed[4 * word + 2] << 16) | (packed[4 * word + 3] << 24)
