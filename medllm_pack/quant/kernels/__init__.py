"""Quantization, several times as fast as ggml's and byte for byte the same.

:func:`quantize` is the one way in. It calls a kernel of this folder where there is one, and libggml
for the other types (IQ1 to IQ3, TQ, F16 …). numba is imported, and a kernel compiled, when it is
first needed; :func:`warm_up` does that ahead. Compiled kernels stay in numba's cache: beside these
files, else in the user's cache folder, or where NUMBA_CACHE_DIR says. :func:`widen`
and :func:`narrow` convert F16 values faster than numpy does.

MEDLLM_KERNELS=ggml in the environment leaves everything to libggml, and conversions to numpy.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, overload

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from medllm_pack.errors import MedllmError, shown
from medllm_pack.gguf.layout import row_bytes
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.quant import ggml

Kernel = Callable[[int, int, int, int, int], None]

SWITCH = "MEDLLM_KERNELS"
COMPILE_SECONDS = 90.0  # what warm_up may take; a kernel takes 1 to 2 s on a 2.6 GHz Xeon

_FEW = 4096  # fewer values than this convert in no time with numpy

# Type -> module of its kernels: one without and one with an importance matrix.
_MODULES = {
    "Q2_K": "scale_min", "Q4_K": "scale_min", "Q5_K": "scale_min",
    "Q3_K": "scale", "Q6_K": "scale",
    "IQ4_NL": "iq4", "IQ4_XS": "iq4",
    "Q4_0": "simple", "Q4_1": "simple", "Q5_0": "simple", "Q5_1": "simple", "Q8_0": "simple",
}  # fmt: skip
_IGNORES_IMPORTANCE = frozenset({"Q8_0"})  # in ggml as well
# (type, with importance) -> reason. Empty: every kernel of ours was the faster one when measured
# (benchmarks/kernels.py). warm_up adds what it had no time to compile.
_LEFT_TO_GGML: dict[tuple[str, bool], str] = {}


def kinds() -> tuple[str, ...]:
    """Return the types that have a kernel here."""
    return tuple(_MODULES)


def quantize(
    rows: NDArray[np.float32], kind: str, *, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize rows to a ggml type. The bytes are those of ``ggml_quantize_chunk``.

    Args:
        rows: shape (n, columns); finite.
        kind: ggml type name, such as ``Q4_K``.
        importance: one weight a column, shape (columns,), or None.

    Returns:
        The bytes, n · :func:`~medllm_pack.gguf.layout.row_bytes` of them.

    Raises:
        ValueError: if a row does not divide into the type's blocks, or the importance matrix into
            the columns.
        MedllmError: if MEDLLM_KERNELS is set to something else than ``ggml``.
    """
    if importance is not None and importance.shape != rows.shape[1:]:
        raise ValueError(f"importance {importance.shape} does not fit rows of {rows.shape[1:]}")
    if not _is_ours(kind, importance is not None):
        return ggml.quantize(rows, kind, importance=_plain(importance))
    rows, importance = _plain(rows), _plain(importance)
    out = np.empty(rows.shape[0] * row_bytes(kind, rows.shape[1]), dtype=np.uint8)
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    weights = 0 if importance is None else importance.ctypes.data
    period, blocks = rows.shape[1] // block, rows.size // block
    if blocks:
        run = _kernel(kind, importance is not None)
        run(rows.ctypes.data, weights, period, out.ctypes.data, blocks)
    return out


def warm_up(
    needs: Iterable[tuple[str, bool]],
    *,
    widening: bool = False,
    narrowing: bool = False,
    report: Reporter = SILENT,
) -> None:
    """Compile the kernels that will be needed, or load them from the cache.

    What is not ready after ``COMPILE_SECONDS`` is left to libggml in this process: slower, and the
    same bytes.

    Args:
        needs: type, and whether with an importance matrix.
        widening: whether :func:`widen` will be needed, which every type needs.
        narrowing: whether :func:`narrow` will be needed.
        report: listener.
    """
    ours = sorted({need for need in needs if _is_ours(*need)})
    conversions = ["widen_half"] if ours or widening else []
    if narrowing:
        conversions.append("narrow_to_half")
    if not conversions or is_switched_off():
        return
    report.step("preparing kernels")
    end = time.monotonic() + COMPILE_SECONDS
    for need in ours:
        if time.monotonic() > end:
            _LEFT_TO_GGML[need] = "compiling took too long"
            report.notice(f"compiling took too long: {need[0]} is left to libggml, which is slower")
        else:
            _kernel(*need)
    for name in conversions:
        _compiled("halves", name)


def widen(halves: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return F16 values as float32."""
    if not _is_worth_it(halves):
        return halves.astype(np.float32)
    return _converted("widen_half", halves, np.empty(halves.shape, np.float32))


def narrow(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return float32 values as F16, rounded to the nearest, ties to even; too large is infinite."""
    if not _is_worth_it(values):
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    return _converted("narrow_to_half", values, np.empty(values.shape, np.float16))


def _is_worth_it(values: NDArray[Any]) -> bool:
    return values.size >= _FEW and not is_switched_off()


def _converted(name: str, values: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
    values = np.require(values, None, ("C", "A"))
    _compiled("halves", name)(values.ctypes.data, 0, 0, out.ctypes.data, values.size)
    return out


def _is_ours(kind: str, weighted: bool) -> bool:
    left = is_switched_off() or (kind, weighted) in _LEFT_TO_GGML
    return kind in _MODULES and not left


def is_switched_off() -> bool:
    """Say whether MEDLLM_KERNELS leaves everything to libggml."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "ggml"):
        raise MedllmError(f"{SWITCH} is {shown(switch)}; it may be 'ggml', or not be set")
    return bool(switch)


def _kernel(kind: str, weighted: bool) -> Kernel:
    suffix = "_weighted" if weighted and kind not in _IGNORES_IMPORTANCE else ""
    return _compiled(_MODULES[kind], kind.lower() + suffix)


@cache
def _compiled(module: str, name: str) -> Kernel:
    """Return a kernel, compiled or loaded from the cache."""
    lanes = importlib.import_module(f"{__name__}.lanes")
    compiling = importlib.import_module("medllm_pack.compiling")
    kernel = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    found: Kernel = compiling.compiled(kernel, lanes.KERNEL_SIGNATURE)
    return found


@overload
def _plain(values: None) -> None: ...


@overload
def _plain(values: NDArray[np.float32]) -> NDArray[np.float32]: ...


def _plain(values: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """Return values as they must lie in memory for a kernel."""
    return None if values is None else np.require(values, np.float32, ("C", "A"))
