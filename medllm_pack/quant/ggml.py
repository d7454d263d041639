"""The door to libggml: llama.cpp's own quantizers, called through ctypes.

The library is the one that the installed llama-cpp-python carries; only its base part is loaded,
which needs neither a model nor a backend. ctypes gives the interpreter lock back around each call,
so blocks can be quantized side by side. Knows nothing of files or mixes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from medllm_pack.errors import MedllmError
from medllm_pack.gguf.layout import row_bytes

_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(
    sys.platform, "libggml-base.so"
)
# Backends of ggml, by library, that compute on the processor or elsewhere in a network.
_NO_GPU = ("base", "cpu", "blas", "rpc")


def quantize(
    rows: NDArray[np.float32], kind: str, *, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize rows to a ggml type (``ggml_quantize_chunk``).

    Args:
        rows: shape (n, columns), C order.
        kind: ggml type name, such as ``Q4_K``; F32, F16 and BF16 are converted.
        importance: one weight a column, shape (columns,), or None.

    Returns:
        The bytes, n · :func:`~medllm_pack.gguf.layout.row_bytes` of them.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    n, columns = rows.shape
    out = np.empty(n * row_bytes(kind, columns), dtype=np.uint8)
    weights = None if importance is None else _pointer(importance)
    written = library().ggml_quantize_chunk(
        int(GGMLQuantizationType[kind]), _pointer(rows), out.ctypes.data_as(ctypes.c_void_p),
        0, n, columns, weights,
    )  # fmt: skip
    assert written == out.size, (kind, rows.shape, written)
    return out


def is_sound(data: NDArray[np.uint8], kind: str) -> bool:
    """Say whether no scale in quantized rows is NaN or infinite (``ggml_validate_row_data``).

    What is not sound llama.cpp neither writes nor, asked to check, loads.
    """
    return bool(
        library().ggml_validate_row_data(
            int(GGMLQuantizationType[kind]), data.ctypes.data_as(ctypes.c_void_p), data.size
        )
    )


def requires_importance(kind: str) -> bool:
    """Say whether ggml refuses to quantize to a type without an importance matrix."""
    return bool(library().ggml_quantize_requires_imatrix(int(GGMLQuantizationType[kind])))


def package_version() -> str:
    """Return the version of the llama-cpp-python whose libggml is used."""
    return version("llama-cpp-python")


@cache
def gpu_libraries() -> Mapping[str, int]:
    """Return the libraries that compute on GPUs, as ``cuda``, and the size of each; often none."""
    names = {path: path.name.removeprefix("lib").removeprefix("ggml-").partition(".")[0]
             for path in _folder().glob(f"*ggml-*{Path(_LIBRARY).suffix}")}  # fmt: skip
    return {
        name: path.stat().st_size for path, name in names.items() if not name.startswith(_NO_GPU)
    }


def _folder() -> Path:
    spec = importlib.util.find_spec("llama_cpp")  # found, not imported: it loads all backends
    if spec is None or spec.origin is None:
        raise MedllmError("llama-cpp-python is not installed; run: pip install llama-cpp-python")
    return Path(spec.origin).parent / "lib"


@cache
def library() -> ctypes.CDLL:
    """Return the loaded libggml-base.

    Raises:
        MedllmError: if llama-cpp-python is missing or broken.
    """
    path = _folder() / _LIBRARY
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise MedllmError(
            f"llama-cpp-python has no usable {_LIBRARY}; install it again: "
            "pip install --force-reinstall llama-cpp-python"
        ) from error
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    loaded.ggml_validate_row_data.restype = ctypes.c_bool
    loaded.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    loaded.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    loaded.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return loaded


def _pointer(array: NDArray[np.float32]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
