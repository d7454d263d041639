"""A file that grows from its start, as bytes come from a network: digested and written behind.

Two threads of its own take the SHA-256 and write while the caller receives the next bytes; whole
windows go past the page cache. However a run ends, the file holds good bytes from its start to its
end and nothing else, so that another run can go on with it. Knows nothing of networks. Memory: the
windows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from medllm_pack.direct import aligned, switch_off, switch_on

_WINDOW: Final = 8 << 20  # whole pages; smaller ones take longer (docs/log.md)
_WINDOWS: Final = 3
_PASSING: Final = 256 << 10


class Passing:
    """Takes the place of an :class:`Incoming` where nothing is to be kept but the digest."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._told = advance, 0
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
        if self.offset > self._told:
            self._advance(self.offset - self._told)
            self._told = self.offset

    def restart(self) -> None:
        """Forget what was taken."""
        self.offset, self._hash = 0, hashlib.sha256()

    def finish(self) -> str:
        """Return the SHA-256 of what was taken."""
        return self._hash.hexdigest()


class Incoming:
    """A partial file being filled; use it as a context manager.

    Every method raises OSError if the disk says no, also for what was given to an earlier one.
    """

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        """Open the file, or make it for this user alone.

        Args:
            path: where; not through a symbolic link.
            advance: told of bytes that were added, of each position once.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        self._advance, self._told = advance, 0
        self._windows = [aligned(_WINDOW).data for _ in range(_WINDOWS)]
        self._pending: list[list[Future[None]]] = [[] for _ in range(_WINDOWS)]
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._failed = False
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(OSError):  # the block's own error says more
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
        if os.fstat(self._fd).st_size > most:
            self.restart()
        while n := os.preadv(self._fd, [self.room()], self.offset):
            self._grow(n, write=False)
        switch_on(self._fd)

    def room(self) -> memoryview:
        """Return the memory that the next bytes belong into; it is never empty."""
        return self._window[self._filled :]

    def filled(self, n_bytes: int) -> None:
        """Append what was put at the start of the room."""
        self._grow(n_bytes, write=True)

    def restart(self) -> None:
        """Empty the file."""
        self._wait(range(_WINDOWS))
        os.ftruncate(self._fd, 0)
        self._begin()

    def finish(self) -> str:
        """Bring everything to the disk and return its SHA-256."""
        self._settle()
        os.fsync(self._fd)
        self._hash.update(self._window[: self._filled])
        return self._hash.hexdigest()

    def _begin(self) -> None:
        self._hash = hashlib.sha256()
        self._turn = self._start = self._filled = 0

    @property
    def _window(self) -> memoryview:
        return self._windows[self._turn]

    def _grow(self, n_bytes: int, *, write: bool) -> None:
        self._filled += n_bytes
        if self._filled == _WINDOW:
            self._pass_on(write=write)
        if self.offset > self._told:
            self._advance(self.offset - self._told)
            self._told = self.offset

    def _pass_on(self, *, write: bool) -> None:
        """Give a full window to the threads, and take the one that was given first."""
        self._pending[self._turn].append(self._digester.submit(self._hash.update, self._window))
        if write:
            job = self._writer.submit(self._write, self._window, self._start)
            self._pending[self._turn].append(job)
        self._turn = (self._turn + 1) % _WINDOWS
        self._start, self._filled = self._start + _WINDOW, 0
        self._wait([self._turn])

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
        """Wait for the threads, and write what fills no window."""
        self._wait(range(_WINDOWS))
        switch_off(self._fd)
        self._write(self._window[: self._filled], self._start)
        switch_on(self._fd)
