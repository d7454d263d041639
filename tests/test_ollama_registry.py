"""Ollama's client against what we push, the probe's word on it, and Ollama's own registry."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import pytest

from medllm_pack.errors import TransferError
from medllm_pack.publish import gate, ollama_upload
from medllm_pack.publish.make import make_release
from medllm_pack.publish.probe import probe
from medllm_pack.publish.publication import recorded
from medllm_pack.publish.push import Options, push
from medllm_pack.publish.targets import RegistryTarget
from tests import ollama_client, pico_packs
from tests.registries import ACCESS, Registry, free_port, needs, release, run_nginx, wait_for

SNIPPET = re.compile(r"```nginx\n(.*?)```", re.DOTALL)


@pytest.mark.registry
@needs("docker-registry", "nginx")
def test_ollama_pulls_through_the_documented_nginx_and_the_probe_knows_both_ways(
    tmp_path: Path,
) -> None:
    page = (Path(__file__).parent.parent / "docs/registry.md").read_text(encoding="utf-8")
    match = SNIPPET.search(page)
    assert match is not None
    port, sent = free_port(), release(tmp_path / "r")
    with Registry(tmp_path / "registry") as registry:
        options = Options(state=tmp_path / "state")
        plain = push(sent, registry.target(), access=ACCESS, options=options)
        assert plain.probe is not None
        assert not plain.probe.pulls
        assert "docs/registry.md" in plain.probe.why
        with pytest.raises(LookupError):
            ollama_client.pull(f"http://{registry.host}", "ns/model", "7b")
        block = (
            match[1].replace("5001", f"127.0.0.1:{port}").replace("127.0.0.1:5000", registry.host)
        )
        nginx = run_nginx(tmp_path / "nginx", block)
        wait_for(port)
        try:
            target = RegistryTarget("oci", f"127.0.0.1:{port}", "ns/model", "7b")
            assert probe(target, ACCESS).pulls
            pulled = ollama_client.pull(f"http://127.0.0.1:{port}", "ns/model", "7b")
            assert set(pulled) == {str(blob.digest) for blob in sent.images[0].image.blobs}
        finally:
            nginx.terminate()
            nginx.wait()


Redirect = Literal["at once", "late", "never"]


class FakeOllama:
    """registry.ollama.ai as its client sees it: signed tokens, redirected parts, an etag."""

    def __init__(self, public: str, *, redirect: Redirect) -> None:
        self.public, self.redirect = public, redirect
        self.patched = 0  # bytes of parts that the registry itself received
        self.storing = self.most_storing = 0
        self.refuse_storing: list[int] = []  # statuses for the next parts
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.problems: list[str] = []
        self.lock = threading.Lock()
        self.registry, self.storage = _serve(self, _Registry), _serve(self, _Storage)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.registry.server_port}"

    def close(self) -> None:
        for server in (self.registry, self.storage):
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeOllama
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def reply(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Registry(_Handler):
    def handle_any(self) -> None:
        url, fake = urlsplit(self.path), self.fake
        redirected = self.command == "PATCH" and fake.redirect == "at once"
        data = b"" if redirected else self.body()
        own = f"http://{fake.host}"
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        last = url.path.rpartition("/")[2]
        if url.path == "/token":
            self.token(own)
        elif self.headers.get("Authorization") != "Bearer good":
            challenge = f'Bearer realm="{own}/token",service="s",scope="repository:ns/model:push"'
            self.reply(401, Www_Authenticate=challenge)
        elif self.command == "POST":
            with fake.lock:
                name = str(len(fake.parts))
                fake.parts[name] = {}
            self.reply(202, Location=f"{own}/wrong", Docker_Upload_Location=f"/up/{name}/0")
        elif self.command == "PATCH":
            self.patch(url.path, data)
        elif self.command == "PUT" and url.path.startswith("/up/"):
            self.complete(url.path.split("/")[2], query)
        elif "/manifests/" in url.path:
            self.manifest(last, data)
        elif last in fake.blobs:
            self.reply(200, fake.blobs[last])
        else:
            self.reply(404)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_any  # noqa: N815

    def token(self, own: str) -> None:
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key

        if "Authorization" not in self.headers:  # the probe, which has no key
            self.reply(401)
            return
        public, _, signed = self.headers["Authorization"].partition(":")
        key = load_ssh_public_key(f"ssh-ed25519 {public}".encode())
        empty = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()
        key.verify(base64.b64decode(signed), f"GET,{own}{self.path},{empty}".encode())  # type: ignore[call-arg]
        good = public == self.fake.public
        self.reply(200 if good else 401, b'{"token": "good"}' if good else b"{}")

    def patch(self, path: str, data: bytes) -> None:
        _, _, name, n = path.split("/")
        following = f"/up/{name}/{int(n) + 1}"
        if self.headers.get("X-Redirect-Uploads") != "1":
            self.fake.problems.append("no X-Redirect-Uploads")
        if self.fake.redirect != "never":
            storage = f"http://localhost:{self.fake.storage.server_port}/{name}/{n}?signature=x"
            self.reply(
                307, Location=storage, Docker_Upload_Location=following,
                Connection="keep-alive" if data else "close",
            )  # fmt: skip
            self.close_connection = True
            while not data and (came := self.rfile.read1(1 << 20)):
                self.fake.patched += len(came)
        else:
            self.fake.parts[name][int(n)] = data
            self.reply(202, Docker_Upload_Location=following, Location="/wrong")

    def complete(self, name: str, query: dict[str, str]) -> None:
        parts = [data for _, data in sorted(self.fake.parts[name].items())]
        md5s = b"".join(hashlib.md5(part).digest() for part in parts)
        etag = f"{hashlib.md5(md5s).hexdigest()}-{len(parts)}"
        whole = b"".join(parts)
        good = query["digest"] == f"sha256:{hashlib.sha256(whole).hexdigest()}"
        if good and query["etag"] == etag:
            self.fake.blobs[query["digest"]] = whole
        self.reply(201 if good and query["etag"] == etag else 400)

    def manifest(self, reference: str, data: bytes) -> None:
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        if self.command == "PUT":
            good = self.headers["Content-Type"] == kind
            if good:
                self.fake.manifests[reference] = data
            self.reply(201 if good else 400)
        elif reference in self.fake.manifests:
            self.reply(200, self.fake.manifests[reference], Content_Type=kind)
        else:
            self.reply(404)


class _Storage(_Handler):
    def do_PUT(self) -> None:
        if "Authorization" in self.headers:
            self.fake.problems.append("a login reached the storage")
        if self.headers.get("Content-Type") != "application/octet-stream":
            self.fake.problems.append("another type than Ollama's client names")
        name, n = urlsplit(self.path).path.strip("/").split("/")
        with self.fake.lock:
            self.fake.storing += 1
            self.fake.most_storing = max(self.fake.most_storing, self.fake.storing)
            status = self.fake.refuse_storing.pop() if self.fake.refuse_storing else 200
        data = self.body()
        time.sleep(0.05)
        with self.fake.lock:
            self.fake.storing -= 1
        if status == 200:
            self.fake.parts[name][int(n)] = data
        self.reply(status)


def _serve(fake: FakeOllama, handler: type[_Handler]) -> ThreadingHTTPServer:
    own = type(handler.__name__, (handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The user's key in a home of its own; returns its public half."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    path = tmp_path / "home/.ollama/id_ed25519"
    path.parent.mkdir(parents=True)
    path.write_bytes(made.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    public = made.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
    return public.decode().split()[1]


LOCAL = replace(ACCESS, allow_hosts=("localhost",))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_upload, "LEAST", 1_200_000)  # parts of a real size need 200 MB


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("redirect", ["at once", "late", "never"])
def test_ollamas_registry_takes_our_push(tmp_path: Path, key: str, redirect: Redirect) -> None:
    fake, sent = FakeOllama(key, redirect=redirect), release(tmp_path / "r", size=3_600_000)
    access, options = LOCAL, Options(state=tmp_path / "state", ask_ollama=False)
    try:
        done = push(
            sent, RegistryTarget("ollama", fake.host, "ns/model"), access=access, options=options
        )
        again = push(
            sent, RegistryTarget("ollama", fake.host, "ns/model"), access=access, options=options
        )
    finally:
        fake.close()
    assert fake.problems == []
    assert fake.manifests == dict.fromkeys(("7b-f16", "7b"), sent.images[0].image.manifest)
    assert {str(blob.digest) for blob in sent.images[0].image.blobs} <= set(fake.blobs)
    assert sorted(map(len, fake.parts.values()))[-1] == 3
    assert (again.sent, again.transferred) == (0, 0)
    if redirect == "at once":
        small = sum(b.size for b in sent.blobs if b.size < 1_000_000)
        assert fake.patched <= small  # of the weights not a byte
        assert done.transferred <= sum(b.size for b in sent.blobs) + small
        assert fake.most_storing > 1
    assert any("attached papers" in notice for notice in done.notices)


@pytest.mark.usefixtures("small_parts")
def test_a_part_that_the_storage_refuses_is_sent_again_and_alone(tmp_path: Path, key: str) -> None:
    fake, sent = FakeOllama(key, redirect="at once"), release(tmp_path / "r", size=3_600_000)
    fake.refuse_storing = [503, 429]
    options = Options(state=tmp_path / "state", ask_ollama=False)
    try:
        target = RegistryTarget("ollama", fake.host, "ns/model")
        done = push(sent, target, access=LOCAL, options=options)
        whole = sum(blob.size for blob in sent.blobs)
        assert whole < done.transferred <= whole + 2 * 1_200_000 + 1000
        assert len(fake.parts) == len(list(sent.blobs))  # no upload began anew
        fake.blobs.clear()
        fake.manifests.clear()
        fake.refuse_storing = [403] * 9
        with pytest.raises(TransferError, match="answers 403 to a part"):
            push(sent, target, access=LOCAL, options=options)
    finally:
        fake.close()
    assert (fake.problems, fake.manifests) == ([], {})


@pytest.mark.usefixtures("small_parts")
def test_thread_that_cannot_be_started_for_a_part_is_told(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if "(_run)" in self.name:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    fake, sent = FakeOllama(key, redirect="at once"), release(tmp_path / "r", size=3_600_000)
    options = Options(state=tmp_path / "state", ask_ollama=False)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            push(
                sent, RegistryTarget("ollama", fake.host, "ns/model"),
                access=LOCAL, options=options,
            )  # fmt: skip
    finally:
        fake.close()
    assert (fake.problems, fake.manifests) == ([], {})


def test_what_was_accepted_is_not_published_where_it_cannot_be_told(
    tmp_path: Path, key: str, built_pack: Path
) -> None:
    permit = gate.check(built_pack, ("f16",), ("parity-missing",))
    sent = recorded(make_release(built_pack, quants=["f16"]), permit)
    fake = FakeOllama(key, redirect="at once")
    options = Options(state=tmp_path / "state", ask_ollama=False)
    try:
        with pytest.raises(TransferError, match="learn that parity-missing was accepted"):
            push(
                sent, RegistryTarget("ollama", fake.host, "ns/m"), access=LOCAL, options=options
            )  # fmt: skip
    finally:
        fake.close()
    assert (fake.problems, fake.manifests) == ([], {})


def test_ollamas_key_shows_nowhere(tmp_path: Path, key: str, built_pack: Path) -> None:
    home = tmp_path / "home"
    armoured = (home / ".ollama/id_ed25519").read_bytes().splitlines()[1:-1]
    seed = bytes(range(32))
    secrets = [
        *armoured,
        b"".join(armoured),
        seed,
        seed.hex().encode(),
        base64.b64encode(seed)[:42],
    ]
    fake, shown = FakeOllama(key, redirect="never"), b""
    target = f"ollama://{fake.host}/ns/model"
    pack = pico_packs.copy(built_pack, tmp_path / "pack")
    pico_packs.give_parity(pack)
    publish = ["publish", str(pack), target, "--quant", "q4_k_m"]

    def medllm(*words: str) -> bytes:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-m", "medllm_pack", *words], check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"HOME": str(home), "XDG_STATE_HOME": str(tmp_path / "state"),
                              "MEDLLM_DEBUG": "1"},
        )  # fmt: skip
        return done.stdout

    try:
        shown += (first := medllm(*publish))
        assert b"id_ed25519' is open to other users" in first
        assert fake.manifests, first
        assert b"Traceback" not in first
        (home / ".ollama/id_ed25519").chmod(0o600)
        shown += (again := medllm(*publish, "--json"))
        assert b"other users" not in again
        shown += medllm("pull", f"{target}:7b-q4_k_m", "--out", str(tmp_path / "out"))
        fake.public = "another"
        shown += (refused := medllm(*publish))
        assert b"Traceback" in refused
    finally:
        fake.close()
    kept = [p for name in ("state", "out") for p in (tmp_path / name).rglob("*") if p.is_file()]
    assert kept
    for data in (shown, *(path.read_bytes() for path in kept if path.suffix != ".gguf")):
        assert not [secret for secret in secrets if secret in data]


def test_the_parts_are_those_of_ollamas_client() -> None:
    assert ollama_upload.parts_of(0) == []
    assert ollama_upload.parts_of(5) == [(0, 5)]
    sizes = [end - start for start, end in ollama_upload.parts_of(13_500_000_000)]
    assert (len(sizes), sizes[0]) == (16, 843_750_000)
    assert {end - start for start, end in ollama_upload.parts_of(20_000_000_000)} == {10**9}
    first, second = hashlib.md5(b"a").digest(), hashlib.md5(b"b").digest()
    assert ollama_upload.etag_of([first, second]) == (
        hashlib.md5(first + second).hexdigest() + "-2"
    )
