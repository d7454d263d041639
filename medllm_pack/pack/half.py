"""The one rounding: values of a checkpoint to F16, and the refusal of what F16 cannot hold.

Knows nothing of adapters or files.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medllm_pack.errors import CheckpointError, shown
from medllm_pack.quant import kernels
from medllm_pack.weights.safetensors import Rows, Values

HALF_MAX = 65504.0


def to_half(values: Values, rows: Rows) -> NDArray[np.float16]:
    """Round values once to F16, to the nearest, ties to even.

    Raises:
        CheckpointError: if a value is not finite or overflows, naming the tensor.
    """
    halves = _rounded(values)
    exponents = halves.view(np.uint16) & np.uint16(0x7C00)
    if (exponents == 0x7C00).any():
        largest = float(np.abs(finite(values, rows)).max())
        raise CheckpointError(
            f"tensor {shown(rows.spec.name)} holds {largest:.6g}, which overflows F16 (largest "
            f"{HALF_MAX:.0f}); it cannot be packed in 16 bits"
        )
    return halves


def _rounded(values: Values) -> NDArray[np.float16]:
    if values.dtype == np.float64:
        from medllm_pack.weights.merging import round_to_half  # twelve times as fast as numpy's

        return round_to_half(values.astype(np.float64, copy=False))
    if values.dtype == np.float32:
        # sixteen times as fast as numpy's
        return kernels.narrow(values.astype(np.float32, copy=False))
    return np.ascontiguousarray(values, dtype=np.float16)


def finite(values: Values, rows: Rows) -> Values:
    """Return the values if all are finite.

    Raises:
        CheckpointError: if not, naming the tensor and the row.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        row = rows.start + int(np.argwhere(bad)[0][0])
        raise CheckpointError(
            f"tensor {shown(rows.spec.name)} holds NaN or infinity (row {row}); the training or "
            "the file is damaged"
        )
    return values
