"""Files that are either whole or absent: digests, write-beside-then-rename, folders likewise.

Knows nothing of models. What it promises: on a local file system that journals metadata, a name
appears only after its bytes were synced, and a process that dies at any moment leaves at most a
hidden partial folder, which the next run with the same target removes. POSIX promises nothing
about power loss beyond what fsync confirms; the digests in a pack are the second net.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medllm_pack.errors import SourceError, WriteError, shown

_HASH_CHUNK = 4 << 20  # bytes; the size cannot change the digest
_LOCK_NAME = ".lock"
_IMPATIENCE = 20  # interrupts during cleaning up, which may take seconds
_OLD = "old-"  # a folder set aside while its successor takes the name


def sha256(path: Path, *, advance: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file's bytes as 64 lower-case hex digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            if advance is not None:
                advance(n)
    return digest.hexdigest()


class DigestBehind:
    """A SHA-256 computed by a thread of its own while its caller fetches the next bytes.

    What was given before the last ``behind`` pieces may be overwritten.
    """

    def __init__(self, *, behind: int = 1) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._behind = behind
        self._pending: deque[Future[None]] = deque()
        self._closed = False

    def update(self, data: memoryview) -> None:
        """Give the next bytes; they must stay as they are until ``behind`` more calls."""
        self._wait(self._behind - 1)
        self._pending.append(self._thread.submit(self._digest.update, data))

    def update_from(self, pieces: Iterable[memoryview]) -> None:
        """Let the thread fetch the next bytes itself; each piece is digested before the next."""
        self._wait(self._behind - 1)
        self._pending.append(self._thread.submit(self._take, pieces))

    def hexdigest(self) -> str:
        """Return the digest of everything given.

        Raises:
            Exception: what fetching raised.
        """
        self._wait(0)
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread; what it has not digested by then is left out."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)

    def _take(self, pieces: Iterable[memoryview]) -> None:
        for piece in pieces:
            if self._closed:
                return
            self._digest.update(piece)

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.popleft().result()


def canonical_json(value: Any) -> str:
    """Return ``value`` as JSON with sorted keys, UTF-8 text and one trailing newline."""
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False) + "\n"


def without_waiting(name: str, flags: int) -> int:
    """Open a file, as ``open`` wants its opener; a FIFO without a writer does not hang."""
    return os.open(name, flags | os.O_NONBLOCK)


def read_small(path: Path, *, limit: int = 16 << 20) -> bytes:
    """Return the bytes of a regular file of at most ``limit`` bytes.

    Raises:
        SourceError: if it is missing, unreadable, not a regular file, or larger.
    """
    try:
        with open(path, "rb", opener=without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SourceError(f"{shown(path.name)} is not a regular file")
            if status.st_size > limit:
                raise SourceError(
                    f"{shown(path.name)} has {status.st_size} bytes; at most {limit} are accepted"
                )
            return file.read(limit + 1)
    except OSError as error:
        raise SourceError(f"{shown(path.name)} cannot be read: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write and sync a new UTF-8 text file inside a folder that is not yet visible."""
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_free(path: Path) -> int:
    """Return the bytes a user may still write where ``path`` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def translated(
    path: Path,
    *,
    what: str = "",
    elsewhere: str = "another place with --out",
    state: str = "nothing was kept",
) -> Iterator[None]:
    """Turn an OSError of writing into a WriteError that names the file and the remedy.

    Args:
        path: what is written.
        what: its kind, in front of its name.
        elsewhere: what else to choose.
        state: what has become of it, where nothing better is known.
    """
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: f"free some space or choose {elsewhere}",
            errno.EDQUOT: f"your quota is used up; choose {elsewhere}",
            errno.EFBIG: f"the file system or a limit allows no larger file; choose {elsewhere}",
            errno.EACCES: f"you may not write there; choose {elsewhere}",
            errno.EROFS: f"it is mounted read-only; choose {elsewhere}",
        }.get(error.errno or 0, f"{state}; try again or choose {elsewhere}")
        fact, named = error.strerror or str(error), f"{what} {shown(path)}".lstrip()
        raise WriteError(f"{named} cannot be written: {fact}; {hint}") from error


@contextmanager
def new_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` that takes its name when the block ends well.

    Everything inside must have been synced by who wrote it. If the block raises, the hidden
    folder is removed and ``target`` is as it was. Partial folders that a killed run left behind
    are removed first; those of a run that is still alive are not touched.

    Raises:
        WriteError: if ``target`` exists and ``replace`` is false, or the disk says no.
    """
    with translated(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        partial = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}"
        partial.mkdir()
    try:
        with translated(target):
            mode = stat.S_IMODE(partial.stat().st_mode)
            partial.chmod(stat.S_IRWXU)  # nobody else looks into what is not done yet
            lock = os.open(partial / _LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        with os.fdopen(lock):
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield partial
            with translated(target):
                (partial / _LOCK_NAME).unlink()
                partial.chmod(mode)
                sync_folder(partial)
                _take_name(partial, target, replace=replace)
    except BaseException:
        _remove(partial)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder, even if the user interrupts again, and again, while that goes on."""
    for _ in range(_IMPATIENCE):
        try:
            return shutil.rmtree(folder, ignore_errors=True)
        except (KeyboardInterrupt, SystemExit):
            continue


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _take_name(partial: Path, target: Path, *, replace: bool) -> None:
    if not target.exists():
        os.rename(partial, target)  # an empty folder that appeared meanwhile may be replaced
    elif not replace:
        raise WriteError(f"{shown(target)} exists; --force replaces it, --out writes elsewhere")
    else:
        # Two renames: a reader sees the old pack, for an instant none, then the new one.
        old = target.parent / f"{_prefix(target)}{_OLD}{secrets.token_hex(4)}"
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except BaseException:
            if not target.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)


def _remove_stale(target: Path) -> None:
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        if path.name.startswith(f"{_prefix(target)}{_OLD}") and not target.exists():
            os.rename(path, target)  # killed between two renames: what was there comes back
        elif _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    """Say whether no living process holds the lock of a partial folder."""
    try:
        lock = os.open(partial / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True  # killed before it took its lock, or in the last step
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
