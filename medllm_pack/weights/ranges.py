"""A file on the Hub, read from its start by range requests: a header without what follows it.

Memory: one window, which doubles while the reading goes on.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from medllm_pack.errors import SourceError, shown
from medllm_pack.patience import AGAIN, Patience, paced
from medllm_pack.weights.answers import Address, PassingError, busy, understood
from medllm_pack.weights.cache import Item
from medllm_pack.weights.request import opened

if TYPE_CHECKING:
    from httpx2 import Response

_FIRST, _LARGEST = 1 << 18, 16 << 20  # bytes; a 7B's header has some 700,000


class RemoteFile(io.RawIOBase):
    """A file that is read forward; only the ranges that are needed come over.

    Attributes:
        fetched: bytes that were asked for so far.
    """

    def __init__(self, item: Item, commit: str, *, address: Address, patience: Patience) -> None:
        self._item, self._commit, self._address = item, commit, address
        self._patience = patience
        self._window, self._start, self._position = b"", 0, 0
        self.fetched = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, fewer only at the end of the file.

        Raises:
            SourceError: if they cannot be brought.
        """
        left = self._item.size - self._position
        n = left if size is None or size < 0 else min(size, left)
        end = self._position + n
        if end > self._start + len(self._window):
            self._fetch(end)
        begin = self._position - self._start
        self._position = end
        return self._window[begin : begin + n]

    def _fetch(self, end: int) -> None:
        length = min(max(_FIRST, 2 * len(self._window)), _LARGEST)
        stop = min(max(end, self._position + length), self._item.size)
        self._window, self._start = self._range(self._position, stop), self._position
        self.fetched += stop - self._start

    def _range(self, start: int, stop: int) -> bytes:
        failures = 0
        while True:
            try:
                with understood(self._address, self._item.name):
                    return self._once(start, stop)
            except PassingError as error:
                failures += 1
                self._wait(failures, error)

    def _wait(self, failures: int, error: PassingError) -> None:
        asked_s = error.asked_s
        if said := self._patience.given_up(failures, str(error), asked_s=asked_s):
            raise SourceError(
                f"the first bytes of {shown(self._item.name)} of {self._address.name} do not "
                f"arrive ({said}); try again later"
            ) from error
        self._patience.wait(failures, asked_s=asked_s)

    def _once(self, start: int, stop: int) -> bytes:
        with opened(
            self._item,
            self._commit,
            address=self._address,
            stall_s=self._patience.stall_s,
            wanted=f"bytes={start}-{stop - 1}",
        ) as (response, at_home):
            skip = self._skip(response, start, at_home=at_home)
            data = bytearray()
            for chunk in paced(response.iter_bytes(), stall_s=self._patience.stall_s):
                data += chunk
                if len(data) >= skip + stop - start:
                    return bytes(data[skip : skip + stop - start])
        raise PassingError("the connection ended early")

    def _skip(self, response: Response, start: int, *, at_home: bool) -> int:
        """Return how many bytes stand before the wanted ones."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status, sent = response.status_code, response.headers.get("Content-Range", "")
        if status == 206 and sent.startswith(f"bytes {start}-"):
            return 0
        if status == 200 and start <= _LARGEST:
            # A server without ranges; a header at the start of the file is still within reach.
            return start
        if at_home and status not in AGAIN:
            hf_raise_for_status(response)
        raise busy(response, response.url.host)
