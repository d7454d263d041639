"""Single operations on tensors that give the same bits on every device.

A kernel here is a row of eager torch operations, each of which rounds on its own: eager torch joins
no product and sum across operations. One position of a tensor does what the scalar code of
ggml-quants.c does with one block, in the same order; positions never meet. The same source runs on
the CPU, where tests compare its bytes with libggml's.

What holds on the CPU and would not on NVIDIA is kept out:

- Division by a number, or by a tensor on the CPU, is multiplication by its reciprocal there, and
  so is ``number / tensor`` everywhere (BinaryDivTrueKernel.cu; ``Tensor.__rdiv__``). So
  :func:`quotient` divides tensors of the same device only.
- ``addcmul``, ``lerp`` and their kind are fused there (DeviceAddCmulCdiv.cuh); ``sum``, ``cumsum``
  and products of matrices have an order of their own. So :func:`in_order` adds one term after the
  other.
- A NaN that an operation makes has other bits there. So rounding gives NaN one meaning, x86's.
- ``sqrt`` of float32 is off by one bit now and then, on the CPU, where MKL computes it. So
  :func:`root` goes through float64.
- A cast of what is out of range gives something else there. So :func:`truncated` looks first.

What no test without a GPU can show is that torch's CUDA build divides to the nearest and keeps
denormals. nvcc does unless told otherwise (``-prec-div=true`` and ``-ftz=false`` are its defaults),
and the CUDA_FLAGS that ``torch.__config__.show()`` lists (torch 2.13) do not tell it otherwise. It
is not taken on trust: :mod:`~medllm_pack.quant.device.proof` compares bytes before any use.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest whole number in the low bits
_MAGIC_BITS = 0x4B400000
_MANTISSA = 0x7FFFFF
_INT_MIN = -(1 << 31)


def quotient(a: Tensor | float, b: Tensor | float) -> Tensor:
    """Return ``a / b``, rounded once; a number becomes a tensor on the other's device."""
    if not isinstance(b, Tensor):
        assert isinstance(a, Tensor)
        b = a.new_full((1,) * a.dim(), b)
    if not isinstance(a, Tensor):
        a = b.new_full((1,) * b.dim(), a)
    return torch.div(a, b)


def root(x: Tensor) -> Tensor:
    """``sqrtf(x)``: in float64 and rounded again, which is the nearest float32 for any float32."""
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def in_order(terms: Tensor, *, from_zero: bool = True) -> Tensor:
    """Return the sum over the first axis, one addition after the other.

    Args:
        terms: shape (count, ...).
        from_zero: start from 0.0 as a loop does that begins with an empty sum: what starts from the
            first term may end at -0.0.
    """
    total = terms[0] + 0.0 if from_zero else terms[0].clone()
    for term in terms[1:].unbind():
        total += term
    return total


def or_zero(mask: Tensor, x: Tensor) -> Tensor:
    """Return ``mask ? x : 0``."""
    return x.masked_fill(~mask, 0)


def _magic_bits(x: Tensor) -> Tensor:
    bits = (x + _MAGIC).view(torch.int32)
    return bits.masked_fill_(x != x, _MAGIC_BITS) & _MANTISSA


def nearest(x: Tensor) -> Tensor:
    """``nearest_int``, with what it gives for values that are too large for it, and 0 for NaN."""
    return _magic_bits(x) - 0x400000


def level(x: Tensor, low: int, high: int) -> Tensor:
    """``(float) MAX(low, MIN(high, nearest_int(x)))``, without leaving the bits of the sum."""
    bits = _magic_bits(x) | 0x4B000000
    return bits.clamp_(_MAGIC_BITS + low, _MAGIC_BITS + high).view(torch.float32) - _MAGIC


def as_int8(x: Tensor) -> Tensor:
    """``(int8_t) x``."""
    return ((x & 0xFF) ^ 0x80) - 0x80


def truncated(x: Tensor) -> Tensor:
    """``(int) x``; out of range it is what x86 says."""
    fits = x.abs() < 2.0**31
    return or_zero(fits, x).to(torch.int32).masked_fill_(~fits, _INT_MIN)


def to_half(x: Tensor) -> Tensor:
    """``GGML_FP32_TO_FP16``: the 16 bits of the nearest half, ties to even."""
    base = (x.abs() * 2.0**112) * 2.0**-110
    bits = x.view(torch.int32)
    exponent = (bits & 0x7F800000).clamp(min=0x38800000)
    rounded = ((exponent + 0x07800000).view(torch.float32) + base).view(torch.int32)
    half = ((rounded >> 13) & 0x7C00) + (rounded & 0x0FFF)
    # The NaN that x86 makes has its sign set.
    return (((bits >> 16) & 0x8000) | half).masked_fill(x != x, 0xFE00)


def from_half(half: Tensor) -> Tensor:
    """``GGML_FP16_TO_FP32``."""
    plain = half & 0x7FFF
    normal = ((plain << 13) + 0x70000000).view(torch.float32) * 2.0**-112
    small = (plain | 0x3F000000).view(torch.float32) - 0.5
    value = torch.where(plain < 0x400, small, normal)
    return torch.where(half > 0x7FFF, -value, value)


def largest_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude along the first axis, and the first value that has it."""
    largest, extreme = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for value, size in zip(x.unbind(), x.abs().unbind(), strict=True):
        larger = size > largest
        largest = torch.where(larger, size, largest)
        extreme = torch.where(larger, value, extreme)
    return largest, extreme


def inverse_of(scale: Tensor) -> Tensor:
    """``scale ? 1 / scale : 0``."""
    return or_zero(scale != 0.0, quotient(1.0, scale))


def half_bytes(half: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and the high byte of 16 bits, each with an axis for bytes in front."""
    return (half & 0xFF)[None], (half >> 8)[None]
