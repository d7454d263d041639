"""Writing beside computing: everything, no more than a few at a time, and no error is lost."""

from __future__ import annotations

import threading
import time

import pytest

from medllm_pack.pack.writers import Writers


def test_everything_is_written_when_it_is_left() -> None:
    written: list[int] = []
    with Writers(threads=3, room=4) as writers:
        for n in range(100):
            writers.submit(written.append, n)
    assert sorted(written) == list(range(100))
    assert not [t for t in threading.enumerate() if t.name.startswith("write")]


def test_who_hands_over_waits_when_there_is_no_room() -> None:
    gate, handed = threading.Event(), []

    def hand_over() -> None:
        with Writers(threads=2, room=3) as writers:
            for n in range(10):
                writers.submit(gate.wait)
                handed.append(n)

    thread = threading.Thread(target=hand_over)
    thread.start()
    deadline = time.monotonic() + 30
    while len(handed) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.join(0.1)  # time enough for a fourth
    assert len(handed) == 3
    gate.set()
    thread.join(5)
    assert len(handed) == 10


@pytest.mark.parametrize("last", [False, True])
def test_an_error_is_raised_to_who_hands_over_or_at_the_end(last: bool) -> None:
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise OSError("no space")

    def hand_over() -> None:
        with Writers(threads=1, room=2) as writers:
            writers.submit(fail)
            failed.wait(5)
            for n in range(0 if last else 10):
                writers.submit(handed.append, n)

    handed: list[int] = []
    with pytest.raises(OSError, match="no space"):
        hand_over()
    assert len(handed) < 3


def test_after_an_error_elsewhere_nothing_more_is_begun() -> None:
    gate, begun = threading.Event(), []

    def write(n: int) -> None:
        begun.append(n)
        gate.wait(5)

    def hand_over() -> None:
        with Writers(threads=1, room=9) as writers:
            for n in range(9):
                writers.submit(write, n)
            threading.Timer(0.1, gate.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        hand_over()
    assert len(begun) <= 1
