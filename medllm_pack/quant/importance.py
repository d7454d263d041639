"""Importance matrices: what llama.cpp's imatrix tool wrote, as one weight a column.

Reads the GGUF form (general.type = imatrix): ``NAME.in_sum2``, sums of squared activations, and
``NAME.counts``. Paths and data set names that such a file carries are left behind: they may tell
where clinical texts lie. Knows nothing of quantization.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medllm_pack import files
from medllm_pack.errors import GGUFError, ImportanceError, shown
from medllm_pack.gguf.layout import Slot
from medllm_pack.gguf.reader import read_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """An importance matrix.

    Attributes:
        weights: GGUF tensor name -> float32 weights, shape (columns,).
        sha256: digest of the file it came from.
    """

    weights: Mapping[str, NDArray[np.float32]]
    sha256: str


def read_importance(path: Path) -> Importance:
    """Read an importance matrix in GGUF form.

    Raises:
        ImportanceError: if it is damaged, of another format, or holds what is not a number.
    """
    try:
        header = read_gguf(path)
    except GGUFError as error:
        raise ImportanceError(
            f"{error}. Importance matrices are read in GGUF form; convert an old .dat with "
            "llama-imatrix --in-file OLD -o NEW.gguf"
        ) from error
    if header.metadata.get("general.type") != "imatrix":
        raise ImportanceError(f"{shown(path.name)} is a GGUF file, but no importance matrix")
    slots = {slot.name: slot for slot in header.tensors}
    with path.open("rb") as file:
        weights = {
            name.removesuffix(_SUMS): _weights(file.fileno(), name.removesuffix(_SUMS), slots)
            for name in slots
            if name.endswith(_SUMS)
        }
    if not weights:
        raise ImportanceError(f"{shown(path.name)} holds no weights")
    return Importance(weights, files.sha256(path))


def _weights(fd: int, name: str, slots: Mapping[str, Slot]) -> NDArray[np.float32]:
    """Return mean squared activations; columns never seen count as 1, as llama-quantize does."""
    if name + _COUNTS not in slots:
        raise ImportanceError(f"the importance matrix has sums but no counts for {shown(name)}")
    sums, counts = (_read(fd, slots[name + suffix]) for suffix in (_SUMS, _COUNTS))
    if counts.size != 1 or sums.ndim != 1 and sums.shape[0] != 1:
        raise ImportanceError(f"{shown(name)} has the weights of several experts")
    count = counts.reshape(-1)[0]
    values = sums.reshape(-1) / count if count > 0 else np.ones(sums.size, dtype=np.float32)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ImportanceError(f"the importance matrix of {shown(name)} is not finite and positive")
    return np.ascontiguousarray(values, dtype=np.float32)


def _read(fd: int, slot: Slot) -> NDArray[np.float32]:
    if slot.type != "F32":
        raise ImportanceError(f"the importance matrix stores {shown(slot.name)} as {slot.type}")
    return np.frombuffer(os.pread(fd, slot.nbytes, slot.offset), "<f4").reshape(slot.shape)
