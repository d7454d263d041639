"""The planned file: header bytes, and a place for every tensor, before the first weight is read.

The order is llama.cpp's own (``gguf_write_out`` and the sorted map of its model loader), so that a
file is a fixed point of llama.cpp's copy and keeps its digest through ``ollama create``. Blocks
may then be written in any order, by any thread. Knows nothing of where the weights come from.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, Keys

ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT; llama.cpp's copy always writes with it
MAGIC = b"GGUF"
VERSION = 3
_BLOCK = re.compile(r"blk\.(\d+)\.")

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One key-value pair of the metadata.

    Attributes:
        key: such as ``llama.block_count``.
        type: the value's GGUF type; of the items, where the value is a tuple.
        value: a scalar, or a tuple of scalars for an array.
    """

    key: str
    type: GGUFValueType
    value: Scalar | tuple[Scalar, ...]

    def encode(self) -> bytes:
        """Return the bytes of the pair as they stand in the header."""
        if isinstance(self.value, tuple):
            head = struct.pack("<IIQ", GGUFValueType.ARRAY, self.type, len(self.value))
            return encode_string(self.key) + head + _encode_items(self.type, self.value)
        head = struct.pack("<I", self.type)
        return encode_string(self.key) + head + _encode_items(self.type, (self.value,))


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor in a file.

    Attributes:
        name: GGUF name, such as ``blk.0.attn_q.weight``.
        shape: row-major, (rows, columns) or (columns,).
        type: ggml type name, such as ``Q4_K``.
        offset: first byte in the file.
        nbytes: bytes without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return row_bytes(self.type, self.shape[-1])


@dataclass(frozen=True)
class Layout:
    """A whole file but for its weights.

    Attributes:
        header: magic, metadata and tensor table, padded up to the first tensor.
        slots: in the order of the file.
        size: bytes of the finished file, the padding after the last tensor included.
    """

    header: bytes
    slots: tuple[Slot, ...]
    size: int

    @cached_property
    def by_name(self) -> Mapping[str, Slot]:
        """Slots by tensor name."""
        return {slot.name: slot for slot in self.slots}

    @property
    def parameters(self) -> int:
        """Number of weights in all tensors."""
        return sum(math.prod(slot.shape) for slot in self.slots)

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have each type."""
        return dict(sorted(Counter(slot.type for slot in self.slots).items()))

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data for one weight."""
        return 8 * sum(slot.nbytes for slot in self.slots) / self.parameters


def lay_out(
    metadata: Sequence[Entry],
    tensors: Iterable[tuple[str, tuple[int, ...], str]],
    *,
    file_type: int,
) -> Layout:
    """Plan a file.

    Args:
        metadata: all pairs but the two that llama.cpp sets anew at the end of every file it
            writes, ``general.quantization_version`` and ``general.file_type``.
        tensors: name, shape and type of each tensor, in any order.
        file_type: the LLAMA_FTYPE number.
    """
    last = (
        Entry(Keys.General.QUANTIZATION_VERSION, GGUFValueType.UINT32, GGML_QUANT_VERSION),
        Entry(Keys.General.FILE_TYPE, GGUFValueType.UINT32, file_type),
    )
    pairs = [entry.encode() for entry in (*metadata, *last)]
    ordered = sorted(tensors, key=lambda item: order_key(item[0]))
    table, offset, places = bytearray(), 0, []
    for name, shape, kind in ordered:
        nbytes = math.prod(shape[:-1]) * row_bytes(kind, shape[-1])
        table += _encode_tensor(name, shape, kind, offset)
        places.append((offset, nbytes))
        offset += padded(nbytes)
    head = struct.pack("<4sIQQ", MAGIC, VERSION, len(ordered), len(pairs))
    header = b"".join((head, *pairs, table))
    header += bytes(padded(len(header)) - len(header))
    slots = tuple(
        Slot(name, shape, kind, len(header) + place, nbytes)
        for (name, shape, kind), (place, nbytes) in zip(ordered, places, strict=True)
    )
    return Layout(header, slots, len(header) + offset)


def order_key(name: str) -> tuple[int, bytes]:
    """Return the sort key of llama.cpp's weight map: block number, then the name's bytes."""
    match = _BLOCK.match(name)
    return (int(match[1]) if match else -1, name.encode())


def row_bytes(kind: str, columns: int) -> int:
    """Return the bytes of a row of ``columns`` weights in a ggml type (``ggml_row_size``).

    Raises:
        ValueError: if the row is not a whole number of the type's blocks.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if columns % block:
        raise ValueError(
            f"a row of {columns} weights does not divide into {kind} blocks of {block}"
        )
    total: int = columns // block * size
    return total


def padded(size: int) -> int:
    """Round a size up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode_string(text: str) -> bytes:
    """Return a GGUF string: its length in 8 bytes, then its UTF-8."""
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


_PACK = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip


def _encode_items(kind: GGUFValueType, items: Sequence[Scalar]) -> bytes:
    if kind == GGUFValueType.STRING:
        return b"".join(encode_string(str(item)) for item in items)
    return struct.pack(f"<{len(items)}{_PACK[kind]}", *items)


def _encode_tensor(name: str, shape: tuple[int, ...], kind: str, offset: int) -> bytes:
    # ggml counts dimensions from the fastest: columns first.
    dims = shape[::-1]
    return encode_string(name) + struct.pack(
        f"<I{len(dims)}QIQ", len(dims), *dims, GGMLQuantizationType[kind], offset
    )
