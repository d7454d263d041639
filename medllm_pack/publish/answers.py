"""What comes back: small answers that are kept, and failures in one line with the next step.

Sends nothing. Memory: an answer that is kept has a limit.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final

import httpcore
import httpx

from medllm_pack.errors import TransferError, shown
from medllm_pack.patience import retry_after
from medllm_pack.publish.guard import Origin
from medllm_pack.publish.proxy import proxy_for
from medllm_pack.publish.trying import InterruptedTransferError

KEPT: Final = 4 << 20  # bytes; the specification asks for 4 MiB of manifest
PIECE: Final = 1 << 20  # bytes that are read or written at a time
# While an answer is read, and before that.
BROKEN: Final = (
    httpx.HTTPError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException,
)  # fmt: skip
FAILURES: Final = (
    *BROKEN, httpx.InvalidURL, httpcore.UnsupportedProtocol, httpcore.ProxyError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """An answer whose body, if it was small, is at hand."""

    status: int
    headers: httpx.Headers
    url: str
    body: bytes = field(repr=False)

    @classmethod
    def keep(cls, answer: httpx.Response) -> Answer:
        """Read a body to its end.

        Raises:
            TransferError: if it is larger than what is kept.
        """
        body = bytearray()
        for piece in answer.iter_raw(PIECE):
            body += piece
            if len(body) > KEPT:
                raise TransferError(
                    f"{answer.url.host} answers with more than {KEPT} bytes; refused"
                )
        return cls(answer.status_code, answer.headers, str(answer.url), bytes(body))


def busy(answer: Answer) -> InterruptedTransferError:
    """Return what an answer means that another try may better."""
    host = Origin.of(answer.url).host
    said = f"{host} answers {answer.status}; try again later"
    return InterruptedTransferError(said, asked_s=retry_after(answer.headers), status=answer.status)


def explained(origin: Origin, error: Exception) -> TransferError:
    """Say what failed; not in the error's own words, which may hold an address with a signature."""
    host = origin.host
    certificate = _cause(error, ssl.SSLCertVerificationError)
    if certificate is not None:
        return TransferError(
            f"the certificate of {host} is not trusted ({certificate.verify_message}); name its "
            "authority with --ca FILE or SSL_CERT_FILE"
        )
    if isinstance(error, httpcore.ProxyError):
        return _refused_by_proxy(host, str(error)[:3])
    name = type(error).__name__
    fact = "gives no answer in time" if "Timeout" in name else f"cannot be reached ({name})"
    proxied = origin.scheme == "https" and proxy_for(host, origin.port)
    way = " through the proxy of HTTPS_PROXY" if proxied else ""
    return InterruptedTransferError(
        f"{host} {fact}{way}; try again; what has been transferred is kept"
    )


def _refused_by_proxy(host: str, status: str) -> TransferError:
    if status.startswith("5"):
        return InterruptedTransferError(
            f"the proxy of HTTPS_PROXY answers {shown(status)} for {host}; try again"
        )
    hint = (
        "put user and password into HTTPS_PROXY, http://user:password@host:port"
        if status == "407"
        else f"ask who runs it, or let NO_PROXY name {host}"
    )
    return TransferError(
        f"the proxy of HTTPS_PROXY gives no way to {host} ({shown(status)}): {hint}"
    )


def _cause(error: BaseException | None, kind: type[ssl.SSLCertVerificationError]) -> (
    ssl.SSLCertVerificationError | None
):  # fmt: skip
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error
