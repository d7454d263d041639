"""The header of one safetensors file: from its bytes to the place of every tensor.

Accepts less than the safetensors library does: no duplicate names, no holes, no zero-size
tensors, only floating-point types that a LLaMA checkpoint has, plain names. Opens nothing; the
bytes are another's to read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from medllm_pack.errors import CheckpointError, shown
from medllm_pack.weights.documents import strict_json

DType = Literal["F16", "BF16", "F32"]
PREFIX_BYTES: Final = 8  # the length of the header, little-endian

_ITEM_BYTES: Mapping[str, int] = MappingProxyType({"F16": 2, "BF16": 2, "F32": 4})
ITEM_MAX: Final = max(_ITEM_BYTES.values())  # bytes of the largest number
# A 7B header has about 27 KB, a 70B one about 90 KB: the limits leave room and stop bombs.
_MAX_HEADER = 8 << 20
_MAX_TENSORS = 4096
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}\Z")
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a header describes it.

    Attributes:
        name: its name in the checkpoint.
        dtype: the type its bytes are stored in.
        shape: row-major, one or two dimensions for every LLaMA tensor.
        file: name of the file that holds it.
        offset: first byte, counted from the start of the file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def rows(self) -> int:
        """Rows of a matrix; 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] * _ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def header_length(prefix: bytes, *, file: str, size: int) -> int:
    """Return how many bytes of header follow the first bytes of a file.

    Args:
        prefix: the first ``PREFIX_BYTES`` of the file.
        file: name of the file.
        size: bytes of the file.

    Raises:
        CheckpointError: if it is a pickle, truncated, or something else.
    """
    length = int.from_bytes(prefix, "little")
    if prefix.startswith(_PICKLE_STARTS) and length > _MAX_HEADER:
        raise CheckpointError(
            f"{shown(file)} is a pickle, not safetensors; pickles can run code and are "
            "never opened. Ask its author for safetensors"
        )
    if not 2 <= length <= min(_MAX_HEADER, size - PREFIX_BYTES):
        raise CheckpointError(
            f"{shown(file)} claims a header of {length} bytes in a file of {size}; "
            f"it is truncated or not safetensors (limit {_MAX_HEADER})"
        )
    return length


def parse_header(header: bytes, *, file: str, data_start: int, size: int) -> tuple[TensorSpec, ...]:
    """Return the tensors of a file in the order in which they lie there.

    Args:
        header: the JSON between the length and the data.
        file: name of the file.
        data_start: where the data begins.
        size: bytes of the file.

    Raises:
        CheckpointError: if the header breaks a rule or does not describe the whole file.
    """
    if not header.startswith(b"{"):
        raise CheckpointError(f"{shown(file)} has no safetensors header; is it another format?")
    document = strict_json(header, what=f"the header of {shown(file)}")
    document.pop("__metadata__", None)
    if not 0 < len(document) <= _MAX_TENSORS:
        raise CheckpointError(
            f"{shown(file)} has {len(document)} tensors; 1 to {_MAX_TENSORS} are accepted"
        )
    entries = [_parse_entry(name, entry, file) for name, entry in document.items()]
    entries.sort(key=lambda item: item[1])
    position = 0
    for spec, begin, end in entries:
        if begin != position or end - begin != spec.nbytes:
            raise CheckpointError(
                f"tensor {shown(spec.name)} in {shown(file)} claims bytes {begin} to {end}; "
                f"its type and shape need {spec.nbytes} bytes from {position}"
            )
        position = end
    if data_start + position != size:
        raise CheckpointError(
            f"{shown(file)} has {size} bytes, its header describes {data_start + position}; "
            "it is truncated or damaged. Download it again"
        )
    return tuple(
        TensorSpec(spec.name, spec.dtype, spec.shape, file, data_start + begin)
        for spec, begin, _ in entries
    )


def _parse_entry(name: str, entry: Any, file: str) -> tuple[TensorSpec, int, int]:
    where = f"tensor {shown(name)} in {shown(file)}"
    if not _NAME.match(name):
        raise CheckpointError(f"{where} has a name that no LLaMA tensor has")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in get_args(DType):
        raise CheckpointError(
            f"{where} has the type {shown(dtype)}; F16, BF16 and F32 are read. "
            "Quantized checkpoints must be dequantized by their own tool first"
        )
    if shape == [0]:
        raise CheckpointError(
            f"{where} is empty; a sharded model (DeepSpeed ZeRO-3, FSDP) was saved without "
            "gathering its parts. Save it again with them gathered"
        )
    if not _is_sizes(shape, least=1) or not 1 <= len(shape) <= 2:
        raise CheckpointError(f"{where} has the shape {shown(shape)}; one or two sizes are read")
    if not _is_sizes(offsets, least=0) or len(offsets) != 2:
        raise CheckpointError(f"{where} has the offsets {shown(offsets)}")
    return TensorSpec(name, dtype, tuple(shape), file, 0), offsets[0], offsets[1]


def _is_sizes(value: Any, *, least: int) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and least <= item < 1 << 53 for item in value
    )
