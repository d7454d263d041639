"""Some bytes of a blob as the body of a request, and what is counted while they go.

Knows nothing of how they are sent. Memory: one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from medllm_pack.errors import SourceError
from medllm_pack.ollama.image import Blob
from medllm_pack.publish.answers import PIECE


class Part:
    """Some bytes of a blob as the body of a request; made anew for each try."""

    def __init__(self, blob: Blob, start: int, end: int, count: Callable[[int], None]) -> None:
        self._blob, self._start, self._end, self._count = blob, start, end, count

    def __iter__(self) -> Iterator[bytes]:
        left = self._end - self._start
        try:
            with self._blob.open() as file:
                file.seek(self._start)
                while left:
                    data = file.read(min(PIECE, left))
                    if not data:
                        raise SourceError(f"the file of {self._blob.digest} has become shorter")
                    left -= len(data)
                    yield data
                    self._count(len(data))
        except OSError as error:
            raise SourceError(f"{self._blob.digest} cannot be read: {error.strerror}") from error


class Meter:
    """Counts what is sent, and reports no byte twice."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self.position, self._furthest, self.total = advance, 0, 0, 0

    def count(self, n_bytes: int) -> None:
        """Count bytes that went over the wire."""
        self.position += n_bytes
        self.total += n_bytes
        self.reached(self.position)

    def reached(self, position: int) -> None:
        """Report up to a position what was not reported before."""
        if position > self._furthest:
            self._advance(position - self._furthest)
            self._furthest = position
