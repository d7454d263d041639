"""A tar archive of one kind of header: plain files, fixed metadata, names chosen by us.

Python's tarfile follows rules that an archive chooses: links, sparse maps, extended headers. Here a
header is read only if it is, in all its 512 bytes, the one that :func:`header` writes for that name
and size. No name ever becomes a path. Knows nothing of images.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from medllm_pack.errors import SourceError, shown

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
_LONGEST_NAME: Final = 100
_MOST_MEMBERS: Final = 4096
_NUMBER: Final = re.compile(rb"[0-7]{1,11}")


@dataclass(frozen=True)
class Slice:
    """Part of a file, as a source of a blob's bytes."""

    path: Path
    offset: int
    size: int

    def open(self) -> BinaryIO:
        """Open the part for reading."""
        return io.BufferedReader(_Window(self.path, self.offset, self.size), 1 << 20)


class _Window(io.RawIOBase):
    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(offset)
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(memoryview(buffer)[: self._left])
        self._left -= n
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def header(name: str, size: int) -> bytes:
    """Return the header of a plain file."""
    # GNU: a size beyond 8 GiB is written in base 256, in the same one block.
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def padding(size: int) -> bytes:
    """Return what follows a file of a size up to the next block."""
    return bytes(-size % BLOCK)


def members(path: Path) -> dict[str, Slice]:
    """Return every member's place, in their order; all headers are read, no content.

    Raises:
        SourceError: if the archive has anything but plain files under distinct names, is cut, or
            differs in a byte outside of the contents from what this package writes.
    """
    found: dict[str, Slice] = {}
    try:
        if not path.is_file():
            raise SourceError(f"{shown(path)} is not a file; a bundle is one")
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            for name, offset, size in _headers(file, total, path):
                if name in found:
                    raise SourceError(f"{shown(path)} has {shown(name)} twice; do not use it")
                found[name] = Slice(path, offset, size)
    except OSError as error:
        raise SourceError(f"{shown(path)} cannot be read: {error.strerror}") from error
    return found


def _headers(file: BinaryIO, total: int, path: Path) -> Iterator[tuple[str, int, int]]:
    offset, n = 0, 0
    while any(block := file.read(BLOCK)):
        n += 1
        name, size = parse(block, path)
        offset += BLOCK
        following = offset + size + len(padding(size))
        if following > total or n > _MOST_MEMBERS:
            raise SourceError(f"{shown(path)} ends inside of {shown(name)}; copy it again")
        yield name, offset, size
        file.seek(offset + size)
        if any(file.read(following - offset - size)):
            raise SourceError(f"{shown(path)} has bytes behind {shown(name)}; copy it again")
        offset = following
    if total - offset != len(END) or any(file.read(BLOCK)):
        raise SourceError(f"{shown(path)} does not end where a bundle ends; copy it again")


def parse(block: bytes, path: Path) -> tuple[str, int]:
    """Return name and size; the header must be the very one that this package writes for them."""
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    raw = block[124:136]
    if raw[:1] == b"\x80":
        size = int.from_bytes(raw[1:], "big")
    else:
        digits = raw.rstrip(b" \0")
        size = int(digits, 8) if _NUMBER.fullmatch(digits) else -1
    if len(block) != BLOCK or not name or len(name) > _LONGEST_NAME or not 0 <= size < 1 << 44:
        raise SourceError(f"{shown(path)} is not a bundle of medllm-pack")
    if header(name, size) != block:
        raise SourceError(
            f"{shown(path)}: {shown(name)} is not a plain file as a bundle has it; do not use it"
        )
    return name, size
