"""Q3_K and Q6_K: super-blocks of sub-blocks that have a scale each, and no minimum.

Shapes are those of :mod:`~medllm_pack.quant.device.scale_min`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medllm_pack.quant.device.arithmetic import (
    as_int8,
    from_half,
    half_bytes,
    in_order,
    largest_of,
    level,
    nearest,
    quotient,
    root,
    to_half,
)
from medllm_pack.quant.device.scale_min import pack_pairs, sub_blocks
from medllm_pack.quant.device.searches import Numerators, signed_levels, signed_scale
from medllm_pack.quant.kernels.search import GROUP_MAX_EPS, scale_tries

_EPSILON = float(GROUP_MAX_EPS)
_Q6_TRIES: Numerators = tuple(scale_tries(9, 32, -1).tolist())
_Q3_TRIES: Numerators = tuple(scale_tries(9, 4, -1).tolist())


def q6_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """``quantize_row_q6_K_ref`` and ``quantize_row_q6_K_impl``."""
    parts = sub_blocks(x, 16)
    weights = parts * parts if importance is None else sub_blocks(importance, 16)
    scales, inverses = signed_scale(parts, weights, 32, _Q6_TRIES)
    largest, extreme = largest_of(scales)
    inverse = quotient(-128.0, extreme)
    d = to_half(quotient(1.0, inverse))
    scale_bytes = nearest(inverse * scales).clamp_(max=127) & 0xFF
    scaled_d = from_half(d) * as_int8(scale_bytes).to(torch.float32)
    quants = _rounded(parts, scaled_d, inverses, 32)
    packed = torch.cat((*_six_bits(quants), scale_bytes, *half_bytes(d)))
    return packed.masked_fill_(largest < _EPSILON, 0)


def _six_bits(quants: Tensor) -> tuple[Tensor, Tensor]:
    """Pack four and two bits: weights i, i + 32, i + 64 and i + 96 of 128 belong together."""
    a, b, c, d = quants.transpose(0, 1).reshape(2, 4, 32, -1).unbind(1)
    low = torch.stack(((a & 0xF) | ((c & 0xF) << 4), (b & 0xF) | ((d & 0xF) << 4)), 1)
    upper = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6)
    return low.reshape(128, -1), upper.reshape(64, -1)


def _rounded(x: Tensor, d: Tensor, inverse: Tensor, top: int) -> Tensor:
    """Round weights with the rounded scale; where that is zero, keep the search's levels."""
    quants = nearest(quotient(x, d)).clamp_(-top, top - 1) + top
    return torch.where(d == 0.0, signed_levels(x, inverse, top), quants)


def q3_k(x: Tensor, importance: Tensor | None) -> Tensor:
    """``quantize_row_q3_K_ref`` and ``quantize_row_q3_K_impl``."""
    parts = sub_blocks(x, 16)
    search = _q3_k(parts) if importance is None else _q3_k_weighted(x, parts, importance)
    d, scale_levels, quants = search
    upper = quants.transpose(0, 1).reshape(8, 32, -1) >> 2
    mask = upper[0]
    for j in range(1, 8):
        mask = mask | (upper[j] << j)
    low = (scale_levels[:8] & 0xF) | ((scale_levels[8:] & 0xF) << 4)
    high = scale_levels[:4] >> 4
    for j in range(1, 4):
        high = high | ((scale_levels[4 * j : 4 * j + 4] >> 4) << (2 * j))
    return torch.cat((mask, pack_pairs(quants), low, high, *half_bytes(d)))


def _q3_k(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, found = _descend(parts)
    _, extreme = largest_of(scales)
    inverse = quotient(-32.0, extreme)
    none = ~(extreme != 0.0)
    scale_levels = as_int8(nearest(inverse * scales)).clamp_(-32, 31) + 32
    scale_levels = scale_levels.masked_fill_(none, 0)
    d = to_half(quotient(1.0, inverse)).masked_fill(none, 0)
    scaled_d = from_half(d) * (scale_levels - 32).to(torch.float32)
    quants = nearest(quotient(parts, scaled_d)).clamp_(-4, 3) + 4
    return d, scale_levels, torch.where(scaled_d == 0.0, found, quants)


def _descend(x: Tensor) -> tuple[Tensor, Tensor]:
    """``make_q3_quants``: return the scale, and the levels, counted from 0."""
    top = 4
    largest, extreme = largest_of(x)
    q = level(x * quotient(float(-top), extreme), -top, top - 1)
    weights = x * x
    weighted = weights * x
    terms = torch.stack((weighted * q, weights * q * q), 1)
    sum_lx, sum_l2 = in_order(terms).unbind()
    found = list(q.unbind())
    for _ in range(5):
        for i in range(len(found)):
            w, wx, old = weights[i], weighted[i], found[i]
            lx, l2 = sum_lx - wx * old, sum_l2 - w * old * old
            new = level(quotient(x[i] * l2, lx), -top, top - 1)
            moved = (lx > 0.0) & (new != old)
            lx, l2 = lx + wx * new, l2 + w * new * new
            better = moved & (l2 > 0.0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            found[i] = torch.where(better, new, old)
            sum_lx = torch.where(better, lx, sum_lx)
            sum_l2 = torch.where(better, l2, sum_l2)
    empty = largest < _EPSILON
    levels = (nearest(torch.stack(found)) + top).masked_fill_(empty, 0)
    return quotient(sum_lx, sum_l2).masked_fill(empty | ~(sum_l2 > 0.0), 0.0), levels


def _q3_k_weighted(x: Tensor, parts: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sigma2 = 2.0 * in_order(x * x) * (1.0 / 256.0)
    weights = sub_blocks(importance * root(sigma2 + x * x), 16)
    scales, inverses = signed_scale(parts, weights, 4, _Q3_TRIES)
    scale, inverse = signed_scale(scales, in_order(weights), 32, _Q6_TRIES)
    d = to_half(scale)
    scale_levels = signed_levels(scales, inverse, 32)
    scaled_d = from_half(d) * (scale_levels - 32).to(torch.float32)
    return d, scale_levels, _rounded(parts, scaled_d, inverses, 4)
