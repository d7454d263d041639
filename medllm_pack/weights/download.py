"""One file, from the Hub into its place in the cache, however often the connection breaks.

Not by the Hub library's download function: that one starts again after the process was killed, and
checks no digest. Here a partial file is named after the digest of the whole; whoever finds it
continues it, and it takes its place in the cache only when its bytes have that digest.

Does not know why the file is needed. Memory: the windows between network, digest and disk.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from medllm_pack import files
from medllm_pack.errors import SourceError, shown
from medllm_pack.incoming import Incoming
from medllm_pack.patience import Patience
from medllm_pack.progress import Reporter
from medllm_pack.weights.answers import Address
from medllm_pack.weights.cache import Cache, Item
from medllm_pack.weights.sources import LocalFile
from medllm_pack.weights.stream import Sink, Stream


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

    def run(self) -> None:
        """Bring the file.

        Raises:
            SourceError: if it cannot be brought, or is not what the Hub states.
        """
        item = self.item
        with self.cache.writing():
            self.cache.blob(item).parent.mkdir(parents=True, exist_ok=True)
            part = _Part(self.cache.part(item), item, self.report, self.cache)
        try:
            if item.is_at(self.cache.blob(item)):  # another process was faster
                part.discard()
                self.report.advance(item.size - part.furthest)
                return
            Stream(item, self.commit, self.address, self.patience).into(part)
            if part.digest() != item.digest:
                part.discard()
                raise SourceError(
                    f"{shown(item.name)} of {self.address.name} arrived with the digest "
                    f"{part.digest()}; the Hub states {item.digest}. Nothing of it was kept; try "
                    "again, and suspect what lies between you and the Hub if it happens again"
                )
            with self.cache.writing():
                part.become(self.cache.blob(item))
        finally:
            part.close()


class _Part(Sink):
    """A file on its way. Named after the digest of the whole, so that anyone may continue it.

    The lock saves the work of two processes that want the same file; it carries no correctness,
    because some network file systems grant it to everybody. Two that write at once write the same
    bytes to the same places: nothing is appended, nothing is cut off.
    """

    after_a_stop = "what has arrived is kept. Run the same command again to continue"

    def __init__(self, path: Path, item: Item, report: Reporter, cache: Cache) -> None:
        self.path, self.item, self._report, self._cache = path, item, report, cache
        self._fd = self._open()
        incoming = Incoming(self._fd, report.advance, hasher=item.hasher, shared=True)
        super().__init__(item, incoming)
        self._incoming = incoming
        try:
            incoming.take_up(item.size)  # the digest of the whole judges it later
        except BaseException:
            self.close()
            raise

    def writing(self) -> AbstractContextManager[None]:
        """Explain an error of the disk."""
        return self._cache.writing()

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

    def too_many(self) -> None:
        """Remove the file."""
        self.discard()

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
        self._incoming.close()
