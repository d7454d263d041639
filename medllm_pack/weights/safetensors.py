"""Safetensors checkpoints, read strictly: headers first, then rows on demand.

Accepts less than the safetensors library does: no duplicate names, no holes, no zero-size
tensors, only floating-point types that a LLaMA checkpoint has, plain names. Reads with ``pread``
on one descriptor a file, never through a memory map, so that a file cut short while it is read is
an error and not a signal. Knows nothing of GGUF or adapters.

Memory: the headers, and the rows that were asked for.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medllm_pack.direct import PAGE, aligned, switch_on
from medllm_pack.errors import CheckpointError, shown
from medllm_pack.files import DigestBehind

DType = Literal["F16", "BF16", "F32"]
Values = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.float64]

_ITEM_BYTES: Mapping[str, int] = MappingProxyType({"F16": 2, "BF16": 2, "F32": 4})
_ITEM_MAX = max(_ITEM_BYTES.values())
# A 7B header has about 27 KB, a 70B one about 90 KB: the limits leave room and stop bombs.
_MAX_HEADER = 8 << 20
_MAX_TENSORS = 4096
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}\Z")
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")
_READ_CHUNK = 4 << 20
_SMALL_GAP = 1 << 20

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``start`` to ``stop`` of a tensor, as the bytes that were read."""

    spec: TensorSpec
    start: int
    stop: int
    data: NDArray[np.uint8]

    def values(self) -> NDArray[np.float16] | NDArray[np.float32]:
        """Return the exact values, shape (stop - start, columns); BF16 widens to float32."""
        shape = (self.stop - self.start, self.spec.shape[-1])
        match self.spec.dtype:
            case "F16":
                return self.data.view("<f2").reshape(shape)
            case "BF16":
                wide = self.data.view("<u2").astype(np.uint32) << np.uint32(16)
                return wide.view(np.float32).reshape(shape)
            case "F32":
                return self.data.view("<f4").reshape(shape)


class TensorFile:
    """One safetensors file: its header, its rows, and the digest of what was read.

    Read in the order of the file, the SHA-256 costs no second pass: every byte is hashed as it
    comes by. What was skipped or read out of order is read again for :meth:`digest`.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        """Open ``path`` and read its header.

        Raises:
            CheckpointError: if the file is missing or breaks a rule of the format.
        """
        self.name = name or path.name
        self._step = 1
        self._hash = DigestBehind()
        self._fd = _open_regular(path, self.name)
        try:
            self._status = os.fstat(self._fd)
            self._hashed = 0
            header, self._data_start = self._read_header()
            self.tensors = _parse_header(
                header, file=self.name, data_start=self._data_start, size=self.size
            )
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._status.st_size

    def read(self, spec: TensorSpec, start: int, stop: int) -> Rows:
        """Read rows ``start`` to ``stop`` of a tensor of this file."""
        offset = spec.offset + start * spec.row_bytes
        return Rows(spec, start, stop, self._pread(offset, (stop - start) * spec.row_bytes))

    def digest(self) -> str:
        """Return the SHA-256 of the file, reading what has not come by yet.

        Raises:
            CheckpointError: if the file changed since it was opened.
        """
        while self._hashed < self.size:
            self._pread(self._hashed, min(_READ_CHUNK, self.size - self._hashed))
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise CheckpointError(f"{shown(self.name)} changed while it was read; build again")
        return self._hash.hexdigest()

    def bypass_page_cache(self) -> None:
        """Read straight from the disk from now on, where the file system does it."""
        self._step = PAGE if switch_on(self._fd) else 1

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            self._hash.close()
            os.close(self._fd)
            self._fd = -1

    def _pread(self, offset: int, size: int) -> NDArray[np.uint8]:
        if self._hashed < offset <= self._hashed + _SMALL_GAP:
            self._pread(self._hashed, offset - self._hashed)  # a norm that was read ahead
        data = self._window(offset, offset + size)
        if offset == self._hashed:
            self._hash.update(data.data)
            self._hashed += size
        return data

    def _window(self, start: int, end: int) -> NDArray[np.uint8]:
        """Read bytes as part of the whole pages they lie in, if the page cache is bypassed."""
        first = start - start % self._step
        memory = aligned(end + -end % self._step - first)
        done = 0
        while first + done < end:
            n = os.preadv(self._fd, [memory.data[done:]], first + done)
            if n < self._step and first + done + n < end:
                raise CheckpointError(
                    f"{shown(self.name)} ends at byte {first + done + n}, inside its tensors; "
                    "it was cut short while it was read"
                )
            done += n if first + done + n >= end else n - n % self._step
        data = memory[start - first : end - first]
        # Numbers must not begin between two of their kind; a header of odd length moves them.
        return data if (start - first) % _ITEM_MAX == 0 else data.copy()

    def _read_header(self) -> tuple[bytes, int]:
        if self.size < 8:
            raise CheckpointError(
                f"{shown(self.name)} has {self.size} bytes; a safetensors file has at least 8"
            )
        prefix = self._pread(0, 8).tobytes()
        length = int.from_bytes(prefix, "little")
        if prefix.startswith(_PICKLE_STARTS) and length > _MAX_HEADER:
            raise CheckpointError(
                f"{shown(self.name)} is a pickle, not safetensors; pickles can run code and are "
                "never opened. Ask its author for safetensors"
            )
        if not 2 <= length <= min(_MAX_HEADER, self.size - 8):
            raise CheckpointError(
                f"{shown(self.name)} claims a header of {length} bytes in a file of {self.size}; "
                f"it is truncated or not safetensors (limit {_MAX_HEADER})"
            )
        return self._pread(8, length).tobytes(), 8 + length


class Checkpoint:
    """The tensors of one or several safetensors files, read as one model.

    Attributes:
        tensors: by name, in the order in which they lie in the files; reading them in this
            order reads every file once from start to end.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.files = {file.name: file for file in files}
        self.tensors: Mapping[str, TensorSpec] = MappingProxyType(_union(files))

    @classmethod
    def open(cls, paths: Mapping[str, Path]) -> Checkpoint:
        """Open a checkpoint from its files by name: a single file, or an index and its shards.

        Raises:
            CheckpointError: if a file is missing or damaged, or index and shards disagree.
        """
        if SINGLE in paths:
            return cls([TensorFile(paths[SINGLE], name=SINGLE)])
        if INDEX not in paths:
            raise CheckpointError(f"there is neither {SINGLE} nor {INDEX}")
        index = read_index(paths[INDEX])
        shards = sorted(set(index.values()))
        if missing := [shard for shard in shards if shard not in paths]:
            raise CheckpointError(
                f"{INDEX} names {len(shards)} shards; missing: {', '.join(missing)}. "
                "Download the checkpoint again"
            )
        opened: list[TensorFile] = []
        try:
            for shard in shards:
                opened.append(TensorFile(paths[shard], name=shard))
            checkpoint = cls(opened)
            _check_index(index, checkpoint.tensors)
        except BaseException:
            for file in opened:
                file.close()
            raise
        return checkpoint

    def read(self, name: str, start: int, stop: int) -> Rows:
        """Read rows ``start`` to ``stop`` of a tensor."""
        spec = self.tensors[name]
        return self.files[spec.file].read(spec, start, stop)

    def values(self, rows: Rows) -> Values:
        """Return the exact values of rows that were read."""
        return rows.values()

    def bypass_page_cache(self) -> None:
        """Read straight from the disk from now on, where the file system does it."""
        for file in self.files.values():
            file.bypass_page_cache()

    def digests(self) -> dict[str, tuple[int, str]]:
        """Return size and SHA-256 of every file, by name."""
        return {name: (file.size, file.digest()) for name, file in self.files.items()}

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()


