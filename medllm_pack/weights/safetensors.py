"""One safetensors file: its header first, then rows on demand, and the digest of what was read.

Reads with ``pread`` on one descriptor, never through a memory map, so that a file cut short while
it is read is an error and not a signal. Knows nothing of GGUF, adapters or the other shards.

Memory: the header, the rows that were asked for, at most :data:`WAITING_BYTES` of those that were
read before their turn, and the pieces that are being digested. What was read too early for that
waits in the page cache, which the system takes back when it needs it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medllm_pack.direct import PAGE, aligned, switch_on
from medllm_pack.errors import CheckpointError, shown
from medllm_pack.files import DigestBehind
from medllm_pack.known import Identity
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
_NEAR = 1 << 30  # what is further from its turn would keep its place for long
_SMALL = 1 << 20  # a norm is kept however far its turn is


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
    turn waits for it, in memory or in the page cache. What was skipped is read for :meth:`digest`.
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
        self._fd = self._cached = _open_regular(path, self.name)
        try:
            self._identity = Identity.of(self._fd)
            self._hashed = 0
            self._waiting: dict[int, NDArray[np.uint8]] = {}
            self._waiting_bytes = 0
            self._passed: dict[int, int] = {}  # offset -> size of what waits in the page cache
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._identity.size

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
            known = (*self._waiting, *self._passed)
            later = (offset for offset in known if offset > self._hashed)
            end = min(self._hashed + _READ_CHUNK, self.size, *later)
            self._pread(self._hashed, end - self._hashed)
        if Identity.of(self._fd) != self._identity:  # what waited in the page cache is read twice
            raise CheckpointError(f"{shown(self.name)} changed while it was read; build again")
        return self._hash.hexdigest()

    def bypass_page_cache(self) -> None:
        """Read straight from the disk from now on, where the file system does it."""
        try:
            cached = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        if switch_on(self._fd):
            self._step, self._cached = PAGE, cached
        else:
            os.close(cached)

    def close(self) -> None:
        """Give the descriptors back."""
        if self._fd >= 0:
            self._hash.close()
            for fd in {self._fd, self._cached}:
                os.close(fd)
            self._fd = self._cached = -1

    def _pread(self, offset: int, size: int) -> NDArray[np.uint8]:
        if offset <= self._hashed:
            data = self._window(offset, offset + size)
            if offset == self._hashed:
                self._take(data)
                self._take_what_waits()
        elif self._is_kept(offset, size):
            data = self._window(offset, offset + size)
            self._waiting_bytes += size - len(self._waiting.get(offset, b""))
            self._waiting[offset] = data
        else:
            data = aligned(size)
            self._fill(data, offset, fd=self._cached)
            self._passed[offset] = size
        return data

    def _is_kept(self, offset: int, size: int) -> bool:
        """Say whether what comes before its turn waits in memory of the process."""
        soon = size <= _SMALL or offset - self._hashed <= _NEAR
        return soon and self._waiting_bytes + size <= WAITING_BYTES

    def _take(self, data: NDArray[np.uint8]) -> None:
        self._hash.update(data.data)
        self._hashed += data.size

    def _take_what_waits(self) -> None:
        """Give to the digest what has its turn now."""
        while True:
            if (data := self._waiting.pop(self._hashed, None)) is not None:
                self._waiting_bytes -= data.size
                self._take(data)
            elif (start := self._hashed) in self._passed:
                # In one piece, so that reading does not wait for it.
                while self._hashed in self._passed and self._hashed not in self._waiting:
                    self._hashed += self._passed.pop(self._hashed)
                self._hash.update_from(self._again(start, self._hashed))
            else:
                return

    def _again(self, start: int, end: int) -> Iterator[memoryview]:
        """Yield what was read before its turn, from the page cache if it is still there."""
        memory = aligned(_READ_CHUNK)
        for position in range(start, end, _READ_CHUNK):
            part = memory[: end - position]
            self._fill(part, position, fd=self._cached)
            yield part.data
        if self._cached != self._fd:  # nobody but this build wanted it there
            os.posix_fadvise(self._cached, start, end - start, os.POSIX_FADV_DONTNEED)

    def _window(self, start: int, end: int) -> NDArray[np.uint8]:
        """Read bytes as part of the whole pages they lie in, if the page cache is bypassed."""
        first = start - start % self._step
        memory = aligned(end + -end % self._step - first)
        self._fill(memory, first, fd=self._fd, step=self._step, needed=end - first)
        data = memory[start - first : end - first]
        # Numbers must not begin between two of their kind; a header of odd length moves them.
        return data if (start - first) % ITEM_MAX == 0 else data.copy()

    def _fill(
        self,
        memory: NDArray[np.uint8],
        start: int,
        *,
        fd: int,
        step: int = 1,
        needed: int | None = None,
    ) -> None:
        """Read from ``start`` on, at least as much as is needed; all of the memory if None."""
        needed = memory.size if needed is None else needed
        done = 0
        while done < needed:
            n = self._read_into(memory.data[done:], start + done, fd)
            if n < step and done + n < needed:
                raise CheckpointError(
                    f"{shown(self.name)} ends at byte {start + done + n}, inside its tensors; "
                    "it was cut short while it was read"
                )
            done += n if done + n >= needed else n - n % step

    def _read_into(self, memory: memoryview, position: int, fd: int) -> int:
        try:
            return os.preadv(fd, [memory], position)
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
