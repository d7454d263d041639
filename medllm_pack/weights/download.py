"""One file, from the Hub into its place in the cache, however often the connection breaks.

Goes through the Hub library's connection but not through its download function: that one starts
again after the process was killed, and checks no digest. Here a partial file is named after the
digest of the whole; whoever finds it continues it, and it takes its place in the cache only when
its bytes have that digest.

Does not know why the file is needed. Memory: one network buffer.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medllm_pack import files
from medllm_pack.errors import SourceError, shown
from medllm_pack.progress import Reporter
from medllm_pack.weights.answers import (
    PASSING,
    Address,
    Patience,
    network_error,
    retry_after,
    told,
)
from medllm_pack.weights.cache import Cache, Item
from medllm_pack.weights.request import opened
from medllm_pack.weights.sources import LocalFile

if TYPE_CHECKING:
    from httpx2 import Response

_HASH_CHUNK = 4 << 20


def bring(
    items: Sequence[Item],
    commit: str,
    *,
    what: str,
    address: Address,
    cache: Cache,
    patience: Patience,
    report: Reporter,
) -> dict[str, LocalFile]:
    """Return files by name, after downloading those that the cache lacks.

    Raises:
        SourceError: if one cannot be brought, or there is no room for them.
    """
    missing = [item for item in items if not cache.has(item, commit)]
    if missing:
        _check_space(missing, cache, address)
        total = sum(item.size for item in missing)
        report.step(f"download {address.name}: {what}", total_bytes=total)
    for item in missing:
        Download(item, commit, address, cache, patience, report).run()
    return {item.name: cache.take(item, commit) for item in items}


def _check_space(items: Sequence[Item], cache: Cache, address: Address) -> None:
    parts = [cache.part(item) for item in items]
    have = sum(part.stat().st_size for part in parts if part.exists())
    needed, free = sum(item.size for item in items) - have, files.disk_free(cache.folder)
    if needed > free:
        raise SourceError(
            f"{address.name} needs {needed:,} more bytes and the disk of the Hub cache "
            f"{shown(cache.root)} has {free:,} free; free some space, or set HF_HOME "
            "to a folder on another disk"
        )


class _TryAgainError(Exception):
    """An answer that another try may better."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Download:
    """What is wanted, whence and whither.

    Attributes:
        item: the file as the Hub lists it.
        commit: the commit that it belongs to.
        address: the repository.
        cache: where it goes.
        patience: how often and how long to try.
        report: told of bytes, each counted once.
    """

    item: Item
    commit: str
    address: Address
    cache: Cache
    patience: Patience
    report: Reporter

    @property
    def _title(self) -> str:
        return f"{shown(self.item.name)} of {self.address.name}"

    def run(self) -> None:
        """Bring the file.

        Raises:
            SourceError: if it cannot be brought, or is not what the Hub states.
        """
        item = self.item
        with self.cache.writing():
            self.cache.blob(item).parent.mkdir(parents=True, exist_ok=True)
            part = _Part(self.cache.part(item), item, self.report)
        try:
            if item.is_at(self.cache.blob(item)):  # another process was faster
                part.discard()
                self.report.advance(item.size - part.furthest)
                return
            self._transfer(part)
            if part.digest() != item.digest:
                part.discard()
                raise SourceError(
                    f"{self._title} arrived with the digest {part.digest()}; the Hub "
                    f"states {item.digest}. Nothing of it was kept; try again, and suspect what "
                    "lies between you and the Hub if it happens again"
                )
            with self.cache.writing():
                part.become(self.cache.blob(item))
        finally:
            part.close()

    def _transfer(self, part: _Part) -> None:
        """Stream until the part is full; every try asks the Hub for a fresh address."""
        from huggingface_hub.errors import HfHubHTTPError

        failures = 0
        while part.offset < self.item.size:
            before, wait_s = part.furthest, 0.0
            cause: Exception | None = None
            try:
                self._stream(part)
                problem = "the connection ended early"
            except _TryAgainError as error:
                problem, wait_s, cause = str(error), error.wait_s, error
            except HfHubHTTPError as error:
                raise self.address.explained(error, self.item.name) from error
            except network_error() as error:
                problem, cause = told(error), error
            if part.offset == self.item.size:
                return
            failures = 1 if part.furthest > before else failures + 1
            if failures >= self.patience.tries:
                raise SourceError(
                    f"{self._title} stops at byte {part.offset:,} of {self.item.size:,} "
                    f"({problem}); what has arrived is kept. Run the same command again to continue"
                ) from cause
            self.patience.wait(failures, wait_s)

    def _stream(self, part: _Part) -> None:
        with opened(
            self.item,
            self.commit,
            address=self.address,
            stall_s=self.patience.stall_s,
            wanted=f"bytes={part.offset}-" if part.offset else None,
        ) as (response, at_home):
            self._check_status(response, part, at_home=at_home)
            for chunk in response.iter_bytes():
                with self.cache.writing():
                    part.write(chunk)

    def _check_status(self, response: Response, part: _Part, *, at_home: bool) -> None:
        """Place the part where the answer begins, or raise."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status = response.status_code
        if status == 206:
            if not _continues(response, part):
                part.restart()
                raise _TryAgainError("the server sent another range than it was asked for")
        elif status == 200:
            part.restart()
        elif status == 416:
            part.restart()
            raise _TryAgainError("the server refused the range")
        elif status in PASSING or not at_home:
            # Behind the Hub, 403 is an address that expired; the next try gets a fresh one.
            raise _TryAgainError(
                f"{response.url.host} answered {status}", wait_s=retry_after(response)
            )
        else:
            hf_raise_for_status(response)
            raise _TryAgainError(f"{response.url.host} answered {status}")


def _continues(response: Response, part: _Part) -> bool:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (
        match is not None
        and int(match[1]) == part.offset
        and match[2] in {"*", str(part.item.size)}
    )


class _Part:
    """A file on its way. Named after the digest of the whole, so that anyone may continue it.

    The lock saves the work of two processes that want the same file; it carries no correctness,
    because some network file systems grant it to everybody. Two that write at once write the same
    bytes to the same places: nothing is appended, nothing is cut off.
    """

    def __init__(self, path: Path, item: Item, report: Reporter) -> None:
        self.path, self.item, self._report = path, item, report
        self._fd = self._open()
        self.furthest = 0
        self.restart()
        try:
            self._take_up()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(self.path, flags, 0o666)
            self._lock(fd)
            try:
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)  # who held the lock has finished it or thrown it away

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._report.notice(f"waiting: another process downloads {shown(self.item.name)}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks on this file system

    def _take_up(self) -> None:
        """Hash what an earlier run has left; the digest of the whole judges it later."""
        left = min(os.fstat(self._fd).st_size, self.item.size)
        while chunk := os.pread(self._fd, min(_HASH_CHUNK, left - self.offset), self.offset):
            self._hash.update(chunk)
            self._advance(len(chunk))

    def restart(self) -> None:
        """Go back to the first byte."""
        self.offset = 0
        self._hash = self.item.hasher()

    def write(self, chunk: bytes) -> None:
        """Add bytes.

        Raises:
            SourceError: if they are more than the file may have.
        """
        if self.offset + len(chunk) > self.item.size:
            self.discard()
            raise SourceError(
                f"the server sends more than the {self.item.size:,} bytes of "
                f"{shown(self.item.name)}; nothing of it was kept. Try again"
            )
        view = memoryview(chunk)
        while view:
            n = os.pwrite(self._fd, view, self.offset)
            self._hash.update(view[:n])
            self._advance(n)
            view = view[n:]

    def _advance(self, n_bytes: int) -> None:
        self.offset += n_bytes
        if self.offset > self.furthest:
            self._report.advance(self.offset - self.furthest)
            self.furthest = self.offset

    def digest(self) -> str:
        """Return the digest of what has been written."""
        return str(self._hash.hexdigest())

    def become(self, blob: Path) -> None:
        """Sync, and take the place in the cache."""
        os.ftruncate(self._fd, self.item.size)
        os.fsync(self._fd)
        try:
            os.replace(self.path, blob)
        except FileNotFoundError:
            if not self.item.is_at(blob):  # the same bytes, written by both
                raise

    def discard(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the descriptor and the lock back."""
        os.close(self._fd)
