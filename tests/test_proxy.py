"""A proxy of the environment leads to registries, sees no login of theirs, never this machine."""

from __future__ import annotations

import base64
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medllm_pack.errors import TransferError
from medllm_pack.publish.download import fetch_blob
from medllm_pack.publish.proxy import Proxy, proxy_for
from medllm_pack.publish.pull import pull
from medllm_pack.publish.push import Options, push
from medllm_pack.publish.registry import opened
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Door
from tests.faulty import Request, serving
from tests.registries import ACCESS, Registry, needs, release
from tests.test_registry_logins import ENCODED as LOGIN
from tests.test_registry_logins import certificate, htpasswd

__all__ = ["htpasswd"]

NAME = "registry.test"
CANARY = "canary-77c2e0"
PROXY_LOGIN = "Basic " + base64.b64encode(f"me:{CANARY}".encode()).decode()
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    real = socket.getaddrinfo

    def known(host: Any, *words: Any, **named: Any) -> Any:
        if host == NAME:  # as where only the proxy knows the names of the internet
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return real(host, *words, **named)

    monkeypatch.setattr(socket, "getaddrinfo", known)


class Tunnels:
    """A CONNECT proxy to one place, whatever name it is asked for."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.passed = bytearray()  # what went through, to the registry

    def __call__(self, request: Request) -> None:
        self.asked.append((request.method, request.path, request.headers))
        if request.headers.get("proxy-authorization") != PROXY_LOGIN:
            request.send("407 Login", Proxy_Authenticate="Basic")
            return
        with socket.create_connection(("127.0.0.1", self.port)) as there:
            request.connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            self._pass_on(request.connection, there)
        raise ConnectionError

    def _pass_on(self, here: socket.socket, there: socket.socket) -> None:
        while True:
            for side in select.select([here, there], [], [])[0]:
                data = side.recv(1 << 16)
                if not data:
                    return
                if side is here:
                    self.passed += data
                (there if side is here else here).sendall(data)


@pytest.fixture
def tls(tmp_path: Path) -> tuple[Path, Path]:
    return certificate(tmp_path, NAME)


@contextmanager
def secured(tmp_path: Path, tls: tuple[Path, Path], extra: dict[str, object]) -> Iterator[Registry]:
    settings = {"tls": {"certificate": str(tls[0]), "key": str(tls[1])}}
    with Registry(tmp_path / "registry", extra=extra, http=settings) as running:
        yield running


@pytest.mark.registry
@needs("docker-registry", "htpasswd")
@pytest.mark.parametrize("outer", ["http", "https"])
def test_a_release_goes_and_comes_through_a_proxy_that_sees_nothing_of_it(
    tmp_path: Path, tls: tuple[Path, Path], htpasswd: dict[str, object],
    monkeypatch: pytest.MonkeyPatch, outer: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    logins = {"auths": {f"{NAME}:5000": {"auth": LOGIN}}}
    (tmp_path / "config.json").write_text(json.dumps(logins))
    sent, access = release(tmp_path / "r"), replace(ACCESS, ca=tls[0])
    with secured(tmp_path, tls, htpasswd) as registry:
        tunnels = Tunnels(registry.port)
        with serving(tunnels, tls=tls if outer == "https" else None) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"{outer}://me:{CANARY}@{proxy}")
            target = RegistryTarget("oci", f"{NAME}:5000", "ns/model", "7b")
            options = Options(state=tmp_path / "state", chunk=100_000)
            push(sent, target, access=access, options=options)
            weights = sent.images[0].image.layers[0]
            with opened(target, access) as door:
                fetch_blob(door, weights.digest, weights.size, tmp_path / "x", lambda _: None)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "r/m-f16.gguf").read_bytes()
    assert {(method, path) for method, path, _ in tunnels.asked} == {("CONNECT", f"{NAME}:5000")}
    seen = {name for _, _, headers in tunnels.asked for name in headers}
    assert seen == {"host", "accept", "proxy-authorization"}
    assert len(tunnels.asked) < 10  # connections are kept
    for text in (LOGIN, CANARY, "Authorization", "ns/model"):
        assert text.encode() not in tunnels.passed
    for path in (tmp_path / "state").rglob("*.json"):
        assert CANARY not in path.read_text()


@pytest.mark.registry
@needs("docker-registry")
def test_this_machine_is_never_reached_through_a_proxy(
    tmp_path: Path, tls: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    sent, options = release(tmp_path / "r"), Options(state=tmp_path / "state")
    with Registry(tmp_path / "plain") as registry:
        push(sent, registry.target(), access=ACCESS, options=options)
    with secured(tmp_path, tls, {}) as registry:
        push(sent, registry.target(), access=replace(ACCESS, ca=tls[0]), options=options)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("407 Who", r"gives no way to registry\.test \('407'\): put user and password"),
        ("403 No", "ask who runs it, or let NO_PROXY name registry.test"),
        ("502 Bad", "answers '502' for registry.test; try again"),
        ("garbage", "through the proxy of HTTPS_PROXY"),
        ("nobody", "through the proxy of HTTPS_PROXY"),
    ],
)
def test_what_a_proxy_refuses_is_said_in_one_line_without_its_password(
    tmp_path: Path, answer: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(request: Request) -> None:
        if answer == "garbage":
            request.connection.sendall(b"\x00\x01garbage\r\n\r\n")
            raise ConnectionError
        request.send(answer)

    with serving(script) as proxy:
        place = "127.0.0.1:1" if answer == "nobody" else proxy
        monkeypatch.setenv("HTTPS_PROXY", f"me:{CANARY}@{place}")
        target = RegistryTarget("oci", NAME, "ns/model", "7b")
        with pytest.raises(TransferError, match=said) as error:
            pull(target, tmp_path / "out", access=ACCESS)
    assert CANARY not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["10.0.0.7", "169.254.169.254", "inner.test", "[::1]"])
def test_a_proxy_is_not_sent_inside(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect must not make the proxy do what we refuse to do."""
    inside = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.168.0.9", 0))]
    real = socket.getaddrinfo

    def known(host: Any, *words: Any, **named: Any) -> Any:
        return inside if host == "inner.test" else real(host, *words, **named)

    monkeypatch.setattr(socket, "getaddrinfo", known)
    asked: list[str] = []
    with serving(lambda request: asked.append(request.path)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy}")
        door = Door(NAME, ACCESS)
        with door, pytest.raises(TransferError, match="this machine or the local network"):
            door.request("GET", f"https://{place}/x")
    assert asked == []


