"""A push that a real signal interrupts ends soon, with its own exit code, and the next goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from medllm_pack.publish import push as pushing
from medllm_pack.publish.targets import RegistryTarget
from tests.faulty import Request, forward, serving, silence
from tests.registries import ACCESS, Registry, needs, release

pytestmark = [pytest.mark.registry, needs("docker-registry")]

MIB = 1 << 20


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as running:
        yield running


class Slow:
    """In front of a registry: the second chunk waits until it is released, or for ever."""

    def __init__(self, host: str, *, for_ever: bool = False) -> None:
        self.host, self.for_ever = host, for_ever
        self.reached, self.go = threading.Event(), threading.Event()
        self.ranges: list[str] = []
        self.since = 0.0  # when the second chunk came

    def __call__(self, request: Request) -> None:
        if request.method == "PATCH":
            self.ranges.append(request.headers["content-range"])
            if len(self.ranges) == 2:
                self.since = time.monotonic()
                self.reached.set()
                if self.for_ever:
                    silence(request)
                self.go.wait(20)
        forward(request, self.host)


def publish(pack: Path, host: str, home: Path) -> subprocess.Popen[str]:
    words = ["publish", str(pack), f"oci://{host}/ns/model", "--quant", "f16", "--chunk-mib", "4",
             "--accept", "parity-missing", "--json"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "medllm_pack", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        # Where the tests run in the background, SIGINT comes to them ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_running_chunk_ends_and_the_next_run_goes_on(
    registry: Registry, built_pack: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    slow = Slow(registry.host)
    with serving(slow) as host:
        running = publish(built_pack, host, tmp_path)
        assert slow.reached.wait(30)
        running.send_signal(sent)
        time.sleep(0.3)
        assert running.poll() is None  # the chunk is under way
        slow.go.set()
        out, err = running.communicate(timeout=20)
        assert (running.returncode, out) == (128 + sent, "")
        assert "Traceback" not in err
        entries = list((tmp_path / ".local/state/medllm-pack/uploads").iterdir())
        assert [json.loads(path.read_text())["offset"] for path in entries] == [8 * MIB]
        assert not registry.check_whole()
        seen = len(slow.ranges)
        again = publish(built_pack, host, tmp_path)
        out, err = again.communicate(timeout=60)
        assert (again.returncode, err) == (0, "")
    assert slow.ranges[:seen] == ["0-4194303", "4194304-8388607"]
    assert slow.ranges[seen].startswith("8388608-")
    assert registry.check_whole()
    assert list((tmp_path / ".local/state/medllm-pack/uploads").iterdir()) == []


def test_a_second_interrupt_ends_a_chunk_that_hangs(
    registry: Registry, built_pack: Path, tmp_path: Path
) -> None:
    slow = Slow(registry.host, for_ever=True)
    with serving(slow) as host:
        running = publish(built_pack, host, tmp_path)
        assert slow.reached.wait(30)
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=5)
        assert running.returncode == 130
        assert "Traceback" not in err
        assert not registry.check_whole()
        again = publish(built_pack, host, tmp_path)
        assert again.communicate(timeout=60)[1] == ""
    assert again.returncode == 0
    assert registry.check_whole()


def test_a_chunk_that_hangs_is_not_waited_for_long(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "_LAST_S", 0.5)  # not twenty seconds
    slow = Slow(registry.host, for_ever=True)

    def interrupt() -> None:
        slow.reached.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    sent = release(tmp_path / "r", size=250_000)
    options = pushing.Options(state=tmp_path / "state", chunk=100_000, ask_ollama=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serving(slow) as host:
            threading.Thread(target=interrupt).start()
            target = RegistryTarget("oci", host, "ns/model")
            with pytest.raises(KeyboardInterrupt):
                pushing.push(sent, target, access=ACCESS, options=options)
            assert time.monotonic() - slow.since < 3
            pushing.push(sent, target, access=ACCESS, options=options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert slow.ranges == ["0-99999", "100000-199999", "100000-199999", "200000-249999"]
    assert registry.check_whole()


def test_nothing_goes_on_where_a_thread_cannot_be_started(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[threading.Thread] = []
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if "(worker)" in self.name:
            workers.append(self)
            if len(workers) == 2:
                raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    options = pushing.Options(state=tmp_path / "state", chunk=100_000, ask_ollama=False)
    slow = Slow(registry.host)
    with serving(slow) as host, pytest.raises(RuntimeError, match="start new thread"):
        pushing.push(
            release(tmp_path / "r", size=250_000), RegistryTarget("oci", host, "ns/model"),
            access=ACCESS, options=options,
        )  # fmt: skip
    assert not workers[0].is_alive()
    assert len(slow.ranges) < 2
