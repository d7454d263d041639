"""A GGUF file being filled: of its full size at once, written by any thread, digested behind.

Blocks arrive in any order and begin anywhere; the disk is given whole pages, past the page cache.
The whole pages of a block are written at once; a page that two blocks share is written with the
second. Each write waits until the system gives its thread a processor again, so there are few.
A SHA-256 needs the bytes in the order of the file: a thread of its own follows the part that is
complete from the start and digests it while later blocks are still being made, so that it costs no
pass of its own. A block whose turn comes soon is digested from memory, and who writes faster than
that waits for it. One whose turn comes much later is read back; order.py keeps these few.

Memory: the blocks that wait for their turn, :data:`KEPT_BYTES` a file and one block a thread; two
buffers a file, one window a thread, and a page where two tensors meet.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medllm_pack.direct import PAGE, aligned, page_ceil, page_floor, switch_on
from medllm_pack.errors import WriteError
from medllm_pack.files import DigestBehind
from medllm_pack.gguf.layout import Layout

_CHUNK = 4 << 20  # read back at once, while the one before is digested
_RUN = 64 << 20  # read back before looking whether to stop
KEPT_BYTES = 16 << 20  # kept in memory until digested: four blocks of F16
_STRIP = 1 << 20  # copied at once
_WINDOW = (4 << 20) + 2 * PAGE  # written at once: a block in F16 with the pages it completes


class Output:
    """A file of a known layout; use :meth:`write` for rows, then :meth:`finish`."""

    def __init__(self, path: Path, layout: Layout, *, direct: bool = True) -> None:
        """Create the file at its full size and write its header.

        Args:
            path: must not exist.
            layout: its header and places.
            direct: whether to bypass the page cache where the file system does it.

        Raises:
            OSError: if the disk says no.
        """
        self.layout = layout
        self.name = path.name
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._pieces = _Pieces()
        self._shared = _SharedPages(layout.size)
        self._changed = threading.Condition()
        self._stopped = False
        self._lent = 0  # times that a thread uses the descriptor
        self._error: Exception | None = None
        self._digest = DigestBehind()
        # A daemon: an interrupt while it starts must not leave a process that waits for it.
        self._follower = threading.Thread(
            target=self._follow, name=f"digest {self.name}", daemon=True
        )
        try:
            # A hole of the full size. Not fallocate, which takes five times the system time
            # (docs/log.md); the plan has looked at the free space, and a disk that fills up
            # meanwhile fails the write that finds no room.
            os.ftruncate(self._fd, layout.size)
            if direct:
                switch_on(self._fd)
            self._follower.start()  # a large header waits for it
            for slot, following in zip(layout.slots, (*layout.slots[1:], None), strict=True):
                end = following.offset if following else layout.size
                self.write(slot.offset + slot.nbytes, bytes(end - slot.offset - slot.nbytes))
            self.write(0, layout.header)
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: bytes | NDArray[np.uint8]) -> None:
        """Write bytes at their place; every byte of the file is written once.

        Raises:
            OSError: if the disk says no, or said so to who reads back, or the file is closed.
        """
        if self._error is not None:
            raise self._error
        data = np.frombuffer(data, dtype=np.uint8)
        end = offset + data.size
        first, last = page_ceil(offset), page_floor(end)
        if first >= last:  # no whole page; at most one boundary inside
            cut = min(first, end) - offset
            for start, part in ((offset, data[:cut]), (offset + cut, data[cut:])):
                self._put_pages(page_floor(start), self._with(start, part))
            return
        before = self._with(offset, data[: first - offset])
        after = self._with(last, data[last - offset :])
        inside = data[first - offset : last - offset]
        self._put_pages(first - PAGE * len(before), [*before, inside, *after])

    def finish(self) -> str:
        """Wait until all is digested and on the disk; return the SHA-256.

        Raises:
            WriteError: if a part was never written.
            OSError: if the disk says no.
        """
        with self._changed:
            if (end := self._pieces.complete_to()) < self.layout.size:
                raise WriteError(f"{self.name} is complete only up to byte {end}")
        self._follower.join()
        if self._error is not None:
            raise self._error
        os.ftruncate(self._fd, self.layout.size)  # the last page was written whole
        os.fsync(self._fd)
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stop the digest and close the file, finished or not; nothing is written any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            while self._lent:
                self._changed.wait()
        if self._follower.is_alive():
            self._follower.join()
        self._digest.close()
        os.close(self._fd)

    def _with(self, offset: int, part: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Put bytes into the one page they lie in; return the page if that completes it."""
        if not part.size:
            return []
        with self._changed:
            page = self._shared.add(offset, part)
        return [] if page is None else [page]

    def _put_pages(self, start: int, parts: list[NDArray[np.uint8]]) -> None:
        """Write whole pages that follow each other, through memory that begins at a page."""
        window, filled, offset = _window.memory, 0, start
        for part in parts:
            for position in range(0, part.size, _STRIP):
                strip = part[position : position + _STRIP]
                if filled + strip.size > window.size:
                    offset, filled = self._write_out(offset, window[:filled]), 0
                window[filled : filled + strip.size] = strip
                filled += strip.size
        self._write_out(offset, window[:filled])
        with self._changed:
            for part in parts:
                self._pieces.add(start, part)
                start += part.size
            self._changed.notify_all()
            # Who is too fast waits for the digest, as long as it goes on without the disk.
            while not self._stopped and self._error is None and self._pieces.too_many():
                self._changed.wait()

    def _write_out(self, offset: int, pages: NDArray[np.uint8]) -> int:
        """Write from an offset of the file on; return where that ends."""
        view = pages.data
        with self._descriptor() as fd:
            while view:
                n = os.pwrite(fd, view, offset)
                view, offset = view[n:], offset + n
        return offset

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        """Lend the descriptor; its number may be another file's once this one is closed.

        An interrupted build closes the file while threads still have something to write.
        """
        with self._changed:
            if self._stopped:
                raise OSError(errno.EBADF, "the file is closed")
            self._lent += 1
        try:
            yield self._fd
        finally:
            with self._changed:
                self._lent -= 1
                if self._stopped:
                    self._changed.notify_all()

    def _follow(self) -> None:
        try:
            windows = cycle((aligned(_CHUNK).data, aligned(_CHUNK).data))
            while (piece := self._next()) is not None:
                if piece.data is None:
                    self._read_back(piece, windows)
                else:
                    self._digest.update(piece.data[: self.layout.size - piece.start].data)
        except Exception as error:  # whatever it is, there is no digest; who writes raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> _Piece | None:
        """Return the next piece once it is there; None at the end of the file, or if stopped."""
        with self._changed:
            while not self._stopped and self._pieces.taken < self.layout.size:
                if (piece := self._pieces.take()) is not None:
                    self._changed.notify_all()
                    return piece
                self._changed.wait()
            return None

    def _read_back(self, piece: _Piece, windows: Iterator[memoryview]) -> None:
        position = piece.start
        while position < piece.end:
            window = next(windows)
            with self._descriptor() as fd:
                n = os.preadv(fd, [window[: piece.end - position]], position)
            if n == 0:
                raise OSError(errno.EIO, "a part that was written is not there")
            self._digest.update(window[: min(n, self.layout.size - position)])
            position += n


