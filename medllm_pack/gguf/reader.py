"""A strict reader of GGUF headers, for files of ours and of others.

Stricter than llama.cpp and gguf-py: every count is checked against the bytes that are left before
anything is allocated, tensors must lie one after the other with only padding between, and nothing
may follow the last one. Every fault is a GGUFError. No numpy here: its integers wrap.

Memory: the header. The weights are never read.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, Keys

from medllm_pack.errors import GGUFError, shown
from medllm_pack.files import without_waiting
from medllm_pack.gguf.layout import MAGIC, Slot

_MAX_PAIRS, _MAX_TENSORS, _MAX_KEY = 4096, 65536, 255
_MAX_STRING, _MAX_ITEMS, _MAX_NAME = 16 << 20, 1 << 24, 63
_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h", GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d", GGUFValueType.BOOL: "<B",
}  # fmt: skip


class Readable(Protocol):
    """Whatever gives bytes from its start on."""

    def read(self, n: int, /) -> bytes:
        """Return the next ``n`` bytes, fewer at the end."""


@dataclass(frozen=True)
class GGUFFile:
    """What the header of a GGUF file says.

    Attributes:
        metadata: values by key, in the order of the file; arrays as tuples.
        tensors: every tensor with its place, in the order of the file.
        size: bytes of the whole file.
        data_offset: first byte of tensor data.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[Slot, ...]
    size: int
    data_offset: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file.

    Raises:
        GGUFError: if the file breaks a rule of the format, naming the field.
    """
    try:
        with open(path, "rb", opener=without_waiting) as file:
            return read_header(file, size=os.fstat(file.fileno()).st_size, name=path.name)
    except OSError as error:
        raise GGUFError(f"{shown(path)} cannot be read: {error.strerror}") from error


def read_header(file: Readable, *, size: int, name: str) -> GGUFFile:
    """Read a header from the start of a file, wherever it lies; nothing behind it is read.

    Args:
        file: read forward only.
        size: of the whole file.
        name: for messages.

    Raises:
        GGUFError: if the file breaks a rule of the format, naming the field.
    """
    try:
        return _Parser(file, size).parse()
    except GGUFError as error:
        raise GGUFError(f"{shown(name)} is not a sound GGUF file: {error}") from error


class _Parser:
    """Walks through a header; every read is checked against the bytes that are left."""

    def __init__(self, file: Readable, size: int) -> None:
        self.file, self.size, self.position = file, size, 0

    def parse(self) -> GGUFFile:
        magic = self.take(4, "the magic")
        if magic != MAGIC:
            raise GGUFError(f"it starts with {magic!r}, not {MAGIC!r}")
        version = self.scalar(GGUFValueType.UINT32, "the version")
        if version not in _VERSIONS:
            raise GGUFError(f"its version is {version}; versions 2 and 3 are read")
        n_tensors = self.count("the number of tensors", most=_MAX_TENSORS)
        n_pairs = self.count("the number of pairs", most=_MAX_PAIRS)
        metadata = self.pairs(n_pairs)
        alignment = _alignment(metadata)
        table = [self.tensor_info() for _ in range(n_tensors)]
        data = -(-self.position // alignment) * alignment
        tensors = _place(table, data=data, alignment=alignment, size=self.size)
        return GGUFFile(MappingProxyType(metadata), tensors, self.size, data)

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.position:
            raise GGUFError(f"{what} needs {n} bytes at {self.position}, the file has {self.size}")
        data = self.file.read(n)
        if len(data) != n:
            raise GGUFError(f"{what} could not be read whole")
        self.position += n
        return data

    def scalar(self, kind: GGUFValueType, what: str) -> Any:
        form = _SCALARS[kind]
        value = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        if kind == GGUFValueType.BOOL:
            if value > 1:
                raise GGUFError(f"{what} is {value}, not a boolean")
            return bool(value)
        return value

    def count(self, what: str, *, most: int) -> int:
        value: int = self.scalar(GGUFValueType.UINT64, what)
        if value > most:
            raise GGUFError(f"{what} is {value}; at most {most} are accepted")
        return value

    def string(self, what: str, *, most: int = _MAX_STRING) -> str:
        data = self.take(self.count(f"the length of {what}", most=most), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"{what} is not UTF-8") from error

    def value_type(self, what: str) -> GGUFValueType:
        number = self.scalar(GGUFValueType.UINT32, f"the type of {what}")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise GGUFError(f"{what} has the unknown type {number}") from error

    def pairs(self, n: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(n):
            key = self.string("a key", most=_MAX_KEY)
            if not key or key in metadata:
                raise GGUFError(f"the key {shown(key)} is empty or stands twice")
            metadata[key] = self.value(self.value_type(shown(key)), shown(key))
        return metadata

    def value(self, kind: GGUFValueType, what: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string(what)
        if kind != GGUFValueType.ARRAY:
            return self.scalar(kind, what)
        item = self.value_type(f"the items of {what}")
        if item == GGUFValueType.ARRAY:
            raise GGUFError(f"{what} is an array of arrays")
        return self.array(item, what)

    def array(self, kind: GGUFValueType, what: str) -> tuple[Any, ...]:
        n = self.count(f"the length of {what}", most=_MAX_ITEMS)
        least = 8 if kind == GGUFValueType.STRING else struct.calcsize(_SCALARS[kind])
        if n * least > self.size - self.position:
            raise GGUFError(f"{what} claims {n} items; the file has too few bytes for them")
        if kind in (GGUFValueType.STRING, GGUFValueType.BOOL):
            return tuple(self.value(kind, what) for _ in range(n))
        return struct.unpack(f"<{n}{_SCALARS[kind][1]}", self.take(n * least, what))

    def tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self.string("a tensor name", most=_MAX_NAME)
        what = f"tensor {shown(name)}"
        n_dims = self.scalar(GGUFValueType.UINT32, f"the dimensions of {what}")
        if not 1 <= n_dims <= 4:
            raise GGUFError(f"{what} has {n_dims} dimensions")
        dims = [self.count(f"a size of {what}", most=1 << 48) for _ in range(n_dims)]
        if not all(dims):
            raise GGUFError(f"{what} has a size of zero")
        number = self.scalar(GGUFValueType.UINT32, f"the type of {what}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise GGUFError(f"{what} has the unknown type {number}") from error
        offset = self.scalar(GGUFValueType.UINT64, f"the offset of {what}")
        if dims[0] % GGML_QUANT_SIZES[kind][0]:
            raise GGUFError(f"{what} has rows of {dims[0]} weights, no multiple of its block")
        return name, tuple(reversed(dims)), kind.name, offset


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get(Keys.General.ALIGNMENT, 32)
    if type(value) is not int or not 8 <= value <= 4096 or value & (value - 1):
        raise GGUFError(f"general.alignment is {shown(value)}, not a power of two from 8 to 4096")
    return value


def _place(
    table: list[tuple[str, tuple[int, ...], str, int]], *, data: int, alignment: int, size: int
) -> tuple[Slot, ...]:
    slots, position, names = [], 0, set()
    for name, shape, kind, offset in table:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        nbytes = math.prod(shape) // block * block_bytes
        if name in names:
            raise GGUFError(f"tensor {shown(name)} stands twice")
        if offset != position:
            raise GGUFError(f"tensor {shown(name)} lies at {offset}; {position} is next")
        names.add(name)
        slots.append(Slot(name, shape, kind, data + offset, nbytes))
        position += -(-nbytes // alignment) * alignment
    if data + position != size:
        raise GGUFError(f"it has {size} bytes, its header describes {data + position}")
    return tuple(slots)
