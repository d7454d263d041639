"""A push that dies anywhere leaves no tag without its blobs, and the next one ends well."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from medllm_pack.errors import MedllmError, TransferError
from medllm_pack.publish.push import Options, push
from medllm_pack.publish.release import Release
from medllm_pack.publish.transport import Access
from tests.registries import ACCESS, QUICK, Registry, free_port, needs, release, run_nginx, wait_for

pytestmark = [pytest.mark.registry, needs("docker-registry")]

SIZE, CHUNK = 250_000, 100_000


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as running:
        yield running


def run_worker(folder: Path, registry: Registry, repository: str, at: list[int]) -> list[Any]:
    plan = folder / "plan.json"
    words = {
        "folder": str(folder / "r"), "size": SIZE, "chunk": CHUNK, "host": registry.host,
        "repository": repository, "state": str(folder / "state"), "at": at,
    }  # fmt: skip
    plan.write_text(json.dumps(words))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.push_worker", str(plan)], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_killed_at_every_request_no_tag_names_a_missing_blob(
    registry: Registry, tmp_path: Path
) -> None:
    steps = run_worker(tmp_path, registry, "whole/{}", [1 << 30])[0]["steps"]
    assert steps > 50
    ends = run_worker(tmp_path, registry, "killed/r{}", list(range(0, steps, 2)))
    killed = [one["at"] for one in ends if one.get("signal") == signal.SIGKILL]
    assert len(killed) > steps // 2 - 8  # two workers: how often they ask varies a little
    sent = release(tmp_path / "r", size=SIZE)
    options = Options(state=tmp_path / "state", chunk=CHUNK, ask_ollama=False)
    tagged = [at for at in killed if registry.check_whole(f"killed/r{at}")]
    assert tagged == killed[len(killed) - len(tagged) :]  # tags come last
    for at in [*killed[::4], killed[-1]]:
        name = f"killed/r{at}"
        push(sent, registry.target(name), access=ACCESS, options=options)
        found = registry.check_whole(name)
        assert found["7b"] == found["7b-f16"] == str(sent.images[0].image.digest)


class Striking(httpx.BaseTransport):
    """Calls ``strike`` before the N-th request."""

    def __init__(self, inner: httpx.BaseTransport, at: int, strike: Any) -> None:
        self.inner, self.at, self.strike = inner, at, strike
        self.seen: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        if len(self.seen) == self.at:
            self.strike()
        return self.inner.handle_request(request)

    def close(self) -> None:
        self.inner.close()


def striking(at: int, strike: Any) -> tuple[Access, list[Striking]]:
    made: list[Striking] = []

    def wrap(inner: httpx.BaseTransport) -> httpx.BaseTransport:
        made.append(Striking(inner, at, strike))
        return made[-1]

    return Access(patience=QUICK, transport=wrap), made


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_registry_dies_and_comes_back(
    registry: Registry, tmp_path: Path, how: signal.Signals
) -> None:
    sent = release(tmp_path / "r", size=SIZE)
    options = Options(state=tmp_path / "state", chunk=CHUNK, ask_ollama=False)

    def strike() -> None:
        registry.stop(how)
        registry.start()

    for at in range(2, 28, 6 if how == signal.SIGTERM else 3):
        access, _ = striking(at, strike)
        name = f"died/r{at}"
        try:
            push(sent, registry.target(name), access=access, options=options)
        except MedllmError as error:
            said = str(error)
            registry.check_whole(name)
            push(sent, registry.target(name), access=ACCESS, options=options)
            assert said.count("\n") == 0
        assert registry.check_whole(name)["7b"] == str(sent.images[0].image.digest)


def files_of(registry: Registry) -> list[Path]:
    return sorted(path for path in (registry.folder / "store").rglob("*") if path.is_file())


def test_what_a_killed_registry_had_begun_to_write_is_mended(
    registry: Registry, tmp_path: Path
) -> None:
    sent, target = release(tmp_path / "r", size=SIZE), registry.target()
    options = Options(state=tmp_path / "state", chunk=CHUNK, ask_ollama=False)
    push(sent, target, access=ACCESS, options=options)
    listed = f"ns/model/manifests/{sent.images[0].image.digest.file_name}"
    links = [path for path in files_of(registry) if path.name == "link"]
    broken = 0
    for path in links:
        path.write_bytes(path.read_bytes()[:20])
        lost = registry.get(listed).status_code == 500
        broken += lost
        done = push(sent, target, access=ACCESS, options=options)
        assert ["begun anew" in said for said in done.notices] == [True] * lost, path
        assert registry.check_whole()["7b"] == str(sent.images[0].image.digest)
    assert len(links) > 12
    assert broken == 2  # the tag of the list, and its manifest


def break_off(registry: Registry, folder: Path) -> tuple[Release, Options]:
    """Begin a push that dies before the third chunk; return what goes on with it."""
    sent = release(folder / "r", size=SIZE)
    options = Options(state=folder / "state", chunk=CHUNK, ask_ollama=False)
    access, _ = stop_before_chunk(3)
    with pytest.raises(KeyboardInterrupt):
        push(sent, registry.target(), access=access, options=options)
    return sent, options


@pytest.mark.parametrize("what", ["data", "startedat", "hashstates"])
def test_an_upload_of_which_a_killed_registry_lost_a_file_ends_well(
    registry: Registry, tmp_path: Path, what: str
) -> None:
    sent, options = break_off(registry, tmp_path)
    begun = [path for path in files_of(registry) if {"_uploads", what} <= set(path.parts)]
    assert begun
    for path in begun:
        path.write_bytes(b"")
    push(sent, registry.target(), access=ACCESS, options=options)
    assert registry.check_whole()["7b"] == str(sent.images[0].image.digest)


def patches(made: list[Striking]) -> list[str]:
    seen = made[0].seen
    return [request.headers["Content-Range"] for request in seen if request.method == "PATCH"]


def stop_before_chunk(n: int) -> tuple[Access, list[Striking]]:
    """Fail for good at the N-th chunk, as a process that dies between chunks."""
    access, made = striking(0, None)
    wrap = access.transport
    assert wrap is not None

    class Refusing(httpx.BaseTransport):
        def __init__(self, inner: httpx.BaseTransport) -> None:
            self.inner, self.n = inner, 0

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            self.n += request.method == "PATCH"
            if self.n >= n:
                raise KeyboardInterrupt
            return self.inner.handle_request(request)

        def close(self) -> None:
            self.inner.close()

    return Access(patience=QUICK, transport=lambda inner: Refusing(wrap(inner))), made


def test_an_upload_goes_on_between_chunks_in_another_run_and_after_a_restart(
    registry: Registry, tmp_path: Path
) -> None:
    sent, options = break_off(registry, tmp_path)
    entries = list((tmp_path / "state/uploads").iterdir())
    assert [json.loads(path.read_text())["offset"] for path in entries] == [200_000]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in entries)
    registry.stop()
    registry.start()
    access, made = striking(0, None)
    push(sent, registry.target(), access=access, options=options)
    assert patches(made) == ["200000-249999"]
    assert registry.check_whole()
    assert list((tmp_path / "state/uploads").iterdir()) == []


def test_a_file_that_changed_is_sent_anew_and_refused(registry: Registry, tmp_path: Path) -> None:
    sent = release(tmp_path / "r", size=SIZE)
    options = Options(state=tmp_path / "state", chunk=CHUNK, ask_ollama=False)
    weights = tmp_path / "r/m-f16.gguf"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(TransferError, match="other bytes"):
        push(sent, registry.target(), access=ACCESS, options=options)
    assert registry.get("ns/model/tags/list").status_code == 404


class CutInside(httpx.BaseTransport):
    """Ends the connection inside the body of the second chunk, once."""

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self.inner, self.n = inner, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.n += request.method == "PATCH"
        if self.n == 2 and request.method == "PATCH":
            assert isinstance(request.stream, httpx.SyncByteStream)
            data = b"".join(request.stream)[:60_000]

            class Short(httpx.SyncByteStream):
                def __iter__(self) -> Iterator[bytes]:
                    yield data
                    raise httpx.WriteError("cut")

            request.stream = Short()
        return self.inner.handle_request(request)

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("buffering", ["none", pytest.param("on", marks=needs("nginx"))])
def test_a_cut_inside_a_chunk_restarts_directly_and_resumes_behind_a_buffering_proxy(
    registry: Registry, tmp_path: Path, buffering: str
) -> None:
    sent = release(tmp_path / "r", size=SIZE)
    options = Options(state=tmp_path / "state", chunk=CHUNK, ask_ollama=False)
    target, nginx = registry.target(), None
    if buffering == "on":
        port = free_port()
        nginx = run_nginx(
            tmp_path / "nginx",
            f"server {{ listen 127.0.0.1:{port}; client_max_body_size 0; proxy_http_version 1.1;"
            " proxy_set_header Host $http_host;"
            f" location / {{ proxy_pass http://{registry.host}; }} }}",
        )
        wait_for(port)
        target = type(target)("oci", f"127.0.0.1:{port}", target.repository)
    counted, made = striking(0, None)
    wrap = counted.transport
    assert wrap is not None
    access = Access(patience=QUICK, transport=lambda inner: CutInside(wrap(inner)))
    try:
        push(sent, target, access=access, options=options)
    finally:
        if nginx:
            nginx.terminate()
            nginx.wait()
    ranges = ["0-99999", "100000-199999", "200000-249999"]
    again = ranges[1:] if buffering == "on" else ranges
    assert patches(made) == [*ranges[:2], *again]
    assert registry.check_whole()
