"""Where logins come from: Docker's configuration and its helpers, and Ollama's key.

A secret is a value that shows nothing of itself: not when printed, logged, formatted or pickled.
Knows nothing of who gets one; :mod:`medllm_pack.publish.auth` decides that.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from medllm_pack import files
from medllm_pack.errors import SourceError, TransferError, shown
from medllm_pack.home import home

_HELPER = re.compile(r"[A-Za-z0-9._\-]+", re.ASCII)
_HELPER_SECONDS = 30
# What Docker calls its own registry in its configuration.
_DOCKER_HUB = "https://index.docker.io/v1/"
# docker/cli: a user of this name means that the secret is an identity token.
_TOKEN_USER = "<token>"
_OTHERS = 0o077  # permissions of group and others


class Secret:
    """A text that is given out only by :meth:`reveal`."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text; call it where the header is written and nowhere else."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")


@dataclass(frozen=True)
class Login:
    """A user and a password, or an identity token if there is no user."""

    user: str
    secret: Secret

    @property
    def basic(self) -> Secret:
        """Value of an Authorization header."""
        pair = f"{self.user}:{self.secret.reveal()}".encode()
        return Secret(f"Basic {base64.b64encode(pair).decode('ascii')}")


def docker_login(host: str) -> Login | None:
    """Return what ``docker login HOST`` left behind, from a helper or from config.json.

    Raises:
        TransferError: if the configuration or the helper does not work.
    """
    config = _docker_config()
    for key in _keys(host):
        helper = _text(config, "credHelpers", key) or _text(config, "credsStore")
        login = _from_helper(helper, key) if helper else None
        if login := login or _from_config(config, key):
            return login
    return None


def ollama_key_path() -> Path:
    """Return where Ollama keeps the key that signs its user in."""
    return home() / ".ollama" / "id_ed25519"


def exposed(kind: Literal["oci", "ollama"]) -> Iterator[str]:
    """Yield a sentence if the file that logs us in is open to other users of this machine.

    Args:
        kind: of the registry: Ollama's key, or the secrets in Docker's configuration.
    """
    path = ollama_key_path() if kind == "ollama" else _docker_path()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        secret = kind == "ollama" or _holds_secrets(_docker_config())
    except (OSError, TransferError):
        return  # who needs it says what is wrong with it
    if secret and mode & _OTHERS:
        yield (
            f"{shown(path)} is open to other users of this machine (mode {mode:04o}); chmod 600 "
            "keeps the login yours"
        )


def _holds_secrets(config: dict[str, Any]) -> bool:
    logins = config.get("auths")
    names = logins if isinstance(logins, dict) else {}
    return any(_text(config, "auths", n, key) for n in names for key in ("auth", "identitytoken"))


def _docker_path() -> Path:
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else home() / ".docker") / "config.json"


def _docker_config() -> dict[str, Any]:
    path = _docker_path()
    if not path.exists():
        return {}
    try:
        document = json.loads(files.read_small(path, limit=1 << 20))
    except (ValueError, SourceError):
        # `from None`: the parser's error holds the text, and the text holds passwords.
        raise TransferError(f"{shown(path)} cannot be read as JSON; log in again") from None
    return document if isinstance(document, dict) else {}


def _keys(host: str) -> tuple[str, ...]:
    if host in ("docker.io", "registry-1.docker.io", "index.docker.io"):
        return (_DOCKER_HUB,)
    return (host, f"https://{host}", f"https://{host}/v2/")


def _text(config: dict[str, Any], *path: str) -> str:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def _from_config(config: dict[str, Any], key: str) -> Login | None:
    if token := _text(config, "auths", key, "identitytoken"):
        return Login("", Secret(token))
    try:
        pair = base64.b64decode(_text(config, "auths", key, "auth"), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise TransferError(f"Docker's login for {shown(key)} is damaged; log in again") from None
    user, colon, password = pair.rstrip("\0").partition(":")
    return Login(user, Secret(password)) if colon else None


def _from_helper(helper: str, key: str) -> Login | None:
    if not _HELPER.fullmatch(helper):
        raise TransferError(f"Docker's config.json names the helper {shown(helper)}; no such name")
    program = f"docker-credential-{helper}"
    try:
        ended = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, timeout=_HELPER_SECONDS
        )
    except OSError as error:
        raise TransferError(
            f"{program}, which Docker's config.json names, does not start: {error.strerror}"
        ) from None
    except subprocess.TimeoutExpired:
        raise TransferError(f"{program} gave no login in {_HELPER_SECONDS} s") from None
    if ended.returncode:
        return None  # its way to say that there is none
    try:
        answer = json.loads(ended.stdout)
        user, secret = str(answer["Username"]), Secret(str(answer["Secret"]))
    except (ValueError, KeyError, TypeError):
        raise TransferError(f"{program} does not answer as Docker's helpers do") from None
    return Login("" if user == _TOKEN_USER else user, secret)
