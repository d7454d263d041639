"""The door to numba: a function compiled for one signature, or loaded from numba's cache.

The cache lies beside the function's file, else in the user's cache folder, or where
NUMBA_CACHE_DIR says. One that is missing, full or damaged costs time and nothing else. Importing
this module imports numba, which takes half a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from numba import config, njit
from numba.core.registry import cpu_target

from medllm_pack.errors import MedllmError

# What numba may not do: reorder a sum, fuse a product into it, raise on 0 / 0.
STRICT: dict[str, Any] = {"fastmath": False, "error_model": "numpy", "nogil": True}


def cached(function: Callable[..., Any], *, tag: str = "") -> Any:
    """Make a function that :func:`compiled` compiles; it is not done here.

    Args:
        function: what to compile.
        tag: changes with what decides its code outside of its file.

    Raises:
        MedllmError: if numba is told not to compile.
    """
    if config.DISABLE_JIT:
        raise MedllmError("NUMBA_DISABLE_JIT is set, but kernels must be compiled; unset it")
    function.__qualname__ += f"_{tag}{_processor()}"
    try:
        return njit(cache=True, **STRICT)(function)
    except RuntimeError:  # no folder to write to: neither beside its file nor the user's
        return njit(**STRICT)(function)


def compiled(function: Any, signature: Any) -> Any:
    """Return what :func:`cached` made, compiled or loaded."""
    try:
        function.compile(signature)
    except Exception:
        if function.signatures:
            return function  # compiled; it could not be stored, as on a full disk
        # What a power cut left in the cache can make unpickling raise anything. With nothing
        # compiled yet recompile() only empties the cache, so that the next run fills it again.
        with suppress(OSError):
            function.recompile()
        function = njit(**STRICT)(function.py_func)
        function.compile(signature)
    return function


@cache
def _processor() -> str:
    """Return what code is made for, short enough for a file's name.

    numba's cache tells processors apart inside of one index file. Two of different kinds that share
    a home and fill it at the same instant could get each other's code, and end by SIGILL.
    """
    made_for = repr(cpu_target.target_context.codegen().magic_tuple())
    return hashlib.sha256(made_for.encode()).hexdigest()[:8]
