"""Which proxy of the environment leads to a host: HTTPS_PROXY or ALL_PROXY, and NO_PROXY.

A proxy is asked for a tunnel and nothing else: what goes through is encrypted to the registry. So
it serves HTTPS only, plain HTTP goes straight, and this machine is never reached through one. A
login in the proxy's address goes to the proxy alone. Sends nothing itself.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from medllm_pack.errors import TransferError, shown
from medllm_pack.publish.credentials import Login, Secret
from medllm_pack.publish.guard import is_loopback


@dataclass(frozen=True)
class Proxy:
    """A proxy; ``scheme`` says how it is spoken to."""

    scheme: str
    host: str
    port: int
    login: Login | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str) -> Proxy:
        """Read an address as it stands in the environment; without a scheme it is http.

        Raises:
            TransferError: if it is none, or of a kind that is not understood.
        """
        parts = urlsplit(text if "://" in text else f"http://{text}")
        if parts.scheme not in ("http", "https"):
            raise TransferError(
                f"HTTPS_PROXY names a proxy of the kind {shown(parts.scheme)}; http and https are "
                "understood, and NO_PROXY names hosts that need none"
            )
        try:
            port = parts.port
        except ValueError:
            port = -1
        if not parts.hostname or port == -1:
            # Not its text, which may hold a password.
            raise TransferError("HTTPS_PROXY is not an address; it is http://host:port")
        user, secret = unquote(parts.username or ""), Secret(unquote(parts.password or ""))
        default = 443 if parts.scheme == "https" else 80
        return cls(
            parts.scheme, parts.hostname, port or default, Login(user, secret) if user else None
        )

    def headers(self) -> list[tuple[str | bytes, str | bytes]]:
        """Return what the proxy is told besides the host to connect to."""
        return [("Proxy-Authorization", self.login.basic.reveal())] if self.login else []


def proxy_for(host: str, port: int, *, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """Return the proxy through which a host is reached by HTTPS, or None.

    Raises:
        TransferError: if the environment names one that is not understood.
    """
    named = _first(environment, "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    excepted = _first(environment, "no_proxy", "NO_PROXY")
    if not named or is_loopback(host) or _is_excepted(host, port, excepted):
        return None
    return Proxy.parse(named)


def _first(environment: Mapping[str, str], *names: str) -> str:
    return next((text for name in names if (text := environment.get(name, "").strip())), "")


def _is_excepted(host: str, port: int, names: str) -> bool:
    """Read NO_PROXY as curl and Docker do: suffixes of names, addresses, networks, ports."""
    host = host.rstrip(".").lower()
    for entry in names.lower().replace(",", " ").split():
        name, _, stated = entry.rpartition(":") if entry.count(":") == 1 else (entry, "", "")
        if stated and stated != str(port):
            continue
        suffix = name.removeprefix("*").lstrip(".")
        if entry == "*" or host == suffix or (suffix and host.endswith(f".{suffix}")):
            return True
        if _is_in_network(host, name):
            return True
    return False


def _is_in_network(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network.strip("[]"), strict=False)
    except ValueError:
        return False
