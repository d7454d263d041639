"""Logins: Ollama's known answer, and a capture server that must see no credential of ours."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medllm_pack.errors import TransferError
from medllm_pack.publish.auth import (
    Challenge,
    Key,
    check_realm,
    parse_challenges,
    signature,
    signed_url,
)
from medllm_pack.publish.credentials import Secret, docker_login, exposed
from medllm_pack.publish.guard import Origin
from medllm_pack.publish.registry import opened
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Access, Door
from tests.registries import QUICK

CANARY = "canary-7f3a9c"


def test_ollamas_signed_token_request_is_the_known_one(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    path = tmp_path / "id_ed25519"
    path.write_bytes(made.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))
    key = Key.read(path)
    assert key.public == "AAAAC3NzaC1lZDI1NTE5AAAAIAOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4"
    challenge = Challenge(
        "bearer", "https://registry.ollama.ai/v2/token", "registry.ollama.ai",
        ("repository:alice/medllm:pull,push",),
    )  # fmt: skip
    url = signed_url(challenge, now=1700000000, nonce="AAECAwQFBgcICQoLDA0ODw")
    assert url == (
        "https://registry.ollama.ai/v2/token?nonce=AAECAwQFBgcICQoLDA0ODw&scope=repository%3Aalice"
        "%2Fmedllm%3Apull%2Cpush&service=registry.ollama.ai&ts=1700000000"
    )
    assert signature(key, url).reveal() == (
        f"{key.public}:wNu44HFkROttG12Mqq/2zKNn6wWExXQtjS/MahebcnyTr+MdcXQ3L7MKkyFlgLNvqda7WVu6hw6LZ"
        "06rH6j0Dg=="
    )


@pytest.mark.parametrize("data", [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "k").write_bytes(data)
    with pytest.raises(TransferError, match="Ed25519"):
        Key.read(tmp_path / "k")


def test_challenges_are_read_as_they_are_written() -> None:
    assert parse_challenges(
        'Bearer realm="https://a/t?x=1,2",service="s",scope="repository:a/b:pull,push '
        'repository:c/d:pull", Basic realm="x\\"y"'
    ) == (
        Challenge(
            "bearer", "https://a/t?x=1,2", "s", ("repository:a/b:pull,push", "repository:c/d:pull")
        ),
        Challenge("basic", 'x"y'),
    )
    assert parse_challenges("") == ()
    assert parse_challenges("Negotiate")[0].scheme == "negotiate"


@pytest.mark.parametrize(
    ("registry", "realm", "exact"),
    [
        ("https://r.example", "https://evil.example/token", False),
        ("https://r.example", "http://r.example/token", False),
        ("https://r.example", "https://r.example.evil.example/token", False),
        ("https://r.example", "https://evil.example/r.example", False),
        ("https://r.example", "https://r.example@evil.example/token", False),
        ("https://r.example", "https://user:pw@r.example/token", False),
        ("https://r.example", "//evil.example/token", False),
        ("https://r.example", "ftp://r.example/token", False),
        ("https://r.example", "https://auth.docker.io/token", False),
        ("https://r.example", "https://r.example:8443/token", True),
        ("https://r.example", "https://169.254.169.254/token", False),
        ("https://r.example", "file:///etc/passwd", False),
    ],
)
def test_a_realm_without_a_claim_is_refused(registry: str, realm: str, exact: bool) -> None:
    with pytest.raises(TransferError):
        check_realm(Origin.of(registry), realm, exact=exact)


def test_a_realm_with_a_claim_is_taken() -> None:
    docker = Origin.of("https://registry-1.docker.io")
    check_realm(docker, "https://auth.docker.io/token", exact=False)
    own = Origin.of("https://r.example:5000")
    check_realm(own, "https://r.example:5000/token", exact=True)
    check_realm(own, "https://auth.example/token", exact=False, allowed=["auth.example"])


# A registry and a host it sends us to, both on the loopback under different names.

Answers = Callable[["Capture", BaseHTTPRequestHandler], tuple[int, dict[str, str]]]


class Capture:
    """A server that answers as told and keeps every header it was sent."""

    def __init__(self, answer: Answers) -> None:
        seen: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                seen.append(f"{handler.path}\n{handler.headers}")
                status, headers = answer(self, handler)
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            do_HEAD = do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

            def log_message(handler, *_: object) -> None:  # noqa: N805
                pass

        self.seen = seen
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def foreign() -> Iterator[Capture]:
    made = Capture(lambda _, __: (200, {}))
    yield made
    made.close()


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Log in to a host, the way Docker's configuration says it."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))

    def login(host: str) -> None:
        auth = base64.b64encode(f"user:{CANARY}".encode()).decode()
        (tmp_path / "docker").mkdir(exist_ok=True)
        (tmp_path / "docker/config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))

    return login


def carried(seen: list[str]) -> list[str]:
    """Return what arrived with a credential of ours in any form."""
    encoded = base64.b64encode(f"user:{CANARY}".encode()).decode()
    words = (CANARY, encoded, "authorization", "cookie")
    return [text for text in seen if any(word in text.lower() or word in text for word in words)]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["localhost", "127.0.0.1", "127.0.0.2"])
def test_a_redirect_to_another_origin_carries_no_login(
    foreign: Capture, docker: Callable[[str], None], status: int, where: str
) -> None:
    place = f"http://{where}:{foreign.port}/blob?signature=x"

    def answer(_: Capture, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        if not request.headers.get("Authorization"):
            return 401, {"Www-Authenticate": 'Basic realm="x"'}
        return status, {"Location": place}

    registry = Capture(answer)
    docker(f"127.0.0.1:{registry.port}")
    target = RegistryTarget("oci", f"127.0.0.1:{registry.port}", "ns/m")
    access = Access(patience=QUICK, allow_hosts=("localhost",))
    try:
        with opened(target, access) as client:
            if where == "127.0.0.2":  # an address of this machine that nobody named
                with pytest.raises(TransferError, match="--allow-host"):
                    client.manifest("t")
            else:
                with client.stream("GET", "blobs/x") as reply:
                    assert reply.status_code == 200
        assert any("Authorization" in text for text in registry.seen)
        assert (len(foreign.seen) == 1) == (where != "127.0.0.2")
        assert carried(foreign.seen) == []
    finally:
        registry.close()


def test_a_foreign_realm_is_not_even_asked(foreign: Capture, docker: Callable[[str], None]) -> None:
    realm = f'Bearer realm="http://localhost:{foreign.port}/token",service="s"'
    registry = Capture(lambda _, __: (401, {"Www-Authenticate": realm}))
    docker(f"127.0.0.1:{registry.port}")
    target = RegistryTarget("oci", f"127.0.0.1:{registry.port}", "ns/m")
    with (
        opened(target, Access(patience=QUICK)) as client,
        pytest.raises(TransferError, match="--auth-host") as caught,
    ):
        client.manifest("t")
    registry.close()
    assert foreign.seen == []
    assert CANARY not in str(caught.value)


def test_a_loop_of_redirects_ends(tmp_path: Path) -> None:
    registry = Capture(lambda me, _: (302, {"Location": f"http://127.0.0.1:{me.port}/again"}))
    with (
        Door(f"127.0.0.1:{registry.port}", Access(patience=QUICK)) as door,
        pytest.raises(TransferError, match="redirects more than"),
    ):
        door.request("GET", f"http://127.0.0.1:{registry.port}/")
    registry.close()
    assert len(registry.seen) == 6


def test_plain_http_needs_a_word_from_the_user() -> None:
    with (
        Door("registry.example", Access(patience=QUICK)) as door,
        pytest.raises(TransferError, match="--insecure"),
    ):
        door.request("GET", "http://registry.example/v2/")


def test_a_secret_shows_nothing_of_itself() -> None:
    secret = Secret(CANARY)
    for text in (repr(secret), str(secret), f"{secret}", f"{secret:>20}", repr([secret])):
        assert CANARY not in text
    import pickle

    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_a_login_comes_from_a_helper_that_is_told_the_host_on_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    helper.write_text(
        '#!/bin/sh\n[ "$*" = get ] || exit 9\nread host\n[ "$host" = r.example ] || exit 1\n'
        f'echo \'{{"Username":"user","Secret":"{CANARY}"}}\'\n'
    )
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text('{"credHelpers": {"r.example": "test"}}')
    login = docker_login("r.example")
    assert login is not None
    assert (login.user, login.secret.reveal()) == ("user", CANARY)
    assert CANARY not in repr(login)
    (tmp_path / "config.json").write_text('{"credsStore": "test"}')
    assert docker_login("other.example") is None
    (tmp_path / "config.json").write_text('{"credsStore": "../../bin/sh"}')
    with pytest.raises(TransferError):
        docker_login("r.example")


@pytest.mark.parametrize("auth", ["!!!", base64.b64encode(b"\xff").decode()])
def test_a_damaged_login_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auth: str
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"h": {"auth": auth}}}))
    with pytest.raises(TransferError, match="damaged") as caught:
        docker_login("h")
    assert auth not in str(caught.value)


def test_a_login_that_others_may_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docker: Callable[[str], None]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(exposed("oci")) == list(exposed("ollama")) == []
    docker("r.example")
    config, key = tmp_path / "docker/config.json", tmp_path / ".ollama/id_ed25519"
    key.parent.mkdir()
    key.write_text("key")
    for path, kind in ((config, "oci"), (key, "ollama")):
        for mode in (0o644, 0o640, 0o604):
            path.chmod(mode)
            [line] = exposed("ollama" if kind == "ollama" else "oci")
            assert f"{path}' is open to other users of this machine (mode {mode:04o})" in line
            assert CANARY not in line
        path.chmod(0o600)
    assert list(exposed("oci")) == list(exposed("ollama")) == []
    config.chmod(0o644)
    config.write_text('{"auths": {"r.example": {}}, "credsStore": "helper"}')
    assert list(exposed("oci")) == []
