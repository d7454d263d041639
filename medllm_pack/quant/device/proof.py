"""What a device must show before a build uses it: libggml's bytes for some thousand fixed blocks.

The blocks are noise as in weights and what has broken quantizers: sparse blocks, denormals, every
bit pattern of F16, single outliers, constants, ties. Knows nothing of how a device computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from medllm_pack.errors import DeviceError
from medllm_pack.quant import ggml

if TYPE_CHECKING:
    from medllm_pack.quant.device.door import Device

Floats = NDArray[np.float32]

_ROWS, _COLUMNS = 64, 1280  # of each case: 5 super-blocks a row
_HALF_MAX = 65504.0


def prove(device: Device, needs: Iterable[tuple[str, bool]]) -> None:
    """Compare a device's bytes with libggml's.

    Args:
        device: the device.
        needs: type, and whether with an importance matrix.

    Raises:
        DeviceError: at the first type that differs.
    """
    rows, importance = fixed_rows(), _importance()
    for kind, weighted in needs:
        weights = importance if weighted else None
        found = device.quantize(rows, kind, importance=weights)
        wanted = ggml.quantize(rows, kind, importance=weights)
        size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
        differ = (found != wanted).reshape(-1, size).any(axis=1)
        if differ.any():
            matrix = " with an importance matrix" if weighted else ""
            raise DeviceError(
                f"{device.title} quantizes {kind}{matrix} otherwise than llama.cpp: {differ.sum()} "
                f"of {differ.size} test blocks differ; use --device cpu"
            )


def fixed_rows() -> Floats:
    """Return the rows: F16 values, the same ones in every run."""
    with np.errstate(over="ignore"):
        halves = np.concatenate(list(_cases(np.random.default_rng(20251123)))).astype(np.float16)
    return np.nan_to_num(halves.astype(np.float32), nan=0, posinf=_HALF_MAX, neginf=-_HALF_MAX)


def _cases(random: np.random.Generator) -> Iterator[NDArray[np.floating]]:
    shape = (_ROWS, _COLUMNS)
    for _ in range(5):
        yield random.standard_normal(shape) * 0.02
    noise = random.standard_normal(shape)
    yield noise * 10.0 ** random.uniform(-9, 4, (_ROWS, 1))
    yield noise * np.repeat(10.0 ** random.uniform(-9, 4, (_ROWS, _COLUMNS // 16)), 16, axis=1)
    yield noise * (random.random(shape) < 0.05)
    yield random.integers(0, 1 << 16, shape).astype(np.uint16).view(np.float16)
    yield random.integers(-40, 41, shape) * 2.0**-24  # denormals
    yield np.repeat(noise[:, ::32], 32, axis=1)
    yield -np.abs(noise)
    yield noise * 0.1 + 3
    yield (random.integers(-31, 32, shape) + 0.5) / 32
    alone = np.zeros(shape)
    alone[np.arange(_ROWS), random.integers(0, _COLUMNS, _ROWS)] = np.resize(
        [_HALF_MAX, -_HALF_MAX, 6e-8, 1.0], _ROWS
    )
    yield alone
    yield alone + noise * 1e-4


def _importance() -> Floats:
    random = np.random.default_rng(20251124)
    weights = random.random(_COLUMNS) ** 6 * (random.random(_COLUMNS) < 0.9)
    return weights.astype(np.float32)
