"""A file that grows from its start, as bytes come from a network: digested and written behind.

Two threads of its own take the digest and write while the caller receives the next bytes; whole
windows go past the page cache. However a run ends, the file holds good bytes from its start to its
end and nothing else, so that another run can go on with it. Knows nothing of networks. Memory: the
windows.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from medllm_pack.direct import aligned, switch_off, switch_on

_WINDOW: Final = 8 << 20  # whole pages; smaller ones take longer (docs/log.md)
_WINDOWS: Final = 3
_KEEP_S: Final = 0.25  # after which what came is written although it fills no window
_PASSING: Final = 256 << 10


Hasher = Callable[[], Any]


class Passing:
    """Takes the place of an :class:`Incoming` where nothing is to be kept but the SHA-256.

    Attributes:
        offset: bytes that were taken.
        furthest: the same at its largest.
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self.furthest = advance, 0
        self._room = memoryview(bytearray(_PASSING))
        self.restart()

    def take_up(self, most: int) -> None:
        """Begin; there is nothing of an earlier run."""

    def room(self) -> memoryview:
        """Return the memory that the next bytes belong into."""
        return self._room

    def filled(self, n_bytes: int) -> None:
        """Take what was put at the start of the room."""
        self._hash.update(self._room[:n_bytes])
        self.offset += n_bytes
        if self.offset > self.furthest:
            self._advance(self.offset - self.furthest)
            self.furthest = self.offset

    def restart(self) -> None:
        """Forget what was taken."""
        self.offset, self._hash = 0, hashlib.sha256()

    def finish(self) -> str:
        """Return the digest of what was taken."""
        return self._hash.hexdigest()


class Incoming:
    """A partial file being filled; use it as a context manager, or close it.

    Every method raises OSError if the disk says no, also for what was given to an earlier one.

    Attributes:
        furthest: the largest offset so far.
    """

    def __init__(
        self,
        fd: int,
        advance: Callable[[int], None],
        *,
        hasher: Hasher = hashlib.sha256,
        shared: bool = False,
    ) -> None:
        """Take over an open file, also its closing.

        Args:
            fd: open for reading and writing.
            advance: told of bytes that were added, of each position once.
            hasher: makes a fresh hash.
            shared: another process may write the same bytes to the same places, so nothing is cut
                off; what lies behind the last byte is then the caller's to cut.
        """
        self._fd, self._hasher, self._shared = fd, hasher, shared
        self._advance, self.furthest = advance, 0
        self._windows = [aligned(_WINDOW).data for _ in range(_WINDOWS)]
        self._pending: list[list[Future[None]]] = [[] for _ in range(_WINDOWS)]
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._failed = False
        self._begin()

    @classmethod
    def at(cls, path: Path, advance: Callable[[int], None]) -> Self:
        """Open a file, not through a symbolic link, or make it for this user alone."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return cls(os.open(path, flags, 0o600), advance)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring what came to the file and close it."""
        try:
            with suppress(OSError):  # whoever was given an error has it; a digest needs finish()
                self._settle()
        finally:
            self._digester.shutdown()
            self._writer.shutdown()
            os.close(self._fd)

    @property
    def offset(self) -> int:
        """Bytes that were added."""
        return self._start + self._filled

    def take_up(self, most: int) -> None:
        """Go on after what an earlier run left; from the start if that is more than ``most``."""
        size = os.fstat(self._fd).st_size
        if size > most and not self._shared:
            self.restart()
            size = 0
        size = min(size, most)
        while n := os.preadv(self._fd, [self.room()[: size - self.offset]], self.offset):
            self._grow(n, write=False)
        switch_on(self._fd)

    def room(self) -> memoryview:
        """Return the memory that the next bytes belong into; it is never empty."""
        return self._window[self._filled :]

    def filled(self, n_bytes: int) -> None:
        """Append what was put at the start of the room."""
        self._grow(n_bytes, write=True)

    def restart(self) -> None:
        """Go back to the first byte."""
        self._wait(range(_WINDOWS))
        if not self._shared:
            os.ftruncate(self._fd, 0)
        self._begin()

    def finish(self) -> str:
        """Bring everything to the disk and return its digest."""
        self._settle()
        os.fsync(self._fd)
        whole = self._hash.copy()
        whole.update(self._window[: self._filled])
        return str(whole.hexdigest())

    def _begin(self) -> None:
        self._hash = self._hasher()
        self._turn = self._start = self._filled = self._kept = 0
        self._due = time.monotonic() + _KEEP_S

    @property
    def _window(self) -> memoryview:
        return self._windows[self._turn]

    def _grow(self, n_bytes: int, *, write: bool) -> None:
        self._filled += n_bytes
        if self._filled == _WINDOW:
            self._pass_on(write=write)
        elif not write:
            self._kept = self._filled
        elif time.monotonic() > self._due:
            self._keep()
        if self.offset > self.furthest:
            self._advance(self.offset - self.furthest)
            self.furthest = self.offset

    def _pass_on(self, *, write: bool) -> None:
        """Give a full window to the threads, and take the one that was given first."""
        self._pending[self._turn].append(self._digester.submit(self._hash.update, self._window))
        if write:
            job = self._writer.submit(self._write, self._window, self._start)
            self._pending[self._turn].append(job)
        self._turn = (self._turn + 1) % _WINDOWS
        self._start, self._filled = self._start + _WINDOW, 0
        self._kept, self._due = 0, time.monotonic() + _KEEP_S
        self._wait([self._turn])

    def _keep(self) -> None:
        """Have a part of a window written: where bytes come slowly, a kill should cost few."""
        part, offset = self._window[self._kept : self._filled], self._start + self._kept
        self._pending[self._turn].append(self._writer.submit(self._write_part, part, offset))
        self._kept, self._due = self._filled, time.monotonic() + _KEEP_S

    def _write_part(self, data: memoryview, offset: int) -> None:
        switch_off(self._fd)  # it is not whole pages
        self._write(data, offset)
        switch_on(self._fd)

    def _write(self, data: memoryview, offset: int) -> None:
        if self._failed:
            return  # nothing may follow a hole
        self._failed = True
        while data:
            n = os.pwrite(self._fd, data, offset)
            data, offset = data[n:], offset + n
        self._failed = False

    def _wait(self, turns: Iterable[int]) -> None:
        for turn in turns:
            for job in self._pending[turn]:
                job.result()
            self._pending[turn].clear()

    def _settle(self) -> None:
        """Have everything written, and wait for it."""
        self._keep()
        self._wait(range(_WINDOWS))
