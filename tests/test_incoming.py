"""A file that is filled in order holds good bytes from its start to its end, however it ends."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medllm_pack.incoming import Incoming

WINDOW = 8 << 20
DATA = random.Random(5).randbytes(3 * WINDOW + 12_345)  # more than there are windows


def add(part: Incoming, data: bytes) -> None:
    while data:
        n = min(len(data), len(part.room()))
        part.room()[:n] = data[:n]
        part.filled(n)
        data = data[n:]


def fill(path: Path, data: bytes, *, piece: int, size: int) -> str:
    with Incoming.at(path, lambda _: None) as part:
        part.take_up(size)
        for start in range(part.offset, len(data), piece):
            add(part, data[start : start + piece])
        return part.finish()


@pytest.mark.parametrize("piece", [65_536, 100_003, 5 << 20])
def test_pieces_of_any_size_give_the_file_and_its_digest(tmp_path: Path, piece: int) -> None:
    told: list[int] = []
    with Incoming.at(tmp_path / "x", told.append) as part:
        part.take_up(len(DATA))
        for start in range(0, len(DATA), piece):
            add(part, DATA[start : start + piece])
        assert part.offset == len(DATA)
        assert part.finish() == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "x").read_bytes() == DATA
    assert sum(told) == len(DATA)


@pytest.mark.parametrize("left", [0, 1, 4096, 77_777, WINDOW, WINDOW + 1, len(DATA)])
def test_a_part_goes_on_wherever_it_ended(tmp_path: Path, left: int) -> None:
    (tmp_path / "x").write_bytes(DATA[:left])
    found = fill(tmp_path / "x", DATA, piece=1 << 20, size=len(DATA))
    assert found == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "x").read_bytes() == DATA


def interrupted(path: Path, data: bytes) -> None:
    with Incoming.at(path, lambda _: None) as part:
        part.take_up(len(DATA))
        add(part, data)
        raise KeyboardInterrupt


def test_what_arrived_before_an_interrupt_is_in_the_file(tmp_path: Path) -> None:
    end = WINDOW + 54_321
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "x", DATA[:end])
    assert (tmp_path / "x").read_bytes() == DATA[:end]


def test_bytes_that_come_slowly_are_in_the_file_soon(tmp_path: Path) -> None:
    with Incoming.at(tmp_path / "x", lambda _: None) as part:
        part.take_up(len(DATA))
        for start in range(0, 70_000, 10_000):
            add(part, DATA[start : start + 10_000])
            time.sleep(0.1)
        assert (tmp_path / "x").stat().st_size >= 50_000  # as if it were killed here
        add(part, DATA[70_000:])
        assert part.finish() == part.finish() == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "x").read_bytes() == DATA


def test_a_part_that_is_too_long_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"?" * 1000)
    assert fill(tmp_path / "x", b"short", piece=2, size=5) == hashlib.sha256(b"short").hexdigest()
    with Incoming.at(tmp_path / "x", lambda _: None) as part:
        part.take_up(5)
        part.restart()
        add(part, b"again")
        assert part.finish() == hashlib.sha256(b"again").hexdigest()
    assert (tmp_path / "x").read_bytes() == b"again"


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from medllm_pack.incoming import Incoming
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, data, limit = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
with Incoming.at(path, lambda _: None) as part:
    part.take_up(len(data))
    for start in range(0, len(data), 65_536):
        n = min(65_536, len(data) - start)
        part.room()[:n] = data[start : start + n]
        part.filled(n)
    part.finish()
"""


@pytest.mark.parametrize("limit", [WINDOW + 4096, 2 * WINDOW])
def test_a_disk_that_says_no_leaves_a_part_without_a_hole(tmp_path: Path, limit: int) -> None:
    (tmp_path / "data").write_bytes(DATA)
    words = [str(tmp_path / "x"), str(tmp_path / "data"), str(limit)]
    ended = subprocess.run(
        [sys.executable, "-c", _LIMITED, *words], capture_output=True, text=True, check=False
    )
    assert "OSError: [Errno 27]" in ended.stderr
    left = (tmp_path / "x").read_bytes()
    assert 0 < len(left) <= limit
    assert DATA.startswith(left)
