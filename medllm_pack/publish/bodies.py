"""The body of a large answer, in pieces as they come, without the HTTP parser's copies.

httpx copies every byte of a body five times on its way through the parser, 64 KiB at a time, which
costs more than the network of a data centre does. Where the length is stated, the first piece
empties the parser and the rest is read from the connection itself. Memory: one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import httpx

from medllm_pack.publish.transport import InterruptedTransferError

_PIECE: Final = 64 << 10  # TLS gives 16 KiB at once, and more memory than this costs it dearly


def pieces(answer: httpx.Response, *, stall_s: float) -> Iterator[bytes]:
    """Yield a body as it comes.

    The connection cannot be used for another request afterwards; closing the answer closes it.

    Raises:
        InterruptedTransferError: if it ends before its stated length.
    """
    parsed = answer.iter_raw()
    first = next(parsed, b"")
    yield first
    stream = answer.extensions.get("network_stream")
    text = answer.headers.get("Content-Length", "")
    chunked = answer.http_version != "HTTP/1.1" or "Transfer-Encoding" in answer.headers
    if stream is None or chunked or not text.isdecimal():
        yield from parsed
        return
    left = int(text) - len(first)
    while left > 0:
        data = stream.read(min(left, _PIECE), timeout=stall_s)
        if not data:
            raise InterruptedTransferError(f"{answer.url.host} ends an answer too early")
        left -= len(data)
        yield data
