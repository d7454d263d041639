"""httpx's transport over guarded connections, straight or through a proxy of the environment.

A proxy may resolve a name that is unknown here. Where it is known, its addresses are checked here
all the same: a redirect must not make the proxy fetch what lies inside.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator

import httpcore
import httpx

from medllm_pack.publish.guard import GuardedBackend, refuse_inner
from medllm_pack.publish.proxy import Proxy, proxy_for

_POOL = 8  # connections


class _Body(httpx.SyncByteStream):
    def __init__(self, stream: Iterable[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        if hasattr(self._stream, "close"):
            self._stream.close()


class GuardedTransport(httpx.BaseTransport):
    """httpx's transport over pools whose connections are checked.

    Args:
        named: hosts the user named.
        context: how certificates are checked.
    """

    def __init__(self, named: frozenset[str], context: ssl.SSLContext) -> None:
        self._named, self._context = named, context
        self._straight = httpcore.ConnectionPool(
            ssl_context=context, max_connections=_POOL, network_backend=GuardedBackend(named)
        )
        self._tunnels: dict[Proxy, httpcore.HTTPProxy] = {}
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the errors are httpcore's."""
        assert isinstance(request.stream, httpx.SyncByteStream)
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        answer = self._pool(request.url).handle_request(
            httpcore.Request(
                request.method,
                url,
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        assert isinstance(answer.stream, Iterable)
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(answer.stream),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        """Close every connection."""
        for pool in (self._straight, *self._tunnels.values()):
            pool.close()

    def _pool(self, url: httpx.URL) -> httpcore.ConnectionPool:
        proxy = proxy_for(url.host, url.port or 443) if url.scheme == "https" else None
        if proxy is None:
            return self._straight
        if url.host not in self._named:
            _refuse_known_inner(url.host)
        with self._lock:
            if proxy not in self._tunnels:
                self._tunnels[proxy] = self._tunnel(proxy)
            return self._tunnels[proxy]

    def _tunnel(self, proxy: Proxy) -> httpcore.HTTPProxy:
        return httpcore.HTTPProxy(
            httpcore.URL(scheme=proxy.scheme, host=proxy.host, port=proxy.port, target="/"),
            proxy_headers=proxy.headers(),
            ssl_context=self._context,
            proxy_ssl_context=self._context if proxy.scheme == "https" else None,
            max_connections=_POOL,
            network_backend=GuardedBackend(self._named | {proxy.host}),
        )


def _refuse_known_inner(host: str) -> None:
    try:
        addresses = [str(ipaddress.ip_address(host))]
    except ValueError:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return  # the proxy may know it
        addresses = [str(info[4][0]) for info in found]
    for address in addresses:
        refuse_inner(address.partition("%")[0], host)
