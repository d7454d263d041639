"""Logging in: what a registry asks for, whom we show a login, and tokens that do not run out.

Three ways: Basic; Docker's token server, asked with the login; Ollama's token server, asked with a
request signed by the user's key. A realm on a host that the registry has no claim to gets nothing,
not even a request. Knows nothing of what the tokens are for.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from medllm_pack.errors import TransferError, shown
from medllm_pack.publish.answers import Answer
from medllm_pack.publish.credentials import Login, Secret
from medllm_pack.publish.guard import Origin, host_name
from medllm_pack.publish.transport import Door

# Token servers on another host that belong to a registry, as both document them.
_KNOWN_REALMS = {
    ("registry-1.docker.io", "auth.docker.io"),
    ("index.docker.io", "auth.docker.io"),
    ("docker.io", "auth.docker.io"),
    ("registry.gitlab.com", "gitlab.com"),
}
_DEFAULT_LIFE_S = 60  # Docker's token specification, where expires_in is absent
_LONGEST_LIFE_S = 3600
# base64(hex(sha256(""))): ollama auth/auth.go signs the digest of an empty body.
_EMPTY_BODY = (
    "ZTNiMGM0NDI5OGZjMWMxNDlhZmJmNGM4OTk2ZmI5MjQyN2FlNDFlNDY0OWI5MzRjYTQ5NTk5MWI3ODUyYjg1NQ=="
)
_SCHEME = re.compile(r"\s*,?\s*([A-Za-z]+)(?:\s+|$)")
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))')
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Challenge:
    """One way to log in that a 401 offers."""

    scheme: str
    realm: str = ""
    service: str = ""
    scopes: tuple[str, ...] = ()


def parse_challenges(header: str) -> tuple[Challenge, ...]:
    """Read a ``WWW-Authenticate`` header; what is not understood is left out."""
    found, position = [], 0
    while match := _SCHEME.match(header, position):
        position = match.end()
        values: dict[str, str] = {}
        while pair := _PARAMETER.match(header, position):
            quoted = pair[2] is not None
            value = re.sub(r"\\(.)", r"\1", pair[2]) if quoted else pair[3]
            values.setdefault(pair[1].lower(), value)
            position = pair.end()
        found.append(
            Challenge(
                match[1].lower(),
                values.get("realm", ""),
                values.get("service", ""),
                tuple(values.get("scope", "").split()),
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Key:
    """An Ed25519 key; ``sign`` keeps the secret to itself."""

    public: str
    sign: Callable[[bytes], bytes]

    @classmethod
    def read(cls, path: Path) -> Key:
        """Read an OpenSSH private key without a passphrase.

        Raises:
            TransferError: if there is none, or it is of another kind.
        """
        from cryptography.hazmat.primitives import serialization as s
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        try:
            key = s.load_ssh_private_key(path.read_bytes(), password=None)
        except OSError:
            raise TransferError(
                f"{shown(path)} cannot be read; Ollama makes it when it first starts, and "
                "https://ollama.com/settings/keys must know its public half"
            ) from None
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise TransferError(f"{shown(path)} is not an Ed25519 key without a passphrase")
        line = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
        return cls(line.decode("ascii").split()[1], key.sign)


def signed_url(challenge: Challenge, *, now: int, nonce: str) -> str:
    """Return the address at which Ollama's client asks for a token."""
    parts = urlsplit(challenge.realm)
    query = parse_qsl(parts.query, keep_blank_values=True)
    query += [("service", challenge.service), ("ts", str(now)), ("nonce", nonce)]
    query += [("scope", scope) for scope in challenge.scopes or ("",)]
    return urlunsplit(parts._replace(query=urlencode(sorted(query, key=lambda pair: pair[0]))))


def signature(key: Key, url: str) -> Secret:
    """Return the Authorization header of a signed token request."""
    signed = key.sign(f"GET,{url},{_EMPTY_BODY}".encode())
    return Secret(f"{key.public}:{base64.b64encode(signed).decode('ascii')}")


def check_realm(origin: Origin, realm: str, *, exact: bool, allowed: Sequence[str] = ()) -> None:
    """Refuse a token server that the registry has no claim to.

    Args:
        origin: the registry's.
        realm: where it sends us for a token.
        exact: as Ollama's client: host and port must be the registry's.
        allowed: hosts that the user named.

    Raises:
        TransferError: naming the host, and the option that would allow it.
    """
    there = Origin.of(realm)
    if origin.scheme == "https" and there.scheme != "https":
        raise TransferError(f"{origin.host} asks for the login over an unencrypted way; refused")
    same = there.host == origin.host and (there.port == origin.port or not exact)
    known = not exact and (origin.host, there.host) in _KNOWN_REALMS
    if not same and not known and there.host not in {host_name(host) for host in allowed}:
        raise TransferError(
            f"{origin.host} wants the login to be shown to {shown(there.host)}, another host; "
            f"refused. If that is its token server, say --auth-host {there.host}"
        )


