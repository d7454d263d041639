"""What is remembered of digested files holds as long as the files are the same, and no longer."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medllm_pack.known import LARGE, Identity, Known
from tests.packs import build_pack
from tests.test_bad_input import run

SIZE = LARGE + 5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def known(tmp_path: Path) -> Known:
    return Known(tmp_path / "state")


def test_a_file_is_known_in_another_process_too(file: Path, known: Known, tmp_path: Path) -> None:
    assert known.sha256(file) is None
    found = known.digest(file)
    assert found == hashlib.sha256(file.read_bytes()).hexdigest()
    assert Known(tmp_path / "state").sha256(file) == found
    [entry] = (tmp_path / "state/known").iterdir()
    assert entry.stat().st_mode & 0o777 == 0o600


def edited(path: Path) -> None:
    """Change a byte and set every time back that a program can."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swapped(path: Path) -> None:
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(bytes(SIZE))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


def moved_in(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


@pytest.mark.parametrize("change", [edited, swapped, moved_in, Path.unlink])
def test_what_was_touched_is_not_known(
    change: Callable[[Path], object], file: Path, known: Known
) -> None:
    known.digest(file)
    change(file)
    assert known.sha256(file) is None


def test_a_change_in_the_same_tick_of_the_clock_shows(known: Known, tmp_path: Path) -> None:
    """Written, digested and written again as fast as it goes."""
    for n in range(5):
        path = tmp_path / f"f{n}"
        path.write_bytes(bytes(SIZE))
        known.digest(path)
        edited(path)
        assert known.sha256(path) is None


def test_a_file_that_changes_while_it_is_read_is_not_remembered(file: Path, known: Known) -> None:
    calls: list[int] = []

    def advance(n: int) -> None:
        if not calls:
            edited(file)
        calls.append(n)

    known.digest(file, advance=advance)
    assert known.sha256(file) is None


def test_links_of_our_own_leave_a_file_known(file: Path, known: Known) -> None:
    found = known.digest(file)
    with known.linking(file):
        os.link(file, file.with_name("link"))
    assert known.sha256(file) == found
    file.with_name("link").unlink()
    assert known.sha256(file) is None  # by somebody else: not to be told from an edit
    with known.linking(file):
        os.link(file, file.with_name("link"))
    assert known.sha256(file) is None
    known.digest(file)
    with known.linking(file):
        edited(file)
        os.utime(file)
    assert known.sha256(file) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"identity": 7}', '{"sha256": []}'])
def test_a_damaged_entry_says_nothing(text: str, file: Path, known: Known, tmp_path: Path) -> None:
    known.digest(file)
    [entry] = (tmp_path / "state/known").iterdir()
    entry.write_text(text)
    assert known.sha256(file) is None


def test_a_state_that_cannot_be_written_costs_a_reading_only(file: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    known = Known(tmp_path / "state")
    assert known.digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert known.sha256(file) is None


def test_small_files_are_not_remembered(known: Known, tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"x")
    known.digest(path)
    assert not (tmp_path / "state").exists()
    assert Identity.of(path) == Identity.settled(path)


def test_install_reads_a_pack_that_came_from_elsewhere_once(
    built_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not after verify has read it, and not after an installation that made links."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    read: list[str] = []
    monkeypatch.setattr("medllm_pack.files.sha256", recording(read))
    pack = Path(shutil.copytree(built_pack, tmp_path / "p"))
    words = ["install", str(pack), "--store", str(tmp_path / "store"), "-q"]
    assert run(words, capsys)[0] == 0
    assert read == ["medllm-tiny-Q4_K_M.gguf"]
    assert run([*words, "--name", "other"], capsys)[0] == 0
    assert len(read) == 1
    assert run(["verify", str(pack), "-q"], capsys)[0] == 0
    read.clear()
    assert run([*words, "--quant", "f16"], capsys)[0] == 0
    assert read == []
    edited(pack / "medllm-tiny-F16.gguf")
    code, _, err = run([*words, "--quant", "f16", "--name", "third"], capsys)
    assert (code, "is not what pack.json says" in err) == (1, True)


def recording(read: list[str]) -> Callable[..., str]:
    """The digest of files, with a note of each file that it reads."""
    from medllm_pack.files import sha256

    def recorded(path: Path, *, advance: Callable[[int], None] | None = None) -> str:
        read.append(path.name)
        return sha256(path, advance=advance)

    return recorded


def test_what_was_built_here_is_known(tmp_path: Path) -> None:
    pack = build_pack(tmp_path / "p")
    for path in pack.glob("*.gguf"):
        assert Known().sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
