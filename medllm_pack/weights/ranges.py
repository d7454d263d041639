"""A file on the Hub, read from its start by range requests: a header without what follows it.

Memory: one window, which doubles while the reading goes on.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from medllm_pack.errors import SourceError, shown
from medllm_pack.weights.answers import PASSING, Address, Patience, network_error, told
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
        from huggingface_hub.errors import HfHubHTTPError

        problem = ""
        for failures in range(1, self._patience.tries + 1):
            try:
                data, problem = self._once(start, stop)
                if len(data) == stop - start:
                    return data
            except HfHubHTTPError as error:
                raise self._address.explained(error, self._item.name) from error
            except network_error() as error:
                problem = told(error)
            if failures < self._patience.tries:
                self._patience.wait(failures)
        raise SourceError(
            f"the first bytes of {shown(self._item.name)} of {self._address.name} do not arrive "
            f"({problem}); try again later"
        )

    def _once(self, start: int, stop: int) -> tuple[bytes, str]:
        """Return bytes, too few where the answer was of no use, and why."""
        with opened(
            self._item,
            self._commit,
            address=self._address,
            stall_s=self._patience.stall_s,
            wanted=f"bytes={start}-{stop - 1}",
        ) as (response, at_home):
            skip = self._skip(response, start, at_home=at_home)
            if skip is None:
                return b"", f"{response.url.host} answered {response.status_code}"
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skip + stop - start:
                    break
            return bytes(data[skip : skip + stop - start]), "the connection ended early"

    def _skip(self, response: Response, start: int, *, at_home: bool) -> int | None:
        """Return how many bytes stand before the wanted ones; None if there are none."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        if response.status_code == 206:
            sent = response.headers.get("Content-Range", "")
            return 0 if sent.startswith(f"bytes {start}-") else None
        if response.status_code == 200:
            # A server without ranges; a header at the start of the file is still within reach.
            return start if start <= _LARGEST else None
        if at_home and response.status_code not in PASSING:
            hf_raise_for_status(response)
        return None
