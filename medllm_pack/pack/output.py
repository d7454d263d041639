"""A GGUF file being filled: of its full size at once, written by any thread, digested behind.

Blocks arrive in any order; a SHA-256 needs them in the order of the file. A thread of its own
follows the part that is complete from the start, reads it back and digests it while later blocks
are still being made. So the digest is of what the file holds, not of what was meant to be written,
and costs no pass of its own.

Memory: one buffer a file.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medllm_pack.errors import WriteError
from medllm_pack.gguf.layout import Layout

_CHUNK = 4 << 20


class Output:
    """A file of a known layout; use :meth:`write` for rows, then :meth:`finish`."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Create the file at its full size and write its header.

        Raises:
            OSError: if the disk says no.
        """
        self.layout = layout
        self.name = path.name
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._written = _Prefix()
        self._changed = threading.Condition()
        self._stopped = False
        self._error: OSError | None = None
        self._digest = hashlib.sha256()
        # A daemon: an interrupt while it starts must not leave a process that waits for it.
        self._follower = threading.Thread(
            target=self._follow, name=f"digest {self.name}", daemon=True
        )
        try:
            # A hole of the full size: the padding between tensors stays zero. Not fallocate, which
            # takes five times the system time (docs/log.md); the plan has looked at the free space,
            # and a disk that fills up meanwhile fails the write that finds no room.
            os.ftruncate(self._fd, layout.size)
            for slot, following in zip(layout.slots, (*layout.slots[1:], None), strict=True):
                end = following.offset if following else layout.size
                self._written.add(slot.offset + slot.nbytes, end)
            self.write(0, layout.header)
            self._follower.start()
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: bytes | NDArray[np.uint8]) -> None:
        """Write bytes at their place; every byte of the file is written once."""
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        start, end = offset, offset + len(view)
        while view:
            n = os.pwrite(self._fd, view, offset)
            view, offset = view[n:], offset + n
        with self._changed:
            self._written.add(start, end)
            self._changed.notify()

    def finish(self) -> str:
        """Wait until all is digested and on the disk; return the SHA-256.

        Raises:
            WriteError: if a part was never written.
            OSError: if the disk says no.
        """
        with self._changed:
            if self._written.end != self.layout.size:
                raise WriteError(f"{self.name} is complete only up to byte {self._written.end}")
        self._follower.join()
        if self._error is not None:
            raise self._error
        os.fsync(self._fd)
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stop the digest and close the file, finished or not."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._follower.is_alive():
            self._follower.join()
        os.close(self._fd)

    def _follow(self) -> None:
        position, buffer = 0, memoryview(bytearray(_CHUNK))
        try:
            while position < self.layout.size and (end := self._wait_beyond(position)):
                n = os.preadv(self._fd, [buffer[: end - position]], position)
                self._digest.update(buffer[:n])
                position += n
        except OSError as error:
            self._error = error

    def _wait_beyond(self, position: int) -> int:
        """Return where the complete part ends once that is beyond ``position``; 0 if stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._written.end > position)
            return 0 if self._stopped else self._written.end


class _Prefix:
    """The part of a file that is complete from its start, while pieces come in any order."""

    def __init__(self) -> None:
        self.end = 0
        self._ahead: dict[int, int] = {}

    def add(self, start: int, end: int) -> None:
        if start == end:
            return
        if start < self.end or start in self._ahead:
            raise AssertionError(f"bytes {start} to {end} are written twice")
        self._ahead[start] = end
        while self.end in self._ahead:
            self.end = self._ahead.pop(self.end)
