"""The door to HTTP: one request, its redirects by hand, its failures as our own.

A login goes to the origin it was meant for and is dropped at any other. Of the environment are read
the proxies and, by OpenSSL, SSL_CERT_FILE and SSL_CERT_DIR; no netrc and nothing else.
Knows nothing of registries. Memory: bodies are streamed; a body that is kept has a limit.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urljoin

import httpx

import medllm_pack
from medllm_pack.errors import TransferError, shown
from medllm_pack.patience import AGAIN, Patience
from medllm_pack.publish.answers import BROKEN, FAILURES, Answer, busy, explained
from medllm_pack.publish.credentials import Secret
from medllm_pack.publish.guard import Origin, host_name, is_loopback
from medllm_pack.publish.pools import GuardedTransport
from medllm_pack.publish.trying import InterruptedTransferError, insist

_MOST_REDIRECTS = 5
_CONNECT_S = 15.0
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Access:
    """How the user lets us in.

    Attributes:
        insecure: plain HTTP is allowed for the registry.
        ca: certificates to trust besides the system's.
        allow_hosts: hosts of the local network that a registry may send us to.
        auth_hosts: hosts that may be shown the registry's login.
        transport: makes the connections; the tests' seam.
    """

    insecure: bool = False
    ca: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    auth_hosts: tuple[str, ...] = ()
    patience: Patience = Patience()
    transport: Callable[[httpx.BaseTransport], httpx.BaseTransport] | None = field(
        default=None, repr=False
    )


class Door:
    """Sends requests; use it as a context manager.

    Args:
        host: the registry, as the user named it.
        access: what is allowed.
    """

    def __init__(self, host: str, access: Access) -> None:
        self.access = access
        self._host = host
        named = {host_name(h) for h in (host, *access.allow_hosts, *access.auth_hosts)}
        self._context = _certificates(access.ca)
        transport: httpx.BaseTransport = GuardedTransport(frozenset(named), self._context)
        self._client = httpx.Client(
            transport=access.transport(transport) if access.transport else transport,
            trust_env=False,
            follow_redirects=False,
            headers={
                "User-Agent": f"medllm-pack/{medllm_pack.__version__}",
                "Accept-Encoding": "identity",
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def origin(self) -> Origin:
        """Return the registry's origin: HTTPS, or plain HTTP where that is allowed and spoken.

        Raises:
            TransferError: if it cannot be reached.
        """
        secure = Origin.of(f"https://{self._host}")
        if not self.access.insecure and not is_loopback(secure.host):
            return secure
        return secure if self._speaks_tls(secure) else Origin.of(f"http://{self._host}")

    def _speaks_tls(self, origin: Origin) -> bool:
        import socket

        context = ssl.create_default_context()  # only whether, not who: nothing is sent
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with (
                socket.create_connection((origin.host, origin.port), 5.0) as plain,
                context.wrap_socket(plain, server_hostname=origin.host),
            ):
                return True
        except OSError:
            return False

    @contextmanager
    def stream(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Iterable[bytes] | bytes | None = None,
        authorization: Secret | None = None,
        answer_s: float | None = None,
        follow: Callable[[Origin, Origin], bool] | None = None,
    ) -> Iterator[httpx.Response]:
        """Send a request and yield the answer, its body unread.

        Args:
            method: of HTTP; redirects are followed for GET and HEAD only.
            url: absolute.
            headers: without the login.
            body: bytes, or pieces of them with a Content-Length among the headers.
            authorization: goes to this URL's origin and nowhere else.
            answer_s: how long the answer may take, if longer than a silence.
            follow: says of a redirect from one origin to another whether to follow it.

        Raises:
            InterruptedTransferError: if the connection fails or falls silent.
            TransferError: if a redirect leads where we do not go.
        """
        first = Origin.of(url)
        self._check_plain(first)
        for _ in range(_MOST_REDIRECTS + 1):
            sent = dict(headers or {})
            if authorization is not None and Origin.of(url) == first:
                sent["Authorization"] = authorization.reveal()
            with self._sent(method, url, sent, body, answer_s) as answer:
                target = answer.headers.get("Location")
                wanted = method in ("GET", "HEAD") and answer.status_code in _REDIRECTS and target
                if not wanted:
                    yield answer
                    return
                here, there = Origin.of(url), Origin.of(joined := urljoin(url, target))
                if follow is not None and not follow(here, there):
                    yield answer
                    return
                self._check_redirect(here, there)
                url = joined
        raise TransferError(f"{first.host} redirects more than {_MOST_REDIRECTS} times")

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Iterable[bytes] | bytes | None = None,
        authorization: Secret | None = None,
        again: bool = True,
        answer_s: float | None = None,
    ) -> Answer:
        """Send a request and keep the answer; if ``again``, insist where it may help.

        Raises:
            InterruptedTransferError: if the server cannot be reached; a GivenUpError if it was
                insisted on, also where the server stays busy.
            TransferError: if the answer is larger than what is kept.
        """
        failures = 0
        while True:
            try:
                with self.stream(
                    method, url, headers=headers, body=body, authorization=authorization,
                    answer_s=answer_s,
                ) as streamed:  # fmt: skip
                    answer = Answer.keep(streamed)
                if answer.status not in AGAIN or not again:
                    return answer
                failure = busy(answer)
            except InterruptedTransferError as error:
                failure = error
            if not again:
                raise failure
            failures += 1
            insist(self.access.patience, failures, failure)

    @contextmanager
    def _sent(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: Iterable[bytes] | bytes | None,
        answer_s: float | None,
    ) -> Iterator[httpx.Response]:
        origin = Origin.of(url)
        try:
            request = self._client.build_request(
                method, url, headers=headers, content=body, timeout=_timeout(self.access, answer_s)
            )
            answer = self._client.send(request, stream=True)
        except FAILURES as error:
            raise explained(origin, error) from None
        try:
            yield answer
        except BROKEN as error:
            raise explained(origin, error) from None
        finally:
            answer.close()

    def _check_plain(self, origin: Origin) -> None:
        if origin.scheme == "http" and not (self.access.insecure or is_loopback(origin.host)):
            raise TransferError(
                f"{origin.host} would be spoken to without encryption; "
                "say --insecure if that is meant"
            )

    def _check_redirect(self, here: Origin, there: Origin) -> None:
        if here.scheme == "https" and there.scheme != "https":
            raise TransferError(f"{here.host} redirects to an unencrypted address; refused")
        self._check_plain(there)


def _timeout(access: Access, answer_s: float | None) -> httpx.Timeout:
    stall_s = access.patience.stall_s
    return httpx.Timeout(stall_s, connect=_CONNECT_S, read=answer_s or stall_s)


def _certificates(ca: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not context.get_ca_certs():
        import certifi  # a machine without certificates of its own

        context.load_verify_locations(certifi.where())
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError) as error:
            raise TransferError(f"--ca {shown(ca)} holds no certificates in PEM form") from error
    return context
