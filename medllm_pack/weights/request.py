"""One file's bytes, or a range of them, as an open answer of the Hub or of the storage behind it.

Redirects are followed by hand: the token goes to the Hub's own origin and nowhere else, https is
never left, and what the Hub announces must be what it lists. Goes through the Hub library's
connection. Does not know where the bytes go, and does not try twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from medllm_pack import __version__
from medllm_pack.errors import SourceError, shown
from medllm_pack.weights.answers import Address
from medllm_pack.weights.cache import DIGEST, Item

if TYPE_CHECKING:
    from httpx2 import Response

_MAX_REDIRECTS = 5


@contextmanager
def opened(
    item: Item, commit: str, *, address: Address, stall_s: float, wanted: str | None = None
) -> Iterator[tuple[Response, bool]]:
    """Yield the answer that ends a chain of redirects, and whether the Hub itself gave it.

    Args:
        item: the file as the Hub lists it.
        commit: the commit that it belongs to.
        address: the repository.
        stall_s: silence after which a connection counts as dead.
        wanted: value of the Range header; the whole file if None.

    Raises:
        SourceError: if a redirect is refused, or another file is announced than was listed.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
        build_hf_headers,
        get_session,
    )

    url = hf_hub_url(address.name, item.name, revision=commit, endpoint=address.endpoint)
    headers = build_hf_headers(library_name="medllm-pack", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # ranges count bytes of the file
    if wanted:
        headers["Range"] = wanted
    home = _origin(url)
    for _ in range(_MAX_REDIRECTS + 1):
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=False, timeout=stall_s
        ) as response:
            at_home = _origin(url) == home
            if at_home:
                _check_announced(response, item, address)
            if not response.has_redirect_location:
                yield response, at_home
                return
            url = redirected(url, response.headers["Location"], address.host)
        if _origin(url) != home:
            headers.pop("authorization", None)  # for good, even if the next hop leads home
    raise SourceError(f"{address.host} sends {shown(item.name)} in circles; try again later")


def _check_announced(response: Response, item: Item, address: Address) -> None:
    if not (response.is_success or response.has_redirect_location):
        return
    # X-Linked-Etag describes the file behind a redirect; a bare ETag only the answer itself.
    plain = None if response.has_redirect_location else response.headers.get("ETag")
    etag = (response.headers.get("X-Linked-Etag") or plain or "").removeprefix("W/").strip('"')
    comparable = DIGEST.fullmatch(etag) and len(etag) == len(item.digest)
    if comparable and etag != item.digest:
        raise SourceError(
            f"the Hub announces {shown(item.name)} of {address.name} with the digest {etag}, its "
            f"listing says {item.digest}; try again later"
        )


def redirected(url: str, location: str, host: str) -> str:
    """Return where a redirect leads.

    Raises:
        SourceError: if it leaves http and https, or https for http.
    """
    try:
        target = urljoin(url, location)
        scheme = _origin(target)[0]
    except ValueError:
        scheme = ""
    if scheme not in {"http", "https"} or (scheme, urlsplit(url).scheme) == ("http", "https"):
        raise SourceError(
            f"{host} redirects to an address that is refused: only http and https are "
            "followed, and https is never left. Check HF_ENDPOINT and the proxy settings"
        )
    return target


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default
