"""One safetensors file: its header first, then rows on demand, and the digest of what was read.

Reads with ``pread`` on one descriptor, never through a memory map, so that a file cut short while
it is read is an error and not a signal. Knows nothing of GGUF, adapters or the other shards.

Memory: the header, the rows that were asked for, at most :data:`WAITING_BYTES` of those that were
read before their turn, and the pieces that are being digested.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medllm_pack.direct import PAGE, aligned, switch_on
from medllm_pack.errors import CheckpointError, shown
from medllm_pack.files import DigestBehind
from medllm_pack.weights.header import (
    ITEM_MAX,
    PREFIX_BYTES,
    TensorSpec,
    header_length,
    parse_header,
)

Values = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.float64]

_READ_CHUNK = 4 << 20
_BEHIND = 32  # pieces that are digested while others are read
WAITING_BYTES = 160 << 20  # read before their turn and kept for the digest; a 7B's attention in F16


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

    The SHA-256 costs no second pass: every byte is hashed as it comes by, and what comes before its
    turn is kept until then. What was skipped, or found no room, is read for :meth:`digest`.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        """Open ``path`` and read its header.

        Raises:
            CheckpointError: if the file is missing or breaks a rule of the format.
        """
        self.name = name or path.name
        self._step = 1
        # Many pieces may have their turn at once; reading goes on meanwhile.
        self._hash = DigestBehind(behind=_BEHIND)
        self._fd = _open_regular(path, self.name)
        try:
            self._status = os.fstat(self._fd)
            self._hashed = 0
            self._waiting: dict[int, NDArray[np.uint8]] = {}
            self._waiting_bytes = 0
            self.tensors = self._read_header()
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
            later = (offset for offset in self._waiting if offset > self._hashed)
            end = min(self._hashed + _READ_CHUNK, self.size, *later)
            self._pread(self._hashed, end - self._hashed)
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
        data = self._window(offset, offset + size)
        if offset > self._hashed and self._waiting_bytes + size <= WAITING_BYTES:
            self._waiting_bytes += size - len(self._waiting.get(offset, b""))
            self._waiting[offset] = data
        turn: NDArray[np.uint8] | None = data if offset == self._hashed else None
        while turn is not None:
            self._hash.update(turn.data)
            self._hashed += turn.size
            turn = self._waiting.pop(self._hashed, None)
            self._waiting_bytes -= 0 if turn is None else turn.size
        return data

    def _window(self, start: int, end: int) -> NDArray[np.uint8]:
        """Read bytes as part of the whole pages they lie in, if the page cache is bypassed."""
        first = start - start % self._step
        memory = aligned(end + -end % self._step - first)
        done = 0
        while first + done < end:
            n = self._read_into(memory.data[done:], first + done)
            if n < self._step and first + done + n < end:
                raise CheckpointError(
                    f"{shown(self.name)} ends at byte {first + done + n}, inside its tensors; "
                    "it was cut short while it was read"
                )
            done += n if first + done + n >= end else n - n % self._step
        data = memory[start - first : end - first]
        # Numbers must not begin between two of their kind; a header of odd length moves them.
        return data if (start - first) % ITEM_MAX == 0 else data.copy()

    def _read_into(self, memory: memoryview, position: int) -> int:
        try:
            return os.preadv(self._fd, [memory], position)
        except OSError as error:
            raise CheckpointError(
                f"{shown(self.name)} cannot be read at byte {position}: {error.strerror}; if the "
                "disk it lies on fails, get the file again"
            ) from error

    def _read_header(self) -> tuple[TensorSpec, ...]:
        if self.size < PREFIX_BYTES:
            raise CheckpointError(
                f"{shown(self.name)} has {self.size} bytes; a safetensors file has at least 8"
            )
        prefix = self._pread(0, PREFIX_BYTES).tobytes()
        length = header_length(prefix, file=self.name, size=self.size)
        header = self._pread(PREFIX_BYTES, length).tobytes()
        start = PREFIX_BYTES + length
        return parse_header(header, file=self.name, data_start=start, size=self.size)


def _open_regular(path: Path, name: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{shown(name)} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{shown(name)} is not a regular file")
    return fd
