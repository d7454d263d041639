"""One blob from a registry to a file: streamed, digested on the way, and gone on with after a cut.

What was fetched stays in a ``.part`` file beside; its bytes are digested again before more is asked
for, so a digest always covers every byte of the file. Not one byte more than stated is kept.
Also a reader that fetches only the ranges that are read. Memory: one piece.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import TransferError
from medllm_pack.publish.registry import Registry
from medllm_pack.publish.transport import PIECE, Answer, InterruptedTransferError

_BUSY: Final = (408, 425, 429, 500, 502, 503, 504)


def fetch_blob(
    registry: Registry, digest: Digest, size: int, path: Path, advance: Callable[[int], None]
) -> None:
    """Make ``path`` hold a blob.

    Raises:
        TransferError: if the registry does not give those bytes.
        WriteError: if they cannot be written.
    """
    with files.translated(path):
        if path.exists():
            if path.stat().st_size == size and files.sha256(path, advance=advance) == digest.hex:
                return
            path.unlink()
    part = path.with_name(f"{path.name}.part")
    resumed = part.exists()
    while True:
        with files.translated(part):
            found = _Download(registry, digest, size, part, advance).run()
        if found == digest.hex:
            break
        part.unlink()
        if not resumed:
            raise TransferError(f"{registry.target.host} gives other bytes than those of {digest}")
        resumed = False  # the old part was damaged; once more from the start
    with files.translated(path):
        os.replace(part, path)
        files.sync_folder(path.parent)


class _Download:
    """A ``.part`` file that grows to its size."""

    def __init__(
        self, registry: Registry, digest: Digest, size: int, part: Path,
        advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.registry, self.digest, self.size = registry, digest, size
        self.part, self.advance = part, advance
        self.hash, self.offset, self.told = hashlib.sha256(), 0, 0

    def run(self) -> str:
        """Fetch what is missing and return the digest of everything."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self.part, flags, 0o600), "r+b", buffering=0) as file:
            self._read_part(file)
            self._fetch_all(file)
            os.fsync(file.fileno())
        return self.hash.hexdigest()

    def _read_part(self, file: Any) -> None:
        if os.fstat(file.fileno()).st_size > self.size:
            file.truncate(0)
        while data := file.read(PIECE):
            self._took(data)

    def _fetch_all(self, file: Any) -> None:
        failures = 0
        patience = self.registry.door.access.patience
        while self.offset < self.size:
            before = self.offset
            try:
                self._fetch(file)
                continue
            except InterruptedTransferError as error:
                failures = 1 if self.offset > before else failures + 1
                if failures >= patience.tries:
                    raise error
            patience.wait(failures)

    def _fetch(self, file: Any) -> None:
        headers = {"Range": f"bytes={self.offset}-"} if self.offset else {}
        with self.registry.stream("GET", f"blobs/{self.digest}", headers=headers) as answer:
            self._check(answer, file)
            # As it comes: pieces that are collected first would be lost with a cut.
            for data in answer.iter_raw():
                if self.offset + len(data) > self.size:
                    file.truncate(0)
                    raise TransferError(
                        f"{self.registry.target.host} sends more than the {self.size} bytes of "
                        f"{self.digest}; refused"
                    )
                _write(file, data)
                self._took(data)
        if self.offset < self.size:
            raise InterruptedTransferError(
                f"{self.registry.target.host} ends {self.digest} too early; run it again, what "
                "was fetched is kept"
            )

    def _check(self, answer: httpx.Response, file: Any) -> None:
        status, host = answer.status_code, self.registry.target.host
        if status in _BUSY:
            raise InterruptedTransferError(f"{host} answers {status}; try again later")
        if status == 200:
            self._restart(file)  # it knows no ranges
        elif status == 206 and self.offset:
            wanted = f"bytes {self.offset}-{self.size - 1}/{self.size}"
            if answer.headers.get("Content-Range") != wanted:
                raise TransferError(f"{host} gives another range of {self.digest} than asked for")
        else:
            refusal = Answer(status, answer.headers, str(answer.url), b"")
            raise self.registry.refused(refusal, f"fetching {self.digest}")
        stated = answer.headers.get("Content-Length", str(self.size - self.offset))
        if stated != str(self.size - self.offset):
            raise TransferError(
                f"{host} has {stated} bytes of {self.digest}, the manifest says "
                f"{self.size - self.offset}"
            )

    def _restart(self, file: Any) -> None:
        self.hash, self.offset = hashlib.sha256(), 0
        file.seek(0)
        file.truncate(0)

    def _took(self, data: bytes) -> None:
        self.hash.update(data)
        self.offset += len(data)
        if self.offset > self.told:
            self.advance(self.offset - self.told)
            self.told = self.offset


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def open_remote(registry: Registry, digest: Digest, size: int) -> BinaryIO:
    """Return a blob as a file of which only what is read is fetched, a piece at a time."""
    return io.BufferedReader(_Ranges(registry, digest, size), PIECE)


class _Ranges(io.RawIOBase):
    def __init__(self, registry: Registry, digest: Digest, size: int) -> None:
        self._registry, self._digest, self._size, self._position = registry, digest, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= end:
            return 0
        headers = {"Range": f"bytes={start}-{end - 1}"}
        with self._registry.stream("GET", f"blobs/{self._digest}", headers=headers) as answer:
            stated = answer.headers.get("Content-Range")
            if answer.status_code != 206 or stated != f"bytes {start}-{end - 1}/{self._size}":
                raise TransferError(
                    f"{self._registry.target.host} gives no part of {self._digest}; pull it instead"
                )
            data = b""
            for piece in answer.iter_raw(PIECE):
                data += piece
                if len(data) > end - start:
                    break
        if len(data) != end - start:
            raise TransferError(f"{self._registry.target.host} gives another range than asked for")
        memoryview(buffer)[: len(data)] = data
        self._position = end
        return len(data)
