"""Debian's registry behind a password, a certificate and a token server; no secret ever shows."""

from __future__ import annotations

import base64
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from medllm_pack.errors import TransferError
from medllm_pack.publish.mounting import LARGE
from medllm_pack.publish.push import Options, push
from medllm_pack.publish.transport import Access
from tests.packs import build_pack
from tests.registries import QUICK, Registry, needs, release

pytestmark = [pytest.mark.registry, needs("docker-registry")]

CANARY = "canary-41d0b7"
ENCODED = base64.b64encode(f"user:{CANARY}".encode()).decode()


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()

    def log_in(host: str) -> None:
        path = tmp_path / "docker/config.json"
        path.write_text(json.dumps({"auths": {host: {"auth": ENCODED}}}))

    return log_in


@pytest.fixture
def htpasswd(tmp_path: Path) -> dict[str, object]:
    made = subprocess.run(
        ["htpasswd", "-Bbn", "user", CANARY], check=True, capture_output=True
    ).stdout
    (tmp_path / "htpasswd").write_bytes(made)
    return {"auth": {"htpasswd": {"realm": "x", "path": str(tmp_path / "htpasswd")}}}


def certificate(folder: Path, *others: str) -> tuple[Path, Path]:
    """Make a key and a certificate of its own for localhost and other names."""
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.DNSName(name) for name in ("localhost", *others)]
    names = [*hosts, x509.IPAddress(ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(made.public_bytes(s.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


@needs("htpasswd")
def test_a_password_over_tls_and_an_authority_of_our_own(
    tmp_path: Path, login: Callable[[str], None], htpasswd: dict[str, object]
) -> None:
    cert, key = certificate(tmp_path)
    sent, options = release(tmp_path / "r"), Options(state=tmp_path / "state")
    tls = {"tls": {"certificate": str(cert), "key": str(key)}}
    with Registry(tmp_path / "registry", extra=htpasswd, http=tls) as registry:
        with pytest.raises(TransferError, match="--ca"):
            push(sent, registry.target(), access=Access(patience=QUICK), options=options)
        access = Access(patience=QUICK, ca=cert)
        with pytest.raises(TransferError, match="docker login"):
            push(sent, registry.target(), access=access, options=options)
        login(registry.host)
        done = push(sent, registry.target(), access=access, options=options)
        assert done.sent == len(list(sent.blobs))
        assert done.probe is not None
        assert not done.probe.pulls


class TokenServer:
    """Docker's token server: Basic login, RS256 tokens that live two seconds."""

    def __init__(self, cert: Path, key: Path) -> None:
        import jwt

        chain = "".join(cert.read_text().splitlines()[1:-1])
        given: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                query = parse_qs(urlsplit(handler.path).query)
                known = handler.headers.get("Authorization") == f"Basic {ENCODED}"
                access = []
                for scope in query.get("scope", []):
                    kind, name, actions = scope.split(":")
                    wanted = actions.split(",") if known else ["pull"]
                    access.append({"type": kind, "name": name, "actions": wanted})
                now = int(time.time())
                claims = {
                    "iss": "tests", "sub": "user", "aud": query["service"][0], "iat": now,
                    "nbf": now - 5, "exp": now + 60, "jti": str(len(given)), "access": access,
                }  # fmt: skip
                token = jwt.encode(claims, key.read_text(), "RS256", headers={"x5c": [chain]})
                given.append(token)
                data = json.dumps({"token": token, "expires_in": 2}).encode()
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *_: object) -> None:  # noqa: N805
                pass

        self.given = given
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def extra(self, cert: Path) -> dict[str, object]:
        realm = f"http://127.0.0.1:{self.server.server_port}/token"
        token = {"realm": realm, "service": "s", "issuer": "tests", "rootcertbundle": str(cert)}
        return {"auth": {"token": token}}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    server = TokenServer(*certificate(tmp_path))
    yield server
    server.close()


def test_tokens_are_fetched_renewed_and_cover_a_mount(
    tmp_path: Path, login: Callable[[str], None], tokens: TokenServer
) -> None:
    sent, access = release(tmp_path / "r"), Access(patience=QUICK)
    extra = tokens.extra(tmp_path / "cert.pem")
    with Registry(tmp_path / "registry", extra=extra) as registry:
        options = Options(state=tmp_path / "state", ask_ollama=False)
        with pytest.raises(TransferError):  # anonymous: may pull only
            push(sent, registry.target("a/b"), access=access, options=options)
        login(registry.host)
        push(sent, registry.target("a/b"), access=access, options=options)
        mounting = Options(state=tmp_path / "state", ask_ollama=False, mount_from=("a/b",))
        done = push(sent, registry.target("c/d"), access=access, options=mounting)
        assert (done.sent, done.mounted) == (0, len(list(sent.blobs)))
        known = release(tmp_path / "known", size=LARGE)
        push(known, registry.target("a/b"), access=access, options=options)
        done = push(known, registry.target("e/f"), access=access, options=options)
        assert (done.mounted, done.sent) == (1, len(list(known.blobs)) - 1)
        before = len(tokens.given)
        from medllm_pack.publish.registry import opened

        with opened(registry.target("c/d"), access) as client:
            assert client.manifest("7b") is not None
            time.sleep(1.8)  # past four fifths of a token's life
            assert client.manifest("7b") is not None
        assert len(tokens.given) == before + 2


@needs("htpasswd")
def test_no_secret_shows_in_output_state_or_process_list(
    tmp_path: Path, login: Callable[[str], None], htpasswd: dict[str, object]
) -> None:
    pack = build_pack(tmp_path / "pack", quants=["f16"])
    with Registry(tmp_path / "registry", extra=htpasswd) as registry:
        login(registry.host)
        target = f"oci://{registry.host}/ns/m"
        words = [
            ["publish", str(pack), target, "--accept", "parity-missing"],
            ["publish", str(pack), target, "--accept", "parity-missing", "--json"],
            ["pull", f"{target}:7b", "--out", str(tmp_path / "out")],
            ["pull", f"{target}:none", "--out", str(tmp_path / "none")],
        ]
        shown = b""
        for line in words:
            running = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "medllm_pack", *line],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=os.environ | {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"),
                                  "MEDLLM_DEBUG": "1"},
            )  # fmt: skip
            shown += Path(f"/proc/{running.pid}/cmdline").read_bytes()
            shown += running.communicate()[0]
        assert b"Traceback" in shown  # the last one fails, with everything it has to say
    assert CANARY.encode() not in shown
    assert ENCODED.encode() not in shown
    kept = [p for name in ("state", "out") for p in (tmp_path / name).rglob("*") if p.is_file()]
    for path in kept:
        data = path.read_bytes()
        assert CANARY.encode() not in data
        assert ENCODED.encode() not in data
    assert (tmp_path / "out").is_dir()
