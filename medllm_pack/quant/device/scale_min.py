"""Q2_K, Q4_K and Q5_K: super-blocks of sub-blocks that have a scale and a minimum each.

A kernel takes weights of shape (256, blocks), and an importance matrix of the same shape or None,
and returns bytes as whole numbers, shape (bytes of a block, blocks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from medllm_pack.quant.device.arithmetic import (
    from_half,
    half_bytes,
    in_order,
    nearest,
    or_zero,
    quotient,
    root,
    to_half,
)
from medllm_pack.quant.device.searches import Numerators, levels, positive_scale, scale_and_min
from medllm_pack.quant.kernels.search import scale_tries, tries

_Q2_TRIES: Numerators = tuple(tries(-0.5, 0.1, 16, 3).tolist())
_Q4_TRIES: Numerators = tuple(tries(-1.0, 0.1, 21, 15).tolist())
_Q5_TRIES: Numerators = tuple(tries(-0.5, 0.1, 16, 31).tolist())
# With an importance matrix.
_FINE_TRIES: dict[int, Numerators] = {
    top: tuple(tries(-0.9, 0.05, 37, top).tolist()) for top in (3, 15, 31)
}
_SCALE_4_TRIES: Numerators = tuple(scale_tries(4, 15).tolist())
_SCALE_6_TRIES: Numerators = tuple(scale_tries(4, 63).tolist())


def q4_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """``quantize_row_q4_K_ref`` and ``quantize_row_q4_K_impl``."""
    header, quants = _q45_k(x, importance, 15, _Q4_TRIES)
    return torch.cat((header, _nibbles(quants)))


def q5_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """``quantize_row_q5_K_ref`` and ``quantize_row_q5_K_impl``."""
    header, quants = _q45_k(x, importance, 31, _Q5_TRIES)
    fifth = quants[:, 0] >> 4
    for j in range(1, 8):
        fifth = fifth | ((quants[:, j] >> 4) << j)
    return torch.cat((header, fifth, _nibbles(quants)))


def sub_blocks(x: Tensor, count: int) -> Tensor:
    """Return (256, blocks) as (weights of a sub-block, sub-blocks, blocks)."""
    return x.view(count, -1, x.shape[-1]).transpose(0, 1).contiguous()


def _nibbles(quants: Tensor) -> Tensor:
    """Pack the low four bits: weights i and i + 32 of 64 in one byte."""
    pairs = (quants[:, 0::2] & 0xF) | ((quants[:, 1::2] & 0xF) << 4)
    return pairs.transpose(0, 1).reshape(128, -1)


def _q45_k(
    x: Tensor, importance: Tensor | None, top: int, numerators: Numerators
) -> tuple[Tensor, Tensor]:
    """Return the first 16 bytes, and the levels, shape (32, 8, blocks)."""
    search = _plain(x, top, numerators) if importance is None else _weighted(x, importance, top)
    d, m, scale_levels, min_levels, inverse, low = search
    low_scales, high_scales = scale_levels[:4], scale_levels[4:]
    low_mins, high_mins = min_levels[:4], min_levels[4:]
    first = (low_scales | ((high_scales >> 4) << 6)) & 0xFF
    second = (low_mins | ((high_mins >> 4) << 6)) & 0xFF
    third = ((high_scales & 0xF) | ((high_mins & 0xF) << 4)) & 0xFF
    # get_scale_min_k4
    scales = torch.cat((first & 63, (third & 0xF) | ((first >> 6) << 4)))
    mins = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)))
    scaled_d = from_half(d) * scales.to(torch.float32)
    scaled_m = from_half(m) * mins.to(torch.float32)
    quants = _rounded(sub_blocks(x, 8), scaled_d, scaled_m, inverse, low, top)
    return torch.cat((*half_bytes(d), *half_bytes(m), first, second, third)), quants


def _plain(x: Tensor, top: int, numerators: Numerators) -> tuple[Tensor, ...]:
    parts = sub_blocks(x, 8)
    average = root(in_order(parts * parts) * (1.0 / 32.0))  # a power of two: exact
    scales, mins, inverse, low = scale_and_min(parts, average + parts.abs(), top, numerators)
    max_scale, max_min = _largest(scales), _largest(mins)
    inverse_scale = or_zero(max_scale > 0.0, quotient(63.0, max_scale))
    inverse_min = or_zero(max_min > 0.0, quotient(63.0, max_min))
    scale_levels = (nearest(inverse_scale * scales) & 0xFF).clamp_(max=63)
    min_levels = (nearest(inverse_min * mins) & 0xFF).clamp_(max=63)
    d, m = to_half(quotient(max_scale, 63.0)), to_half(quotient(max_min, 63.0))
    return d, m, scale_levels, min_levels, inverse, low


def _largest(x: Tensor) -> Tensor:
    largest = torch.zeros_like(x[0])
    for value in x.unbind():
        largest = torch.where(value > largest, value, largest)
    return largest


def _weighted(x: Tensor, importance: Tensor, top: int) -> tuple[Tensor, ...]:
    sigma2 = 2.0 * in_order(x * x) * (1.0 / 256.0)
    weights = sub_blocks(importance * root(sigma2 + x * x), 8)
    found = scale_and_min(sub_blocks(x, 8), weights, top, _FINE_TRIES[top])
    d, m, scale_levels, min_levels = _scaled_pairs(found, weights, 63, _SCALE_6_TRIES)
    if top == 31:
        scale_levels, min_levels = scale_levels.clamp(max=63), min_levels.clamp(max=63)
    return d, m, scale_levels, min_levels, found[2], found[3]


def _scaled_pairs(
    found: tuple[Tensor, ...], weights: Tensor, top: int, numerators: Numerators
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Search the scale of scales and that of minimums, side by side."""
    totals = in_order(weights)
    both, quants = positive_scale(
        torch.stack(found[:2], 1), torch.stack((totals, totals), 1), top, numerators
    )
    halves = to_half(both)
    return halves[0], halves[1], quants[:, 0], quants[:, 1]


