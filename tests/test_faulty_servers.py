"""A server that stalls, trickles, storms or lies: the right bytes, or one clear line, in time."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from medllm_pack.digests import Digest
from medllm_pack.errors import TransferError
from medllm_pack.patience import Patience
from medllm_pack.publish.download import fetch_blob
from medllm_pack.publish.pull import pull
from medllm_pack.publish.push import Options, push
from medllm_pack.publish.registry import opened
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Access
from medllm_pack.publish.trying import GivenUpError, InterruptedTransferError
from tests.faulty import Request, cut, forward, serving, silence
from tests.registries import Registry, needs, release

HASTE = Patience(
    tries=3, first_wait_s=0.01, longest_wait_s=0.05, longest_asked_s=2.5, stall_s=0.4,
    finish_s=1.5,
)  # fmt: skip
ACCESS = Access(patience=HASTE)
DATA = random.Random(11).randbytes(3_000_000)
DIGEST = Digest.of(DATA)


def fetch(host: str, path: Path) -> None:
    with opened(RegistryTarget("oci", host, "ns/model"), ACCESS) as registry:
        fetch_blob(registry, DIGEST, len(DATA), path, lambda _: None)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def tried(script: Callable[[Request, int], None]) -> tuple[Callable[[Request], None], list[str]]:
    """Return a script that is told the number of the request, and the ranges asked for."""
    seen: list[str] = []

    def numbered(request: Request) -> None:
        seen.append(request.headers.get("range", ""))
        script(request, len(seen))

    return numbered, seen


def give(request: Request, *, upto: int | None = None) -> None:
    """Answer as a registry does, perhaps not to the end."""
    start = int(request.headers.get("range", "bytes=0-")[6:-1])
    data = DATA[start:]
    told = {"Content_Length": str(len(data))}
    if start:
        told["Content_Range"] = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
    request.send("206 Partial" if start else "200 OK", data[:upto], **told)
    if upto is not None:
        cut()


def test_a_body_that_is_cut_is_gone_on_with(tmp_path: Path) -> None:
    def script(request: Request, n: int) -> None:
        give(request, upto=1_000_000 if n < 3 else None)

    script_, seen = tried(script)
    with serving(script_) as host:
        fetch(host, tmp_path / "x")
    assert seen == ["", "bytes=1000000-", "bytes=2000000-"]
    assert (tmp_path / "x").read_bytes() == DATA


def test_cuts_without_end_are_given_up_and_what_came_is_kept(tmp_path: Path) -> None:
    script, seen = tried(lambda request, n: give(request, upto=1000))
    with serving(script) as host, within(5), pytest.raises(GivenUpError, match="too early"):
        fetch(host, tmp_path / "x")
    assert len(seen) == HASTE.tries
    assert (tmp_path / "x.part").read_bytes() == DATA[:3000]


@pytest.mark.parametrize("after", [0, 10_000])
def test_silence_is_given_up(tmp_path: Path, after: int) -> None:
    def script(request: Request, _: int) -> None:
        if after:
            start = int(request.headers.get("range", "bytes=0-")[6:-1])
            told = {"Content_Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"} if start else {}
            request.send(
                "206 Partial" if start else "200 OK", DATA[start : start + after],
                Content_Length=str(len(DATA) - start), **told,
            )  # fmt: skip
        silence(request)

    script_, seen = tried(script)
    with (
        serving(script_) as host,
        within(8),
        pytest.raises(GivenUpError, match="no answer in time"),
    ):
        fetch(host, tmp_path / "x")
    assert len(seen) == HASTE.tries
    part = (tmp_path / "x.part").read_bytes()
    assert part == DATA[: HASTE.tries * after]


@pytest.mark.parametrize("what", ["headers", "body"])
def test_a_trickle_is_given_up_although_bytes_come(tmp_path: Path, what: str) -> None:
    def script(request: Request, _: int) -> None:
        if what == "body":
            request.send("200 OK", Content_Length=str(len(DATA)))
            request.trickle(DATA)
        request.trickle(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 5000)

    with (
        serving(lambda request: script(request, 0)) as host,
        within(8),
        pytest.raises(GivenUpError, match="no answer in time"),
    ):
        fetch(host, tmp_path / "x")


def test_a_range_that_is_not_known_begins_anew(tmp_path: Path) -> None:
    def script(request: Request, _: int) -> None:
        request.send("200 OK", DATA)

    (tmp_path / "x.part").write_bytes(DATA[:500_000])
    with serving(lambda request: script(request, 0)) as host:
        fetch(host, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


@pytest.mark.parametrize(
    ("status", "told", "said"),
    [
        ("206 Partial", {"Content_Range": "bytes 7-2999999/3000000"}, "another range"),
        ("200 OK", {"Content_Length": "3000001"}, "the manifest says 3000000"),
        ("416 Range", {}, "answers '?416"),
        ("307 Elsewhere", {"Location": "http://10.1.2.3/x"}, "without encryption"),
        ("302 Elsewhere", {"Location": "https://localhost:1/x"}, "--allow-host localhost"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    tmp_path: Path, status: str, told: dict[str, str], said: str
) -> None:
    (tmp_path / "x.part").write_bytes(DATA[:500_000])
    script, seen = tried(lambda request, n: request.send(status, DATA[500_000:], **told))
    with serving(script) as host, within(5), pytest.raises(TransferError, match=said) as error:
        fetch(host, tmp_path / "x")
    assert not isinstance(error.value, InterruptedTransferError)
    assert len(seen) == 1
    assert not (tmp_path / "x").exists()


def test_more_bytes_than_stated_are_not_taken(tmp_path: Path) -> None:
    def script(request: Request) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(DATA) + 9, DATA + b"and so on")
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        request.connection.sendall(head + chunk + b"0\r\n\r\n")

    with serving(script) as host, pytest.raises(TransferError, match="more than the 3000000"):
        fetch(host, tmp_path / "x")
    assert (tmp_path / "x.part").read_bytes() == b""

    def longer(request: Request) -> None:
        request.send("200 OK", DATA + b"HTTP/1.1 200 OK\r\n\r\n", Content_Length=str(len(DATA)))

    with serving(longer) as host:
        fetch(host, tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == DATA


def busy(how: str) -> dict[str, str]:
    return {
        "number": {"Retry_After": "1"},
        "date": {"Retry_After": formatdate(time.time() + 2, usegmt=True)},
        "none": {},
        "nonsense": {"Retry_After": "soon"},
    }[how]


@pytest.mark.parametrize("status", ["429 Slow", "503 Down"])
@pytest.mark.parametrize("how", ["number", "date", "none", "nonsense"])
def test_a_busy_server_gets_the_pause_that_it_asks_for(
    tmp_path: Path, status: str, how: str
) -> None:
    def script(request: Request, n: int) -> None:
        if n == 1:
            request.send(status, b"", **busy(how))
        else:
            give(request)

    script_, seen = tried(script)
    start = time.monotonic()
    with serving(script_) as host:
        fetch(host, tmp_path / "x")
    assert (len(seen), (tmp_path / "x").read_bytes()) == (2, DATA)
    assert (time.monotonic() - start > 0.9) == (how in ("number", "date"))


@pytest.mark.parametrize("status", ["408 Late", "429 Slow", "500 Oh", "502 Bad", "504 Gone"])
def test_storms_are_given_up(tmp_path: Path, status: str) -> None:
    script, seen = tried(lambda request, n: request.send(status))
    target = RegistryTarget("oci", "", "ns/model", "7b")
    with serving(script) as host, within(5):
        target = RegistryTarget("oci", host, "ns/model", "7b")
        with pytest.raises(GivenUpError, match=status[:3]):
            pull(target, tmp_path / "out", access=ACCESS)
    assert len(seen) == HASTE.tries
    assert not (tmp_path / "out").exists()


def test_a_long_pause_is_named_and_not_waited_for(tmp_path: Path) -> None:
    def script(request: Request) -> None:
        request.send("429 Slow", Retry_After="3600")

    with serving(script) as host, within(5):
        ended = subprocess.run(
            [sys.executable, "-m", "medllm_pack", "pull", f"oci://{host}/ns/m:7b",
             "--out", str(tmp_path / "out")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: 127.0.0.1 answers 429; try again later")
    assert ended.stderr.endswith("it asks for a pause of 3600 s\n")
    assert ended.stderr.count("\n") == 1


SIZE, CHUNK = 250_000, 100_000


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as running:
        yield running


@pytest.mark.registry
@needs("docker-registry")
@pytest.mark.parametrize("fault", ["silence", "429", "503", "cut", "trickle"])
def test_a_push_into_a_storm_ends_and_the_next_one_goes_on(
    registry: Registry, tmp_path: Path, fault: str
) -> None:
    sent = release(tmp_path / "r", size=SIZE)
    options = Options(state=tmp_path / "state", chunk=CHUNK, ask_ollama=False)
    patched: list[str] = []
    fine = False

    def script(request: Request) -> None:
        if request.method == "PATCH":
            patched.append(request.headers["content-range"])
        if fine or len(patched) < 2:
            forward(request, registry.host)
        elif fault == "silence":
            silence(request)
        elif fault == "cut":
            cut()
        elif fault == "trickle":
            request.trickle(b"HTTP/1.1 202 Accepted\r\nX-Long: " + b"a" * 5000)
        else:
            request.body()
            request.send(f"{fault} Storm", Retry_After="0")

    with serving(script) as host:
        target = RegistryTarget("oci", host, "ns/model")
        with within(15), pytest.raises(InterruptedTransferError) as error:
            push(sent, target, access=ACCESS, options=options)
        assert "\n" not in str(error.value)
        assert not registry.check_whole()
        fine, seen = True, len(patched)
        push(sent, target, access=ACCESS, options=options)
    assert patched[seen:] == ["100000-199999", "200000-249999"]
    assert registry.check_whole()


@pytest.mark.registry
@needs("docker-registry")
def test_a_registry_may_take_its_time_to_put_an_upload_together(
    registry: Registry, tmp_path: Path
) -> None:
    asked: list[str] = []

    def script(request: Request) -> None:
        asked.append(request.method)
        if request.method == "PUT" and "/uploads/" in request.path:
            time.sleep(2 * HASTE.stall_s)
        forward(request, registry.host)

    sent = release(tmp_path / "r", size=SIZE)
    options = Options(state=tmp_path / "state", chunk=CHUNK, ask_ollama=False)
    with serving(script) as host:
        push(sent, RegistryTarget("oci", host, "ns/model"), access=ACCESS, options=options)
    assert asked.count("PATCH") == 3
    assert registry.check_whole()


@pytest.mark.parametrize("status", ["413 Large", "403 No"])
def test_a_refusal_before_the_body_ends_the_sending(tmp_path: Path, status: str) -> None:
    came = 0

    def script(request: Request) -> None:
        nonlocal came
        if request.method == "HEAD":
            request.send("404 Missing")
        elif request.method == "POST":
            request.send("202 Accepted", Location="/v2/ns/model/blobs/uploads/1")
        else:
            # Or a small upload's connection would be used again, and nobody answers on it.
            request.send(status, Connection="close")
            while data := request.connection.recv(1 << 16):
                came += len(data)
                time.sleep(0.01)

    sent = release(tmp_path / "r", size=60_000_000)
    options = Options(state=tmp_path / "state", ask_ollama=False)
    with serving(script) as host, pytest.raises(TransferError, match=status[:3]) as error:
        push(sent, RegistryTarget("oci", host, "ns/model"), access=ACCESS, options=options)
    assert not isinstance(error.value, InterruptedTransferError)
    assert came < 20_000_000  # what lay in the buffers of the system


@pytest.mark.registry
@needs("docker-registry")
def test_an_interim_answer_does_not_end_the_sending(registry: Registry, tmp_path: Path) -> None:
    def script(request: Request) -> None:
        if request.method in ("PATCH", "PUT"):
            request.connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
            request.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.05)
        forward(request, registry.host)

    sent = release(tmp_path / "r", size=SIZE)
    options = Options(state=tmp_path / "state", chunk=CHUNK, ask_ollama=False)
    with serving(script) as host:
        done = push(sent, RegistryTarget("oci", host, "ns/model"), access=ACCESS, options=options)
    assert done.transferred == sum(blob.size for blob in sent.blobs)
    assert registry.check_whole()


def test_a_server_that_reads_drop_by_drop_is_given_up(tmp_path: Path) -> None:
    def script(request: Request) -> None:
        if request.method == "HEAD":
            request.send("404 Missing")
        elif request.method == "POST":
            request.send("202 Accepted", Location="/v2/ns/model/blobs/uploads/1")
        else:
            while request.connection.recv(1):
                time.sleep(0.05)

    sent = release(tmp_path / "r", size=30_000_000)
    options = Options(state=tmp_path / "state", ask_ollama=False)
    with serving(script) as host, within(10), pytest.raises(GivenUpError, match="in time"):
        push(sent, RegistryTarget("oci", host, "ns/model"), access=ACCESS, options=options)
