"""The body of a large answer, put where it belongs, without the HTTP parser's copies.

httpx copies every byte of a body five times on its way through the parser, 64 KiB at a time, which
costs more than the network of a data centre does. Where the length is stated, the first piece
empties the parser and the rest is received from the connection itself. Memory: one piece.
"""

from __future__ import annotations

import httpx

from medllm_pack.publish.line import Line


class Body:
    """The body of an answer whose connection is not used for another request."""

    def __init__(self, answer: httpx.Response, *, stall_s: float) -> None:
        self._parsed = answer.iter_raw()
        self._piece = memoryview(next(self._parsed, b""))
        self._line, self._left, self._stall_s = _line(answer), 0, stall_s
        if self._line is not None:
            self._left = int(answer.headers["Content-Length"]) - len(self._piece)

    def read_into(self, buffer: memoryview) -> int:
        """Put some bytes into memory and return their number; 0 at the end, stated or not."""
        if not self._piece and self._line is not None:
            room = buffer[: self._left]
            n = self._line.read_into(room, self._stall_s) if room else 0
            self._left -= n
            return n
        self._piece = self._piece or memoryview(next(self._parsed, b""))
        data, self._piece = self._piece[: len(buffer)], self._piece[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _line(answer: httpx.Response) -> Line | None:
    """Return the connection if the rest of the body is all that follows on it."""
    line = answer.extensions.get("network_stream")
    plain = answer.http_version == "HTTP/1.1" and "Transfer-Encoding" not in answer.headers
    stated = answer.headers.get("Content-Length", "")
    return line if isinstance(line, Line) and plain and stated.isdecimal() else None
