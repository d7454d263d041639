"""Bring a blob to a path: by reflink, by hard link, or by a copy that is digested on the way.

A reflink shares the blocks of a file, a hard link the file itself; neither moves a byte, and both
need the same file system. Files are made under a hidden name beside their place, synced, and only
then renamed. Knows nothing of stores or packs.

Memory: one buffer.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Literal

from medllm_pack.errors import SourceError
from medllm_pack.files import sync_folder
from medllm_pack.ollama.image import Blob

How = Literal["reflink", "link", "copy"]

_FICLONE: Final = 0x40049409  # linux/fs.h
# linux/fiemap.h: struct fiemap and struct fiemap_extent, without their reserved fields.
_FIEMAP: Final = 0xC020660B
_FIEMAP_HEAD: Final = struct.Struct("=QQIIII")
_EXTENT: Final = struct.Struct("=QQQ16xI12x")
_FIEMAP_SYNC, _LAST = 1, 1
_NO_PLACE: Final = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200  # unknown, delayed, encoded, inline, …
_AT_ONCE: Final = 512
_CHUNK: Final = 4 << 20
_PARTIAL: Final = ".partial"
_STALE: Final = 60.0  # seconds
_MODE: Final = 0o644  # as Ollama gives its blobs


def place(
    blob: Blob, target: Path, *, advance: Callable[[int], None] = lambda _: None, share: bool = True
) -> How:
    """Make ``target`` hold a blob, replacing what is there; return how.

    Args:
        blob: a blob in a file is shared where the file system can, and is trusted to have its
            digest; whatever is copied is digested.
        target: in a folder that exists.
        advance: told of the bytes that are copied.
        share: False copies in any case.

    Raises:
        SourceError: if the bytes that were copied are not those of the digest.
        OSError: if the file system says no.
    """
    with beside(target) as partial:
        how: How = "copy"
        if share and isinstance(blob.source, Path):
            how = _shared(blob.source, partial)
        if how == "copy":
            copy(blob, partial, advance=advance)
    return how


def copy(blob: Blob, path: Path, *, advance: Callable[[int], None] = lambda _: None) -> None:
    """Write a blob to a new file and sync it; its size and digest are checked.

    Raises:
        SourceError: if they are others than the blob's.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
    with os.fdopen(fd, "wb", buffering=0) as out, blob.open() as file:
        fcntl.flock(out, fcntl.LOCK_EX)
        check(blob, file, each=lambda data: _write(out, data), advance=advance)
        os.fsync(fd)


def check(
    blob: Blob,
    file: BinaryIO,
    *,
    each: Callable[[memoryview], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Read a blob to its end, at most one byte too far, and compare size and digest.

    Raises:
        SourceError: if they are others than the blob's.
    """
    digest, size = hashlib.sha256(), 0
    while data := file.read(min(_CHUNK, blob.size + 1 - size)):
        size += len(data)
        digest.update(data)
        each(memoryview(data))
        advance(len(data))
        if size > blob.size:
            break
    if size != blob.size or digest.hexdigest() != blob.digest.hex:
        more = "more than " if size > blob.size else ""
        raise SourceError(
            f"what should be {blob.digest} ({blob.size} bytes) is something else ({more}"
            f"{min(size, blob.size)} bytes, sha256:{digest.hexdigest()[:12]}…); fetch it again"
        )


def same_bytes(one: Path, other: Path) -> bool:
    """Say whether two files are one file, or share all of their blocks: then no byte need be read.

    False where the file system does not say.
    """
    if os.path.samefile(one, other):
        return True
    try:
        return (extents := _extents(one)) is not None and extents == _extents(other)
    except OSError:
        return False


def _extents(path: Path) -> list[tuple[int, int, int]] | None:
    """Return logical place, physical place and length of every extent; None if one has no place."""
    found: list[tuple[int, int, int]] = []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            start = found[-1][0] + found[-1][2] if found else 0
            request = _FIEMAP_HEAD.pack(start, (1 << 64) - 1 - start, _FIEMAP_SYNC, 0, _AT_ONCE, 0)
            buffer = bytearray(request + bytes(_AT_ONCE * _EXTENT.size))
            fcntl.ioctl(fd, _FIEMAP, buffer)
            n = _FIEMAP_HEAD.unpack_from(buffer)[3]
            if n == 0:
                return found
            for i in range(n):
                at = _FIEMAP_HEAD.size + i * _EXTENT.size
                logical, physical, length, flags = _EXTENT.unpack_from(buffer, at)
                if flags & _NO_PLACE:
                    return None
                found.append((logical, physical, length))
            if flags & _LAST:
                return found
    finally:
        os.close(fd)


def _shared(source: Path, partial: Path) -> How:
    """Make ``partial`` share the bytes of a file; return ``copy`` if it cannot."""
    real = source.resolve()  # link(2) would link a symbolic link itself
    if _reflinked(real, partial):
        return "reflink"
    try:
        os.link(real, partial)
    except OSError:  # another file system, one without links, too many links, not permitted
        return "copy"
    return "link"


def _reflinked(source: Path, partial: Path) -> bool:
    with source.open("rb") as file:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        try:
            fcntl.ioctl(fd, _FICLONE, file.fileno())
            os.fsync(fd)
        except OSError:
            partial.unlink()
            return False
        finally:
            os.close(fd)
    return True


def _write(out: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove what killed runs left half-written beside files whose names have a pattern.

    Who still writes holds a lock; links and reflinks are renamed at once, so a minute is enough.
    """
    for path in folder.glob(f".{pattern}.*{_PARTIAL}"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.lstat().st_ctime >= _STALE:
                    path.unlink()
        except OSError:
            continue  # somebody writes it, or it is gone, or not ours to remove


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yield a hidden name in the folder of ``target``; the file takes its name when all is well.

    Who writes it syncs it. If the block raises, the file is removed.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}{_PARTIAL}")
    try:
        yield partial
        os.replace(partial, target)
        partial.unlink(missing_ok=True)  # rename(2) of two links to one file leaves both
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)