def _rounded(
    x: Tensor, d: Tensor, m: Tensor, inverse: Tensor, low: Tensor, top: int
) -> Tensor:  # fmt: skip
    """Round weights with the rounded scale; where that is zero, keep the search's levels."""
    quants = nearest(quotient(x + m, d)).clamp_(0, top)
    return torch.where(d == 0.0, levels(x, inverse, low, top), quants)


def q2_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """``quantize_row_q2_K_ref`` and ``quantize_row_q2_K_impl``."""
    parts = sub_blocks(x, 16)
    if importance is None:
        found = scale_and_min(parts, parts.abs(), 3, _Q2_TRIES, absolute=True)
        max_scale, max_min = _largest(found[0]), _largest(found[1])
        some_scale, some_min = max_scale > 0.0, max_min > 0.0
        scales = or_zero(some_scale, nearest(quotient(15.0, max_scale) * found[0]) & 0xFF)
        mins = or_zero(some_min, nearest(quotient(15.0, max_min) * found[1]))
        d = to_half(or_zero(some_scale, quotient(max_scale, 15.0)))
        m = to_half(or_zero(some_min, quotient(max_min, 15.0)))
    else:
        sigma2 = in_order(x * x) * (1.0 / 256.0)
        weights = sub_blocks(importance * root(sigma2 + x * x), 16)
        found = scale_and_min(parts, weights, 3, _FINE_TRIES[3])
        d, m, scales, mins = _scaled_pairs(found, weights, 15, _SCALE_4_TRIES)
    both = (scales | (mins << 4)) & 0xFF
    scaled_d = from_half(d) * (both & 0xF).to(torch.float32)
    scaled_m = from_half(m) * (both >> 4).to(torch.float32)
    quants = _rounded(parts, scaled_d, scaled_m, found[2], found[3], 3)
    return torch.cat((both, pack_pairs(quants), *half_bytes(d), *half_bytes(m)))


def pack_pairs(quants: Tensor) -> Tensor:
    """Pack the low two bits: weights i, i + 32, i + 64 and i + 96 of 128 in one byte."""
    four = (quants & 3).transpose(0, 1).reshape(2, 4, 32, -1)
    packed = four[:, 0] | (four[:, 1] << 2) | (four[:, 2] << 4) | (four[:, 3] << 6)
    return packed.reshape(64, -1)
