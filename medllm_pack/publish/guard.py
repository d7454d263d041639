"""Whom we talk to: origins, and connections that refuse inner addresses nobody asked for.

A registry may send us elsewhere. An address of this machine or of the local network is then
refused unless the user named that host, and the check is made on the very address connected to,
so that a name cannot resolve to one thing for the check and to another for the connection.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpcore

from medllm_pack.errors import TransferError, shown
from medllm_pack.publish.line import Line

_PORTS = {"http": 80, "https": 443}


class ForbiddenAddressError(TransferError):
    """A host that nobody named lies on this machine or in the local network."""


@dataclass(frozen=True)
class Origin:
    """Scheme, host and port: what a login belongs to."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Return the origin of an absolute URL.

        Raises:
            TransferError: if it is not an HTTP address, or holds a login.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise TransferError("the registry names an address that is none") from None
        if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
            raise TransferError("the registry names an address that is not plain HTTP or HTTPS")
        return cls(parts.scheme, parts.hostname, port or _PORTS[parts.scheme])

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = self.port == _PORTS[self.scheme]
        return f"{self.scheme}://{host}" if default else f"{self.scheme}://{host}:{self.port}"


def host_name(host: str) -> str:
    """Return a ``host[:port]`` without its port."""
    return urlsplit(f"//{host}").hostname or host


def is_loopback(host: str) -> bool:
    """Say whether a host's name means this machine, without asking a name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class GuardedBackend(httpcore.NetworkBackend):
    """Connects to checked addresses only."""

    def __init__(self, named: frozenset[str]) -> None:
        self._named = named
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers."""
        failure: Exception = httpcore.ConnectError("the name has no address")
        for address in self._addresses(host, port):
            try:
                return Line(
                    self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError("the name has no address") from error
        addresses = [str(info[4][0]) for info in found]
        if host not in self._named:
            for address in addresses:
                refuse_inner(address.partition("%")[0], host)
        return addresses


def refuse_inner(address: str, host: str) -> None:
    """Refuse an address of this machine or of the local network.

    Raises:
        ForbiddenAddressError: naming the host that led there.
    """
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if not ip.is_global or ip.is_multicast or (mapped is not None and not mapped.is_global):
        raise ForbiddenAddressError(
            f"the registry sends us to {shown(host)}, which is this machine or the local network; "
            f"if that is right, say --allow-host {host}"
        )
