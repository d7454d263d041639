"""The two loops of a merge, compiled: W + scale · (B·A) in float64, and its rounding to F16.

Every operation is rounded to float64 by itself, in the order of the plain loops below: no fused
multiply-add, no other order of terms, so the same bits on every machine. numba is imported with
this module, which is imported when an adapter is merged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medllm_pack.compiling import cached, compiled
from medllm_pack.quant.kernels import widen

_STRIP = 256  # columns whose r rows of A stay in a core's cache


def _compiled(signature: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile a loop now, or load it from numba's cache."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        made: Callable[..., None] = compiled(cached(function), signature)
        return made

    return decorate


@_compiled("void(float64[:, ::1], float32[:, ::1], float64[:, ::1], float64[:, ::1], float64)")
def _add(
    out: NDArray[np.float64],
    weight: NDArray[np.float32],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    scale: float,
) -> None:
    rows, columns = weight.shape
    rank = a.shape[0]
    # Where a matrix lies, rows are a large power of two apart and push each other out of the cache.
    strip, sums = np.empty((rank, _STRIP)), np.empty((2, _STRIP))
    for left in range(0, columns, _STRIP):
        size = min(_STRIP, columns - left)
        for k in range(rank):
            source, target = a[k, left : left + size], strip[k, :size]
            for j in range(size):
                target[j] = source[j]
        # Two rows at a time, for which A is loaded once; the last may be done twice.
        for i in range(0, rows, 2):
            other = min(i + 1, rows - 1)
            # Slices from zero: LLVM sees that no index is negative, and vectorizes.
            total, total1, term = sums[0, :size], sums[1, :size], strip[0, :size]
            for j in range(size):
                total[j] = b[i, 0] * term[j]
                total1[j] = b[other, 0] * term[j]
            # Four terms while the sum is in a register, one after the other as everywhere.
            k = 1
            while k + 4 <= rank:
                b0, b1, b2, b3 = b[i, k], b[i, k + 1], b[i, k + 2], b[i, k + 3]
                c0, c1, c2, c3 = b[other, k], b[other, k + 1], b[other, k + 2], b[other, k + 3]
                a0, a1 = strip[k, :size], strip[k + 1, :size]
                a2, a3 = strip[k + 2, :size], strip[k + 3, :size]
                for j in range(size):
                    x0, x1, x2, x3 = a0[j], a1[j], a2[j], a3[j]
                    total[j] = (((total[j] + b0 * x0) + b1 * x1) + b2 * x2) + b3 * x3
                    total1[j] = (((total1[j] + c0 * x0) + c1 * x1) + c2 * x2) + c3 * x3
                k += 4
            while k < rank:
                term = strip[k, :size]
                for j in range(size):
                    total[j] += b[i, k] * term[j]
                    total1[j] += b[other, k] * term[j]
                k += 1
            for row, sum_ in ((i, total), (other, total1)):
                result, base = out[row, left : left + size], weight[row, left : left + size]
                for j in range(size):
                    result[j] = base[j] + scale * sum_[j]


@_compiled("void(uint16[::1], int64[::1], float64[::1])")
def _round(out: NDArray[np.uint16], bits: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """Round float64 to the bits of F16: to nearest, ties to even. NaN becomes infinite."""
    for i in range(out.size):
        magnitude = bits[i] & 0x7FFFFFFFFFFFFFFF
        sign = (bits[i] >> 48) & 0x8000
        # Normal halves: drop 42 bits of the fraction; an odd last bit makes a tie go up. The
        # exponent's bias goes from 1023 to 15, and a carry out of the fraction is the right one.
        odd = (magnitude >> 42) & 1
        normal = ((magnitude + 0x1FFFFFFFFFF + odd) >> 42) - (1008 << 10)
        # Below 2**-14 halves are whole multiples of 2**-24.
        small = np.int64(np.rint(min(abs(values[i]), 1.0) * 16777216.0))
        half = small if magnitude < (1009 << 52) else min(normal, 0x7C00)
        out[i] = np.uint16(sign | half)


def add_low_rank(
    weight: NDArray[np.float16] | NDArray[np.float32],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    scale: float,
) -> NDArray[np.float64]:
    """Return ``weight + scale · (b·a)`` in float64: (out, in) + scale · (out, r)·(r, in).

    The r products are added one after the other, k = 0 first, each step rounded to float64: the
    same bits on every machine, which a matrix product of a BLAS library does not promise.
    """
    out = np.empty(weight.shape, dtype=np.float64)
    if weight.dtype == np.float16:  # fifteen times as fast as numpy's, and exact
        wide = widen(weight.astype(np.float16, copy=False))
    else:
        wide = np.ascontiguousarray(weight, dtype=np.float32)
    _add(out, wide, np.ascontiguousarray(a), np.ascontiguousarray(b), scale)
    return out


def round_to_half(values: NDArray[np.float64]) -> NDArray[np.float16]:
    """Round float64 once to F16, to the nearest, ties to even; too large becomes infinite."""
    flat = np.ascontiguousarray(values).reshape(-1)
    out = np.empty(flat.size, dtype=np.uint16)
    _round(out, flat.view(np.int64), flat)
    return out.view(np.float16).reshape(values.shape)