def read_index(path: Path) -> dict[str, str]:
    """Return the weight map of an index: tensor name -> shard file name.

    Raises:
        CheckpointError: if it is no such index, or names a file outside its folder.
    """
    document = strict_json(path.read_bytes(), what=INDEX)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", shard):
            raise CheckpointError(
                f"{INDEX} names the shard {shown(shard)}; only plain *.safetensors names are read"
            )
    return weight_map


def strict_json(data: bytes, *, what: str) -> dict[str, Any]:
    """Parse a JSON object; refuse duplicate keys and non-finite numbers.

    Raises:
        CheckpointError: naming ``what``.
    """
    try:
        document = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers could disagree on which of two equal keys counts.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(double)} stands twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _open_regular(path: Path, name: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{shown(name)} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{shown(name)} is not a regular file")
    return fd


def _parse_header(
    header: bytes, *, file: str, data_start: int, size: int
) -> tuple[TensorSpec, ...]:
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
    if not _is_sizes(shape, least=1) or not 1 <= len(shape) <= 2:
        raise CheckpointError(f"{where} has the shape {shown(shape)}; one or two sizes are read")
    if not _is_sizes(offsets, least=0) or len(offsets) != 2:
        raise CheckpointError(f"{where} has the offsets {shown(offsets)}")
    return TensorSpec(name, dtype, tuple(shape), file, 0), offsets[0], offsets[1]


def _is_sizes(value: Any, *, least: int) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and least <= item < 1 << 53 for item in value
    )


def _union(files: Iterable[TensorFile]) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for file in files:
        for spec in file.tensors:
            if spec.name in tensors:
                raise CheckpointError(
                    f"tensor {shown(spec.name)} is in {tensors[spec.name].file} and in {file.name}"
                )
            tensors[spec.name] = spec
    return tensors


def _check_index(index: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> None:
    for name, shard in index.items():
        if name not in tensors or tensors[name].file != shard:
            raise CheckpointError(f"{INDEX} says that {shown(name)} is in {shard}; it is not")
    if extra := tensors.keys() - index.keys():
        raise CheckpointError(f"{INDEX} does not name {shown(min(extra))}, which a shard holds")