ROWS = [
    ("a.org", "", True),
    ("a.org", "b.org, c.org", True),
    ("a.org", "A.org", False),
    ("x.a.org", "a.org", False),
    ("x.a.org", ".a.org", False),
    ("x.a.org", "*.a.org", False),
    ("xa.org", "a.org", True),
    ("a.org", "*", False),
    ("a.org", "a.org:5000", False),
    ("a.org", "a.org:5001", True),
    ("10.1.2.3", "10.0.0.0/8", False),
    ("11.1.2.3", "10.0.0.0/8 192.168.0.0/16", True),
    ("fd00::1", "fd00::/8", False),
    ("localhost", "", False),
    ("x.localhost", "", False),
    ("127.0.0.9", "", False),
    ("::1", "", False),
]


@pytest.mark.parametrize(("host", "excepted", "proxied"), ROWS)
@pytest.mark.parametrize("lower", [True, False])
def test_no_proxy(host: str, excepted: str, proxied: bool, lower: bool) -> None:
    names: Callable[[str], str] = str.lower if lower else str.upper
    given = {names("https_proxy"): "p.org:3128", names("no_proxy"): excepted}
    found = proxy_for(host, 5000, environment=given)
    assert found == (Proxy("http", "p.org", 3128) if proxied else None)


def test_what_is_read_as_an_address() -> None:
    assert proxy_for("a.org", 443, environment={"http_proxy": "http://p.org"}) is None
    assert proxy_for("a.org", 443, environment={"all_proxy": "https://p.org"}) == Proxy(
        "https", "p.org", 443
    )
    found = Proxy.parse("http://me%40x:p%3Ass@p.org")
    assert (found.port, found.login and found.login.user) == (80, "me@x")
    assert "p:ss" not in repr(found)
    for text in ("socks5://me:geheim@p.org:1080", "http://:geheim@", "http://me:geheim@p.org:x"):
        with pytest.raises(TransferError, match="HTTPS_PROXY") as error:
            Proxy.parse(text)
        assert "geheim" not in str(error.value)


def test_the_command_says_it(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "medllm_pack", "pull", f"oci://{NAME}/ns/m:7b",
         "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path),
             "HTTPS_PROXY": f"socks5://me:{CANARY}@p.test:1080"},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: HTTPS_PROXY names a proxy of the kind 'socks5'")
    assert ended.stderr.count("\n") == 1
    assert CANARY not in ended.stderr
