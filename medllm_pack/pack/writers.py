"""Threads that write what others compute, so that nobody who computes waits for the disk.

What is handed over waits in a short queue; when that is full, who computes waits, too. An error of
writing is raised where the next piece is handed over, or at the end. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from types import TracebackType
from typing import Any, Self


class Writers:
    """Threads that write, as a context: it is left when everything is written.

    Args:
        threads: of them.
        room: pieces that may wait or be under way.
    """

    def __init__(self, *, threads: int, room: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="write")
        self._room = Semaphore(room)
        self._error: BaseException | None = None

    def submit(self, write: Callable[..., object], *what: Any) -> None:
        """Let a thread call ``write`` with what is to be written; wait until there is room for it.

        Raises:
            BaseException: what an earlier call raised.
        """
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            raise self._error
        self._pool.submit(write, *what).add_done_callback(self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait until everything is written, or leave out what is not begun after an error.

        Raises:
            BaseException: what a call raised.
        """
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None and self._error is not None:
            raise self._error

    def _done(self, future: Future[object]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._error = self._error or error
        self._room.release()
