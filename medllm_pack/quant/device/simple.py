"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 without an importance matrix: blocks of 32 weights.

With one, the mean square of a whole row goes into the weights: thousands of additions one after the
other for a few positions, which is no work for a GPU. Shapes are (32, blocks) in and (bytes of a
block, blocks) out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medllm_pack.quant.device.arithmetic import (
    as_int8,
    half_bytes,
    inverse_of,
    largest_of,
    quotient,
    to_half,
    truncated,
)

_FLT_MAX = float(np.finfo(np.float32).max)


def q8_0(x: Tensor, _importance: Tensor | None) -> Tensor:
    """``quantize_row_q8_0_ref``; ggml has no use for an importance matrix here."""
    largest = torch.zeros_like(x[0])
    for size in x.abs().unbind():
        largest = torch.where(largest > size, largest, size)
    scale = quotient(largest, 127.0)
    scaled = inverse_of(scale) * x
    # (int) roundf: ties away from zero, by adding the float before 0.5 to the magnitude.
    before_half = ((scaled.view(torch.int32) >> 31) & -0x80000000) | 0x3EFFFFFF
    quants = truncated(scaled + before_half.view(torch.float32)) & 0xFF
    return torch.cat((*half_bytes(to_half(scale)), quants))


def q4_0(x: Tensor, _importance: None) -> Tensor:
    """``quantize_row_q4_0_ref``."""
    scale = quotient(largest_of(x)[1], -8.0)
    quants = _byte_up_to(15, x * inverse_of(scale) + 8.5)
    return torch.cat((*half_bytes(to_half(scale)), _nibbles(quants)))


def q5_0(x: Tensor, _importance: None) -> Tensor:
    """``quantize_row_q5_0_ref``."""
    scale = quotient(largest_of(x)[1], -16.0)
    quants = _byte_up_to(31, x * inverse_of(scale) + 16.5)
    return torch.cat((*half_bytes(to_half(scale)), _fifth_bits(quants), _nibbles(quants)))


def q4_1(x: Tensor, _importance: None) -> Tensor:
    """``quantize_row_q4_1_ref``."""
    low, scale = _range(x, 15)
    quants = _byte_up_to(15, (x - low) * inverse_of(scale) + 0.5)
    header = (*half_bytes(to_half(scale)), *half_bytes(to_half(low)))
    return torch.cat((*header, _nibbles(quants)))


def q5_1(x: Tensor, _importance: None) -> Tensor:
    """``quantize_row_q5_1_ref``."""
    low, scale = _range(x, 31)
    quants = truncated((x - low) * inverse_of(scale) + 0.5) & 0xFF
    header = (*half_bytes(to_half(scale)), *half_bytes(to_half(low)))
    return torch.cat((*header, _fifth_bits(quants), _nibbles(quants)))


def _byte_up_to(top: int, x: Tensor) -> Tensor:
    """``(uint8_t) MIN(top, (int8_t) x)``."""
    return as_int8(truncated(x)).clamp_(max=top) & 0xFF


def _range(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    low, high = torch.full_like(x[0], _FLT_MAX), torch.full_like(x[0], -_FLT_MAX)
    for value in x.unbind():
        low = torch.where(value < low, value, low)
        high = torch.where(value > high, value, high)
    return low, quotient(high - low, float(top))


def _nibbles(quants: Tensor) -> Tensor:
    return ((quants[:16] & 0xF) | (quants[16:] << 4)) & 0xFF


def _fifth_bits(quants: Tensor) -> Tensor:
    bits = ((quants >> 4) & 1).view(4, 8, -1)
    packed = bits[:, 0]
    for i in range(1, 8):
        packed = packed | (bits[:, i] << i)
    return packed