@dataclass
class _Token:
    header: Secret
    until: float


class Session:
    """The login for one repository of one registry, from the first 401 to the end.

    Args:
        door: sends the token requests.
        origin: the registry's; the only one that gets what :meth:`header` returns.
        login: Docker's login, or None for an anonymous one.
        key: Ollama's key; if given, token requests are signed and nothing else is tried.
        scopes: what will be needed, asked for at once.
    """

    def __init__(
        self,
        door: Door,
        origin: Origin,
        *,
        login: Callable[[], Login | None],
        key: Callable[[], Key] | None,
        scopes: Sequence[str],
    ) -> None:
        self._door, self._origin, self._login, self._key = door, origin, login, key
        self._scopes = tuple(scopes)
        self._challenge: Challenge | None = None
        self._token: _Token | None = None
        self._lock = threading.Lock()

    def header(self) -> Secret | None:
        """Return the Authorization header of the next request; renews what is about to end."""
        with self._lock:
            if self._token is not None and time.monotonic() > self._token.until:
                self._token = self._fetched()
            return self._token.header if self._token else None

    def renew(self, answer: Answer, *, used: Secret | None) -> bool:
        """Log in as a 401 asks; say whether that gave something new to try.

        Raises:
            TransferError: if there is no login, or it is wanted by the wrong host.
        """
        with self._lock:
            if self._token is not None and self._token.header is not used:
                return True  # another thread was faster
            offered = parse_challenges(", ".join(answer.headers.get_list("WWW-Authenticate")))
            self._challenge = self._preferred(offered)
            if self._challenge is None or (used and self._challenge.scheme == "basic"):
                return False
            self._token = self._fetched()
            return self._token is not None

    def _preferred(self, offered: Sequence[Challenge]) -> Challenge | None:
        wanted = ("bearer",) if self._key else ("bearer", "basic")
        ordered = [c for scheme in wanted for c in offered if c.scheme == scheme]
        return ordered[0] if ordered else None

    def _fetched(self) -> _Token | None:
        challenge = self._challenge
        assert challenge is not None
        if challenge.scheme == "basic":
            login = self._login()
            return _Token(login.basic, float("inf")) if login and login.user else None
        check_realm(
            self._origin,
            challenge.realm,
            exact=self._key is not None,
            allowed=self._door.access.auth_hosts,
        )
        if self._key is not None:
            return self._token_of(self._ask_signed(challenge, self._key()))
        return self._token_of(self._ask_docker(challenge, self._login()))

    def _ask_signed(self, challenge: Challenge, key: Key) -> Answer:
        nonce = base64.urlsafe_b64encode(secrets.token_bytes(16)).rstrip(b"=").decode("ascii")
        url = signed_url(challenge, now=int(time.time()), nonce=nonce)
        return self._door.request("GET", url, authorization=signature(key, url))

    def _ask_docker(self, challenge: Challenge, login: Login | None) -> Answer:
        scopes = dict.fromkeys((*self._scopes, *challenge.scopes))
        query = [("service", challenge.service), *(("scope", scope) for scope in scopes)]
        if login is not None and not login.user:
            form = {
                "grant_type": "refresh_token", "service": challenge.service,
                "client_id": "medllm-pack", "scope": " ".join(scopes),
                "refresh_token": login.secret.reveal(),
            }  # fmt: skip
            return self._door.request(
                "POST",
                challenge.realm,
                headers={"Content-Type": "application/x-www-form-urlencoded"},
                body=urlencode(form).encode(),
            )
        parts = urlsplit(challenge.realm)
        joined = "&".join(filter(None, (parts.query, urlencode(query))))
        return self._door.request(
            "GET",
            urlunsplit(parts._replace(query=joined)),
            authorization=login.basic if login else None,
        )

    def _token_of(self, answer: Answer) -> _Token:
        if answer.status != 200:
            raise TransferError(
                f"the token server of {self._origin.host} answers {answer.status}: "
                + ("the login is not accepted" if answer.status in (401, 403) else "try later")
            )
        try:
            document = json.loads(answer.body)
            token = document.get("token") or document.get("access_token")
            life = int(document.get("expires_in") or _DEFAULT_LIFE_S)
        except (ValueError, TypeError, AttributeError):
            token = None
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise TransferError(f"the token server of {self._origin.host} gives no token")
        # Renewed when a fifth of its life is left: a body must not outlive its token's start.
        usable = 0.8 * min(max(life, 1), _LONGEST_LIFE_S)
        return _Token(Secret(f"Bearer {token}"), time.monotonic() + usable)
