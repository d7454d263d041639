"""One blob from a registry to a file: streamed, digested on the way, and gone on with after a cut.

What was fetched stays in a ``.part`` file beside; its bytes are digested again before more is asked
for, so a digest always covers every byte of the file. Not one byte more than stated is kept.
Also the digest alone, without a file, and a reader that fetches only the ranges that are read.
Memory: the windows of incoming.py.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import TransferError
from medllm_pack.incoming import Incoming, Passing
from medllm_pack.patience import AGAIN
from medllm_pack.publish.answers import PIECE, Answer, busy
from medllm_pack.publish.bodies import Body
from medllm_pack.publish.registry import Registry
from medllm_pack.publish.trying import InterruptedTransferError, insist


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
        with files.translated(part), Incoming.at(part, advance) as incoming:
            found = _Download(registry, digest, size, incoming).run()
        if found == digest.hex:
            break
        part.unlink()
        if not resumed:
            raise TransferError(f"{registry.target.host} gives other bytes than those of {digest}")
        resumed = False  # the old part was damaged; once more from the start
    with files.translated(path):
        os.replace(part, path)
        files.sync_folder(path.parent)


def digest_blob(
    registry: Registry, digest: Digest, size: int, advance: Callable[[int], None]
) -> str:
    """Return the SHA-256 of what a registry gives as a blob; nothing of it is kept.

    Raises:
        InterruptedTransferError: if it does not come.
        TransferError: if the registry refuses it, or has another number of bytes.
    """
    return _Download(registry, digest, size, Passing(advance)).run()


class _Download:
    """A ``.part`` file that grows to its size."""

    def __init__(
        self, registry: Registry, digest: Digest, size: int, part: Incoming | Passing
    ) -> None:
        self.registry, self.digest, self.size, self.part = registry, digest, size, part
        self.patience = registry.door.access.patience

    def run(self) -> str:
        """Fetch what is missing and return the digest of everything."""
        self.part.take_up(self.size)
        failures = 0
        while self.part.offset < self.size:
            before = self.part.offset
            try:
                self._fetch()
                continue
            except InterruptedTransferError as error:
                failures = self.patience.count(failures, gained=self.part.offset - before)
                insist(self.patience, failures, error)
        return self.part.finish()

    def _fetch(self) -> None:
        offset = self.part.offset
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self.registry.stream("GET", f"blobs/{self.digest}", headers=headers) as answer:
            self._check(answer)
            body = Body(answer, stall_s=self.patience.stall_s)
            while n := body.read_into(self.part.room()):
                if self.part.offset + n > self.size:
                    self.part.restart()
                    raise TransferError(
                        f"{self.registry.target.host} sends more than the {self.size} bytes of "
                        f"{self.digest}; refused"
                    )
                self.part.filled(n)
        if self.part.offset < self.size:
            raise InterruptedTransferError(
                f"{self.registry.target.host} ends {self.digest} too early; run it again, what "
                "was fetched is kept"
            )

    def _check(self, answer: httpx.Response) -> None:
        status, host, offset = answer.status_code, self.registry.target.host, self.part.offset
        refusal = Answer(status, answer.headers, str(answer.url), b"")
        if status in AGAIN:
            raise busy(refusal)
        if status == 200:
            self.part.restart()  # it knows no ranges
        elif status == 206 and offset:
            wanted = f"bytes {offset}-{self.size - 1}/{self.size}"
            if answer.headers.get("Content-Range") != wanted:
                raise TransferError(f"{host} gives another range of {self.digest} than asked for")
        else:
            raise self.registry.refused(refusal, f"fetching {self.digest}")
        expected = self.size - self.part.offset
        stated = answer.headers.get("Content-Length", str(expected))
        if stated != str(expected):
            raise TransferError(
                f"{host} has {stated} bytes of {self.digest}, the manifest says {expected}"
            )


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