class _Window(threading.local):
    """Aligned memory for each thread that writes."""

    def __init__(self) -> None:
        self.memory = aligned(_WINDOW)


_window = _Window()  # of all files: a thread writes one at a time


class _SharedPages:
    """Pages that several pieces fill, kept until they are complete."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pages: dict[int, tuple[NDArray[np.uint8], int]] = {}

    def add(self, offset: int, part: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """Put bytes into their page; return the page if that completes it."""
        start = page_floor(offset)
        page, filled = self._pages.pop(start, (np.zeros(PAGE, dtype=np.uint8), 0))
        page[offset - start : offset - start + part.size] = part
        filled += part.size
        wanted = min(PAGE, self._size - start)  # the last page of a file is padded
        if filled > wanted:
            raise AssertionError(f"bytes around {offset} are written twice")
        if filled == wanted:
            return page
        self._pages[start] = page, filled
        return None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Whole pages that were written; their bytes, or None if they are to be read back."""

    start: int
    end: int
    data: NDArray[np.uint8] | None


class _Pieces:
    """Pieces of a file that were written in any order and wait to be digested.

    Attributes:
        taken: all before it was handed out.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._ends: dict[int, int] = {}
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._kept_bytes = 0

    def add(self, start: int, data: NDArray[np.uint8]) -> None:
        """Note a piece; forget those furthest ahead if they get too many and no digest follows."""
        if start < self.taken or start in self._ends:
            raise AssertionError(f"bytes {start} to {start + data.size} are written twice")
        self._ends[start] = start + data.size
        self._kept[start] = data
        self._kept_bytes += data.size
        while self._kept_bytes > KEPT_BYTES and not self.too_many():
            self._forget(max(self._kept))

    def too_many(self) -> bool:
        """Say whether more is kept than should be, and the next to be digested is among it."""
        return self._kept_bytes > KEPT_BYTES and self.taken in self._kept

    def take(self) -> _Piece | None:
        """Return the next piece in the order of the file, or None if it is not there yet."""
        start = self.taken
        if start not in self._ends:
            return None
        self.taken, data = self._ends.pop(start), self._forget(start)
        # What is to be read back anyway is read in large steps.
        while data is None and self.taken - start < _RUN and self._follows_forgotten():
            self.taken = self._ends.pop(self.taken)
        return _Piece(start, self.taken, data)

    def complete_to(self) -> int:
        """Return where the part ends that is complete from the start of the file."""
        end = self.taken
        while end in self._ends:
            end = self._ends[end]
        return end

    def _follows_forgotten(self) -> bool:
        return self.taken in self._ends and self.taken not in self._kept

    def _forget(self, start: int) -> NDArray[np.uint8] | None:
        data = self._kept.pop(start, None)
        self._kept_bytes -= data.size if data is not None else 0
        return data
