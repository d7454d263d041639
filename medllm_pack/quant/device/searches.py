"""The searches of ggml-quants.c, one block or sub-block to a position.

The first axis has the weights of a sub-block, the others are positions. Operations and their order
are those of :mod:`medllm_pack.quant.kernels.search`, which names the C function of each; see
:mod:`~medllm_pack.quant.device.arithmetic` for what makes the bits the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medllm_pack.quant.device.arithmetic import in_order, largest_of, level, nearest, quotient
from medllm_pack.quant.kernels.search import GROUP_MAX_EPS

_EPSILON = float(GROUP_MAX_EPS)
Numerators = tuple[float, ...]


def scale_and_min(
    x: Tensor, weights: Tensor, top: int, numerators: Numerators, *, absolute: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``make_qkx2_quants`` and ``make_qkx3_quants``.

    Returns:
        The scale and the (negated) minimum; the inverse scale and the minimum of the best levels.
    """
    terms = torch.stack((weights, weights * x, weights), 1)
    sum_w, sum_x, _ = in_order(terms, from_zero=False).unbind()
    low, high = _low_and_high(x)
    flat = high <= low
    inverse = quotient(float(top), high - low)
    scale = quotient(1.0, inverse)
    q = level((x - low).mul_(inverse), 0, top)
    best = _error(x, weights, q, scale, low, absolute)
    best_inverse, best_low = inverse, low
    for numerator in numerators:
        inverse = quotient(numerator, high - low)
        q = level((x - low).mul_(inverse), 0, top)
        torch.mul(weights, q, out=terms[:, 0])
        torch.mul(terms[:, 0], q, out=terms[:, 1])
        torch.mul(terms[:, 0], x, out=terms[:, 2])
        sum_l, sum_l2, sum_xl = in_order(terms).unbind()
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = quotient(sum_w * sum_xl - sum_x * sum_l, determinant)
        this_low = quotient(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        positive = this_low > 0.0
        this_scale = torch.where(positive, quotient(sum_xl, sum_l2), this_scale)
        this_low = this_low.masked_fill(positive, 0.0)
        error = _error(x, weights, q, this_scale, this_low, absolute)
        better = (determinant > 0.0) & (error < best)
        best_inverse = torch.where(better, inverse, best_inverse)
        best_low = torch.where(better, low, best_low)
        best = torch.where(better, error, best)
        scale = torch.where(better, this_scale, scale)
        # The next try measures from the new minimum.
        low = torch.where(better, this_low, low)
    minimum = torch.where(flat, -_low_and_high(x)[0], -low)
    return scale.masked_fill(flat, 0.0), minimum, best_inverse.masked_fill(flat, 0.0), best_low


def _low_and_high(x: Tensor) -> tuple[Tensor, Tensor]:
    low = high = x[0]
    for value in x[1:].unbind():
        low = torch.where(value < low, value, low)
        high = torch.where(value > high, value, high)
    return low.masked_fill(low > 0.0, 0.0), high


def _error(
    x: Tensor, weights: Tensor, q: Tensor, scale: Tensor, low: Tensor, absolute: bool
) -> Tensor:
    difference = (scale * q).add_(low).sub_(x)
    difference = difference.abs_() if absolute else difference.mul_(difference)
    return in_order(difference.mul_(weights))


def levels(x: Tensor, inverse: Tensor, low: Tensor, top: int) -> Tensor:
    """Return the levels of sub-blocks for what :func:`scale_and_min` found."""
    return nearest((x - low).mul_(inverse)).clamp_(0, top)


def signed_scale(
    x: Tensor, weights: Tensor, top: int, numerators: Numerators
) -> tuple[Tensor, Tensor]:
    """``make_qx_quants`` with its weights given, or x squared as ``rmse_type`` 1 says.

    Returns:
        The scale; the inverse scale of the best levels.
    """
    weighted = weights * x
    terms = torch.stack((weighted, weighted), 1)
    largest, extreme = largest_of(x)

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        q = level(x * inverse, -top, top - 1)
        torch.mul(weighted, q, out=terms[:, 0])
        torch.mul(weights * q, q, out=terms[:, 1])
        sum_lx, sum_l2 = in_order(terms).unbind()
        return sum_lx, sum_l2

    inverse = quotient(float(-top), extreme)
    sum_lx, sum_l2 = sums(inverse)
    scale = quotient(sum_lx, sum_l2).masked_fill(~(sum_l2 != 0.0), 0.0)
    best = scale * sum_lx
    best_inverse = inverse
    for numerator in numerators:
        inverse = quotient(numerator, extreme)
        sum_lx, sum_l2 = sums(inverse)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        this_scale = quotient(sum_lx, sum_l2)
        best = torch.where(better, this_scale * sum_lx, best)
        scale = torch.where(better, this_scale, scale)
        best_inverse = torch.where(better, inverse, best_inverse)
    return scale.masked_fill(largest < _EPSILON, 0.0), best_inverse


def signed_levels(x: Tensor, inverse: Tensor, top: int) -> Tensor:
    """Return the levels, counted from 0, for what :func:`signed_scale` found."""
    largest, _ = largest_of(x)
    q = nearest(x * inverse).clamp_(-top, top - 1) + top
    return q.masked_fill_(largest < _EPSILON, 0)


def positive_scale(
    x: Tensor, weights: Tensor, top: int, numerators: Numerators
) -> tuple[Tensor, Tensor]:
    """``make_qp_quants``: return the scale, and the levels, which are bytes."""
    largest = torch.zeros_like(x[0])
    for value in x.unbind():
        largest = torch.where(largest > value, largest, value)
    inverse = quotient(float(top), largest)
    difference = x - quotient(1.0, inverse) * (nearest(x * inverse) & 0xFF).to(torch.float32)
    best = in_order(weights * difference * difference)
    for numerator in numerators:
        this_inverse = quotient(numerator, largest)
        q = nearest(x * this_inverse).clamp_(max=top).to(torch.float32)
        difference = x - quotient(1.0, this_inverse) * q
        error = in_order(weights * difference * difference)
        better = error < best
        best = torch.where(better, error, best)
        inverse = torch.where(better, this_inverse, inverse)
    q = nearest(x * inverse).clamp_(max=top)
    wide = q.to(torch.float32)
    terms = torch.stack((weights * x * wide, weights * wide * wide), 1)
    sum_lx, sum_l2 = in_order(terms).unbind()
    found = list((q & 0xFF).unbind())
    for _ in range(5):  # a round that changes nothing is followed by others that do not
        for i in range(len(found)):
            found[i], sum_lx, sum_l2 = _moved(x[i], weights[i], found[i], sum_lx, sum_l2, top)
    levels_found = torch.stack(found).masked_fill_(largest < _EPSILON, 0)
    empty = (largest < _EPSILON) | ~(sum_l2 > 0.0)
    return quotient(sum_lx, sum_l2).masked_fill(empty, 0.0), levels_found


def _moved(
    x: Tensor, w: Tensor, found: Tensor, sum_lx: Tensor, sum_l2: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Give one weight a better level, where there is one."""
    old, wx = found.to(torch.float32), w * x
    lx, l2 = sum_lx - wx * old, sum_l2 - w * old * old
    q = nearest(quotient(x * l2, lx)).clamp_(max=top)
    moved = (lx > 0.0) & (l2 > 0.0) & (q != found)
    wide = q.to(torch.float32)
    lx, l2 = lx + wx * wide, l2 + w * wide * wide
    better = moved & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
    return (
        torch.where(better, q & 0xFF, found),
        torch.where(better, lx, sum_lx),
        torch.where(better, l2, sum_l2),
    )
