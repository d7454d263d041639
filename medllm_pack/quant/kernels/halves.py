"""F16 to F32 and back: a value in each lane.

The arguments are those of all kernels; only the addresses and the number of values mean something.
There must be ``WIDTH`` values at least: the last vector ends at the last value and overlaps the one
before it.
"""

from __future__ import annotations

from medllm_pack.quant.kernels.lanes import (
    WIDTH,
    kernel,
    load_floats,
    load_shorts,
    store_floats,
    store_shorts,
)
from medllm_pack.quant.kernels.search import from_half, to_half


@kernel
def widen_half(values: int, _importance: int, _period: int, out: int, count: int) -> None:
    """``ggml_fp16_to_fp32_row``."""
    for i in range(0, count, WIDTH):
        at = min(i, count - WIDTH)
        store_floats(from_half(load_shorts(values + 2 * at)), out + 4 * at)


@kernel
def narrow_to_half(values: int, _importance: int, _period: int, out: int, count: int) -> None:
    """``ggml_fp32_to_fp16_row``: to the nearest, ties to even."""
    for i in range(0, count, WIDTH):
        at = min(i, count - WIDTH)
        store_shorts(to_half(load_floats(values + 4 * at)), out + 2 * at)
