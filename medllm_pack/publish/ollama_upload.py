"""A blob to registry.ollama.ai, part by part, the way Ollama's own client sends it.

The registry may send each part to a storage address, which carries its own signature and is shown
no login. Written after ollama server/upload.go (2026-08) and tried against a server of the tests
only. An upload that was interrupted begins anew. Memory: one piece a part under way.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import urljoin

from medllm_pack.errors import TransferError
from medllm_pack.ollama.image import Blob
from medllm_pack.patience import AGAIN
from medllm_pack.publish.answers import PIECE, Answer, busy
from medllm_pack.publish.guard import Origin
from medllm_pack.publish.registry import Registry
from medllm_pack.publish.trying import InterruptedTransferError, StoppedError, insist

# server/upload.go: sixteen parts, none smaller or larger than these.
PARTS: Final = 16
LEAST, MOST = 100_000_000, 1_000_000_000
_AT_ONCE: Final = 4
_REDIRECT_S: Final = 1.0  # for a redirect to come before the first byte of a part is sent
_LOOK_S: Final = 0.02

Body = Callable[[int, int], Iterator[bytes]]


def parts_of(size: int) -> list[tuple[int, int]]:
    """Return start and end of each part; a blob without bytes has none."""
    step = min(max(size // PARTS, LEAST), MOST)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def etag_of(digests: list[bytes]) -> str:
    """Return the name that the registry wants the whole to have, from the parts' MD5 digests."""
    whole = hashlib.md5(b"".join(digests), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(digests)}"


class PartedUpload:
    """One blob on its way, part by part.

    Where the registry sends a part to a storage, it names the next address at once, and a few parts
    go at the same time; else one follows the other.

    Args:
        registry: Ollama's.
        blob: what to send.
        body: the bytes from one position to another.
        stop: set when the user interrupted.
    """

    def __init__(self, registry: Registry, blob: Blob, body: Body, stop: threading.Event) -> None:
        self.registry, self.blob, self.body, self.stop = registry, blob, body, stop
        self.parts = parts_of(blob.size)
        self.digests: dict[int, bytes] = {}
        self._early = True  # whether parts are answered before they are sent, as far as we know
        self._storing = _Jobs(_AT_ONCE)

    def run(self) -> Answer:
        """Send everything and return the answer to its end.

        Raises:
            InterruptedTransferError: if it should be begun anew; a GivenUpError if that is of no
                use now.
            StoppedError: if the user interrupted.
            TransferError: if the registry refuses.
        """
        answer = self.registry.call("POST", "blobs/uploads/", headers={"Content-Length": "0"})
        if answer.status != 202:
            raise self.registry.refused(answer, "starting an upload")
        location = _next(self.registry, answer)
        try:
            for n in range(len(self.parts)):
                self._storing.wait_for_room()
                location = self._send(n, location)
        except BaseException:
            self._storing.failed = True
            raise
        finally:
            self._storing.wait()
        self._storing.check()
        query = {"etag": etag_of([self.digests[n] for n in range(len(self.parts))])}
        return self.registry.finish_upload(location, self.blob.digest, query=query, again=True)

    def _send(self, n: int, location: str) -> str:
        """Send a part, or have it sent; return where the next request goes."""
        answer = self._insist(lambda: self._patched(n, location))
        self._early = n not in self.digests
        if answer.status == 307:
            url = self._storage(answer)
            self._storing.start(lambda: self._store(n, url))
        elif answer.status in (404, 410, 416):
            raise InterruptedTransferError(str(self.registry.refused(answer, "sending a part")))
        elif answer.status not in (201, 202, 204) or self._early:
            raise self.registry.refused(answer, "sending a part")
        return _next(self.registry, answer)

    def _patched(self, n: int, location: str) -> Answer:
        start, end = self.parts[n]
        headers = self._headers(n) | {
            "Content-Range": f"{start}-{end - 1}",
            "X-Redirect-Uploads": "1",
        }
        wait_s = _REDIRECT_S if self._early and end - start > PIECE else 0.0
        return self.registry.call(
            "PATCH", location, headers=headers, body=lambda: self._pieces(n, wait_s), again=False
        )

    def _store(self, n: int, url: str) -> None:
        """Put a part where a redirect says; never with a login."""
        door = self.registry.door
        answer = self._insist(
            lambda: door.request(
                "PUT", url, headers=self._headers(n), body=self._pieces(n), again=False
            )
        )
        if answer.status not in (200, 201, 202, 204):
            raise TransferError(
                f"the storage of {self.registry.target.host} answers {answer.status} to a part; "
                "nothing was tagged, run the same command again"
            )

    def _storage(self, redirect: Answer) -> str:
        url: str = urljoin(redirect.url, redirect.headers.get("Location", ""))
        if self.registry.origin.scheme == "https" and Origin.of(url).scheme != "https":
            raise TransferError(
                f"{self.registry.target.host} redirects to an unencrypted address; refused"
            )
        return url

    def _headers(self, n: int) -> dict[str, str]:
        start, end = self.parts[n]
        return {"Content-Type": "application/octet-stream", "Content-Length": str(end - start)}

    def _pieces(self, n: int, wait_s: float = 0.0) -> Iterator[bytes]:
        """Yield a part, and know its MD5 at the end.

        While the registry may still answer with a redirect, empty pieces: with each the connection
        looks for an answer, and a part that goes elsewhere is not sent twice.
        """
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            yield b""
            time.sleep(_LOOK_S)
        digest = hashlib.md5(usedforsecurity=False)
        for piece in self.body(*self.parts[n]):
            self._check_stop()
            digest.update(piece)
            yield piece
        self.digests[n] = digest.digest()

    def _insist(self, attempt: Callable[[], Answer]) -> Answer:
        """Try a part until it is answered."""
        patience, failures = self.registry.door.access.patience, 0
        while True:
            self._check_stop()
            try:
                answer = attempt()
                if answer.status not in AGAIN:
                    return answer
                failure = busy(answer)
            except InterruptedTransferError as error:
                failure = error
            failures += 1
            insist(patience, failures, failure, stop=self.stop)

    def _check_stop(self) -> None:
        if self.stop.is_set() or self._storing.failed:
            raise StoppedError("interrupted; the next run sends this blob anew")


class _Jobs:
    """A few jobs at once, in threads that do not keep the process alive.

    Attributes:
        failed: the others should end.
    """

    def __init__(self, at_once: int) -> None:
        self.failed = False
        self._room = threading.Semaphore(at_once)
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def wait_for_room(self) -> None:
        """Wait until a job may start; raise what one has met."""
        with self._room:
            self.check()

    def start(self, job: Callable[[], None]) -> None:
        """Start a job once there is room."""
        self._room.acquire()
        thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        thread.start()
        self._threads.append(thread)

    def wait(self) -> None:
        """Wait for all."""
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Raise what a job has met."""
        if self._errors:
            raise self._errors[0]  # the first; it ended the others

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._errors.append(error)
            self.failed = True
        finally:
            self._room.release()


def _next(registry: Registry, answer: Answer) -> str:
    """Return where the next request goes: Docker-Upload-Location before Location."""
    if named := answer.headers.get("Docker-Upload-Location"):
        url: str = urljoin(answer.url, named)
        if Origin.of(url) != registry.origin:
            raise TransferError(f"{registry.target.host} continues the upload elsewhere; refused")
        return url
    return registry.location(answer)
