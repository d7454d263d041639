"""A blob to registry.ollama.ai, part by part, the way Ollama's own client sends it.

The registry may send each part to a storage address, which carries its own signature and is shown
no login. Written after ollama server/upload.go (2026-08) and tried against a server of the tests
only. An upload that was interrupted begins anew. Memory: one piece.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import urljoin

from medllm_pack.errors import TransferError
from medllm_pack.ollama.image import Blob
from medllm_pack.publish.guard import Origin
from medllm_pack.publish.registry import Registry
from medllm_pack.publish.transport import PIECE, Answer, InterruptedTransferError

# server/upload.go: sixteen parts, none smaller or larger than these.
PARTS: Final = 16
LEAST, MOST = 100_000_000, 1_000_000_000

Body = Callable[[int, int], Iterator[bytes]]


def parts_of(size: int) -> list[tuple[int, int]]:
    """Return start and end of each part; a blob without bytes has none."""
    step = min(max(size // PARTS, LEAST), MOST)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def etag_of(digests: list[bytes]) -> str:
    """Return the name that the registry wants the whole to have, from the parts' MD5 digests."""
    whole = hashlib.md5(b"".join(digests), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(digests)}"


def send_parts(registry: Registry, blob: Blob, body: Body, stop: threading.Event) -> Answer | None:
    """Send a blob and return the answer to its end; None if the user interrupted.

    Args:
        registry: Ollama's.
        blob: what to send.
        body: the bytes from one position to another.
        stop: set when the user interrupted.

    Raises:
        InterruptedTransferError: if it should be begun anew.
        TransferError: if the registry refuses.
    """
    answer = registry.call("POST", "blobs/uploads/", headers={"Content-Length": "0"})
    if answer.status != 202:
        raise registry.refused(answer, "starting an upload")
    location, digests = _next(registry, answer), []
    for start, end in parts_of(blob.size):
        if stop.is_set():
            return None
        location = _send_part(registry, location, body, start, end)
        digests.append(_md5(blob, start, end))
    query = {"etag": etag_of(digests)}
    return registry.finish_upload(location, blob.digest, query=query, again=True)


def _send_part(registry: Registry, location: str, body: Body, start: int, end: int) -> str:
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(end - start),
        "Content-Range": f"{start}-{end - 1}",
        "X-Redirect-Uploads": "1",
    }
    answer = registry.call(
        "PATCH", location, headers=headers, body=lambda: body(start, end), again=False
    )
    if answer.status == 307:
        _store(registry, answer, body, start, end)
    elif answer.status >= 500:
        raise InterruptedTransferError(str(registry.refused(answer, "sending a part")))
    elif answer.status not in (201, 202, 204):
        raise registry.refused(answer, "sending a part")
    return _next(registry, answer)


def _store(registry: Registry, redirect: Answer, body: Body, start: int, end: int) -> None:
    """Put a part where a redirect says; never with a login."""
    url = urljoin(redirect.url, redirect.headers.get("Location", ""))
    if registry.origin.scheme == "https" and Origin.of(url).scheme != "https":
        raise TransferError(f"{registry.target.host} redirects to an unencrypted address; refused")
    answer = registry.door.request(
        "PUT", url, headers={"Content-Length": str(end - start)}, body=body(start, end), again=False
    )
    if answer.status not in (200, 201, 202, 204):
        raise InterruptedTransferError(
            f"the storage of {registry.target.host} answers {answer.status} to a part; try again"
        )


def _next(registry: Registry, answer: Answer) -> str:
    """Return where the next request goes: Docker-Upload-Location before Location."""
    if named := answer.headers.get("Docker-Upload-Location"):
        url: str = urljoin(answer.url, named)
        if Origin.of(url) != registry.origin:
            raise TransferError(f"{registry.target.host} continues the upload elsewhere; refused")
        return url
    return registry.location(answer)


def _md5(blob: Blob, start: int, end: int) -> bytes:
    digest, left = hashlib.md5(usedforsecurity=False), end - start
    with blob.open() as file:
        file.seek(start)
        while left and (data := file.read(min(PIECE, left))):
            digest.update(data)
            left -= len(data)
    return digest.digest()
