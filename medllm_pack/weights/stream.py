"""One file's bytes from the Hub into a sink, however often the connection breaks.

After a break it goes on where it stood, if the server can; every try asks the Hub for a fresh
address. A sink hashes what it is given and may keep it; the one here keeps nothing, for whoever
only wants to know what comes. Memory: one network buffer and two windows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from medllm_pack.errors import SourceError, shown
from medllm_pack.files import DigestBehind
from medllm_pack.progress import Reporter
from medllm_pack.weights.answers import (
    PASSING,
    Address,
    Patience,
    network_error,
    retry_after,
    told,
)
from medllm_pack.weights.cache import Item
from medllm_pack.weights.request import opened

if TYPE_CHECKING:
    from httpx2 import Response


_WINDOW: Final = 1 << 20  # hashed at once, by a thread of its own


class OtherBytesError(SourceError):
    """What comes cannot be the file."""


class _TryAgainError(Exception):
    """An answer that another try may better."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


class Sink:
    """Takes a file's bytes in order, hashes them and keeps none.

    Args:
        item: the file as the Hub lists it.
        report: told of bytes, each counted once.
        hasher: makes a fresh hash.

    Attributes:
        item: the file.
        offset: of the next byte.
        furthest: the largest offset so far.
        after_a_stop: what becomes of the bytes if no more come, for a message.
    """

    after_a_stop: ClassVar[str] = "nothing was kept. Try again later"

    def __init__(
        self, item: Item, report: Reporter, *, hasher: Callable[[], Any] = hashlib.sha256
    ) -> None:
        self.item, self._report, self._hasher = item, report, hasher
        self.furthest = 0
        self.restart()

    def restart(self) -> None:
        """Go back to the first byte."""
        self.offset = 0
        self._hash, self._window = DigestBehind(self._hasher()), bytearray()

    def write(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            OtherBytesError: if they are more than the file may have.
        """
        if self.offset + len(chunk) > self.item.size:
            self.too_many()
            raise OtherBytesError(
                f"the server sends more than the {self.item.size:,} bytes of "
                f"{shown(self.item.name)}; nothing of it was kept. Try again"
            )
        self.keep(chunk)
        self.count(chunk)

    def keep(self, chunk: bytes) -> None:
        """Put bytes at ``offset``; nothing is kept here."""

    def too_many(self) -> None:
        """Learn that the bytes are not the file's; there is nothing to throw away here."""

    def count(self, chunk: bytes) -> None:
        """Hash bytes, behind, and move on by as many."""
        self._window += chunk
        if len(self._window) >= _WINDOW:
            self._hash_window()
        self.offset += len(chunk)
        if self.offset > self.furthest:
            self._report.advance(self.offset - self.furthest)
            self.furthest = self.offset

    def digest(self) -> str:
        """Return the digest of what was taken."""
        self._hash_window()
        return self._hash.hexdigest()

    def _hash_window(self) -> None:
        self._hash.update(memoryview(self._window))
        self._window = bytearray()


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
        from huggingface_hub.errors import HfHubHTTPError

        title, failures = f"{shown(self.item.name)} of {self.address.name}", 0
        while sink.offset < self.item.size:
            before, wait_s = sink.furthest, 0.0
            cause: Exception | None = None
            try:
                self._stream(sink)
                problem = "the connection ended early"
            except _TryAgainError as error:
                problem, wait_s, cause = str(error), error.wait_s, error
            except HfHubHTTPError as error:
                raise self.address.explained(error, self.item.name) from error
            except network_error() as error:
                problem, cause = told(error), error
            if sink.offset == self.item.size:
                return
            failures = 1 if sink.furthest > before else failures + 1
            if failures >= self.patience.tries:
                raise SourceError(
                    f"{title} stops at byte {sink.offset:,} of {self.item.size:,} "
                    f"({problem}); {sink.after_a_stop}"
                ) from cause
            self.patience.wait(failures, wait_s)

    def _stream(self, sink: Sink) -> None:
        with opened(
            self.item,
            self.commit,
            address=self.address,
            stall_s=self.patience.stall_s,
            wanted=f"bytes={sink.offset}-" if sink.offset else None,
        ) as (response, at_home):
            self._check_status(response, sink, at_home=at_home)
            for chunk in response.iter_bytes():
                sink.write(chunk)

    def _check_status(self, response: Response, sink: Sink, *, at_home: bool) -> None:
        """Place the sink where the answer begins, or raise."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status = response.status_code
        if status == 206:
            if not _continues(response, sink):
                sink.restart()
                raise _TryAgainError("the server sent another range than it was asked for")
        elif status == 200:
            sink.restart()
        elif status == 416:
            sink.restart()
            raise _TryAgainError("the server refused the range")
        elif status in PASSING or not at_home:
            # Behind the Hub, 403 is an address that expired; the next try gets a fresh one.
            raise _TryAgainError(
                f"{response.url.host} answered {status}", wait_s=retry_after(response)
            )
        else:
            hf_raise_for_status(response)
            raise _TryAgainError(f"{response.url.host} answered {status}")


def _continues(response: Response, sink: Sink) -> bool:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (
        match is not None
        and int(match[1]) == sink.offset
        and match[2] in {"*", str(sink.item.size)}
    )
