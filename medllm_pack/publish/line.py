"""A connection that ends what trickles, and stops sending once it is answered.

httpx sends a body to its end before it reads the answer, and takes any byte for a sign of life.
Here a connection has only as much time to wait as a silence may last, and bytes buy it more. An
answer that comes while a body is being sent, such as a redirect or a refusal, ends the sending;
httpcore then reads it, as it does when a server hangs up.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from typing import Any, Final, Literal

import httpcore

from medllm_pack.patience import Credit

_SLICE: Final = 128 << 10  # of a body; between two of them an answer is looked for
_NO_LIMIT: Final = 3600.0
# An interim answer (1xx) means: go on.
_ANSWER: Final = re.compile(rb"(?:\A|\r\n\r\n)HTTP/1\.[01] [2-5]")


class Line(httpcore.NetworkStream):
    """A stream of httpcore's around another one.

    Args:
        inner: the stream.
        nested: whether it is encrypted inside of an encrypted one, to a proxy.
    """

    def __init__(self, inner: httpcore.NetworkStream, *, nested: bool = False) -> None:
        self._inner = inner
        # Of a nested stream this would be the outer one.
        found = None if nested else inner.get_extra_info("socket")
        self._socket: socket.socket | None = found
        self._early = b""  # what came while something was being sent
        self._doing: Literal["", "reading", "writing"] = ""
        self._credit = Credit(0.0)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what has come."""
        if self._early:
            data, self._early = self._early[:max_bytes], self._early[max_bytes:]
            return data
        since = self._turn_to("reading", timeout)
        data = self._inner.read(max_bytes, self._credit.left_s)
        self._credit.spend(since, len(data))
        return data

    def read_into(self, buffer: memoryview, timeout: float) -> int:
        """Put what has come into memory and return the number of bytes, 0 at the end."""
        if self._early or self._socket is None:
            data = self.read(min(len(buffer), _SLICE), timeout)
            buffer[: len(data)] = data
            return len(data)
        since = self._turn_to("reading", timeout)
        try:
            self._socket.settimeout(self._credit.left_s)
            n = self._socket.recv_into(buffer)
        except TimeoutError as error:
            raise httpcore.ReadTimeout("silence") from error
        except OSError as error:
            raise httpcore.ReadError("broken") from error
        self._credit.spend(since, n)
        return n

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send; an empty buffer only looks for an answer.

        Raises:
            httpcore.WriteError: if it is answered already.
        """
        for position in range(0, len(buffer) or 1, _SLICE):
            if self._answered():
                raise httpcore.WriteError("answered before all was sent")
            since, piece = self._turn_to("writing", timeout), buffer[position : position + _SLICE]
            self._inner.write(piece, self._credit.left_s)
            self._credit.spend(since, len(piece))

    def close(self) -> None:
        """Close it."""
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """Return the encrypted stream; the handshake has one time-out as a whole."""
        nested = self.get_extra_info("ssl_object") is not None
        return Line(self._inner.start_tls(ssl_context, server_hostname, timeout), nested=nested)

    def get_extra_info(self, info: str) -> Any:
        """Return what the inner stream says."""
        return self._inner.get_extra_info(info)

    def _turn_to(self, doing: Literal["reading", "writing"], timeout: float | None) -> float:
        """Begin to wait, with the whole time if it was the other's turn before.

        The time between two calls is not the other side's.
        """
        if doing != self._doing:
            self._doing = doing
            self._credit = Credit(_NO_LIMIT if timeout is None else timeout)
        if self._credit.left_s <= 0:
            late = httpcore.ReadTimeout if doing == "reading" else httpcore.WriteTimeout
            raise late("it trickles")
        return time.monotonic()

    def _answered(self) -> bool:
        if not self._inner.get_extra_info("is_readable"):
            return False
        try:
            data = self._inner.read(_SLICE, 0.0)
        except (httpcore.ReadError, httpcore.ReadTimeout):
            return False  # TLS keeping house; a broken connection shows when it is written to
        self._early += data
        return not data or _ANSWER.search(self._early) is not None
