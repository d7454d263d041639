"""One file's bytes from the Hub into a sink, however often the connection breaks.

After a break it goes on where it stood, if the server can; every try asks the Hub for a fresh
address. Memory: what takes the bytes.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from medllm_pack.errors import SourceError, shown
from medllm_pack.incoming import Incoming, Passing
from medllm_pack.patience import AGAIN, Credit, Patience, paced
from medllm_pack.progress import Reporter
from medllm_pack.weights.answers import Address, PassingError, busy, understood
from medllm_pack.weights.cache import Item
from medllm_pack.weights.request import opened

if TYPE_CHECKING:
    from httpx2 import Response


class OtherBytesError(SourceError):
    """What comes cannot be the file."""


class Sink:
    """Takes a file's bytes in order and digests them; where they go is another's.

    Args:
        item: the file as the Hub lists it.
        into: what takes them.

    Attributes:
        item: the file.
        after_a_stop: what becomes of the bytes if no more come, for a message.
    """

    after_a_stop: ClassVar[str] = "nothing was kept. Try again later"

    def __init__(self, item: Item, into: Incoming | Passing) -> None:
        self.item, self.into = item, into

    @classmethod
    def digesting(cls, item: Item, report: Reporter) -> Self:
        """Return one that keeps nothing but a SHA-256."""
        return cls(item, Passing(report.advance))

    @property
    def offset(self) -> int:
        """Position of the next byte."""
        return self.into.offset

    @property
    def furthest(self) -> int:
        """The largest offset so far."""
        return self.into.furthest

    def writing(self) -> AbstractContextManager[None]:
        """Surround what may fail because of where the bytes go; nothing does here."""
        return nullcontext()

    def room(self) -> memoryview:
        """Return the memory that the next bytes belong into."""
        return self.into.room()

    def restart(self) -> None:
        """Go back to the first byte."""
        with self.writing():
            self.into.restart()

    def filled(self, n_bytes: int) -> None:
        """Take what was put at the start of the room.

        Raises:
            OtherBytesError: if it is more than the file may have.
        """
        if self.offset + n_bytes > self.item.size:
            self.too_many()
            raise OtherBytesError(
                f"the server sends more than the {self.item.size:,} bytes of "
                f"{shown(self.item.name)}; nothing of it was kept. Try again"
            )
        with self.writing():
            self.into.filled(n_bytes)

    def too_many(self) -> None:
        """Learn that the bytes are not the file's; there is nothing to throw away here."""

    def digest(self) -> str:
        """Return the digest of what was taken."""
        with self.writing():
            return self.into.finish()


@dataclass(frozen=True, slots=True)
class Stream:
    """What is wanted and whence.

    Attributes:
        item: the file as the Hub lists it.
        commit: the commit that it belongs to.
        address: the repository.
        patience: how often and how long to try.
    """

    item: Item
    commit: str
    address: Address
    patience: Patience

    def into(self, sink: Sink) -> None:
        """Stream until the sink has every byte; what they are is for the caller to judge.

        Raises:
            SourceError: if they do not come.
            OtherBytesError: if they are too many.
        """
        failures = 0
        while sink.offset < self.item.size:
            before = sink.furthest
            try:
                with understood(self.address, self.item.name):
                    self._stream(sink)
            except PassingError as error:
                if sink.offset == self.item.size:
                    return
                failures = self.patience.count(failures, gained=sink.furthest - before)
                self._wait(failures, error, sink)

    def _wait(self, failures: int, error: PassingError, sink: Sink) -> None:
        asked_s = error.asked_s
        if said := self.patience.given_up(failures, str(error), asked_s=asked_s):
            raise SourceError(
                f"{shown(self.item.name)} of {self.address.name} stops at byte {sink.offset:,} of "
                f"{self.item.size:,} ({said}); {sink.after_a_stop}"
            ) from error
        self.patience.wait(failures, asked_s=asked_s)

    def _stream(self, sink: Sink) -> None:
        with opened(
            self.item,
            self.commit,
            address=self.address,
            stall_s=self.patience.stall_s,
            wanted=f"bytes={sink.offset}-" if sink.offset else None,
        ) as (response, at_home):
            self._check_status(response, sink, at_home=at_home)
            pieces = paced(response.iter_raw(), stall_s=self.patience.stall_s)
            _add(next(pieces, b""), sink)  # and the parser is empty
            if not self._receive(response, sink):
                for piece in pieces:
                    _add(piece, sink)
        if sink.offset < self.item.size:
            raise PassingError("the connection ended early")

    def _receive(self, response: Response, sink: Sink) -> bool:
        """Receive the rest from the connection itself, if it is all that follows there.

        The parser copies every byte five times; closing the answer closes the connection.
        """
        stream = response.extensions.get("network_stream")
        stated = response.headers.get("Content-Length", "")
        # To a proxy that speaks TLS itself, the socket is not what the bytes come from.
        nested = stream and isinstance(stream.get_extra_info("ssl_object"), ssl.SSLObject)
        plain = response.http_version == "HTTP/1.1" and "Transfer-Encoding" not in response.headers
        if stream is None or nested or not plain or not stated.isdecimal():
            return False
        connection: socket.socket = stream.get_extra_info("socket")
        left = int(stated) - response.num_bytes_downloaded
        credit = Credit(self.patience.stall_s)
        while left > 0 and (n := _received(connection, sink.room()[:left], credit)):
            left -= n
            sink.filled(n)
        return True

    def _check_status(self, response: Response, sink: Sink, *, at_home: bool) -> None:
        """Place the sink where the answer begins, or raise."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status = response.status_code
        if status == 206:
            if not _continues(response, sink):
                sink.restart()
                raise PassingError("the server sent another range than it was asked for")
        elif status == 200:
            sink.restart()
        elif status == 416:
            sink.restart()
            raise PassingError("the server refused the range")
        else:
            # Behind the Hub, 403 is an address that expired; the next try gets a fresh one.
            if at_home and status not in AGAIN:
                hf_raise_for_status(response)
            raise busy(response, response.url.host)


def _received(connection: socket.socket, room: memoryview, credit: Credit) -> int:
    """Receive into memory; return the number of bytes, 0 at the end."""
    credit.check()
    since = time.monotonic()
    connection.settimeout(credit.left_s)
    try:
        n = connection.recv_into(room)
    except TimeoutError:
        raise
    except OSError as error:
        raise PassingError(f"network error: {type(error).__name__}") from error
    credit.spend(since, n)
    return n


def _add(data: bytes, sink: Sink) -> None:
    while data:
        room = sink.room()
        n = min(len(data), len(room))
        room[:n] = data[:n]
        sink.filled(n)
        data = data[n:]


def _continues(response: Response, sink: Sink) -> bool:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (
        match is not None
        and int(match[1]) == sink.offset
        and match[2] in {"*", str(sink.item.size)}
    )
