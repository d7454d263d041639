"""Folders that are whole or absent."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from medllm_pack import files
from medllm_pack.errors import SourceError, WriteError


def test_folder_takes_its_name_only_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "p"

    def fail_half_way() -> None:
        with files.new_folder(target, replace=False) as partial:
            files.write_text(partial / "a", "x")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert not list(tmp_path.iterdir())
    with files.new_folder(target, replace=False) as partial:
        files.write_text(partial / "a", "x")
    assert [path.name for path in target.iterdir()] == ["a"]


def test_folder_set_aside_by_a_killed_replacement_comes_back(tmp_path: Path) -> None:
    """Killed between its two renames, a replacement has left the old folder under a hidden name."""
    aside = tmp_path / ".p.partial-old-0123abcd"
    aside.mkdir()
    (aside / "a").write_text("old")
    with pytest.raises(WriteError, match="exists"), files.new_folder(tmp_path / "p", replace=False):
        pass
    assert (tmp_path / "p" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_replacement_leaves_the_new_folder_alone(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with files.new_folder(tmp_path / "p", replace=True) as partial:
            files.write_text(partial / "a", text)
    assert (tmp_path / "p" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0, 0o777)])
def test_nobody_else_looks_into_a_folder_that_is_not_done(
    mask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        with files.new_folder(tmp_path / "p", replace=False) as partial:
            assert partial.stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "p").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_small_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, what in ((tmp_path, "Is a directory"), (tmp_path / "fifo", "not a regular file")):
        with pytest.raises(SourceError, match=what):
            files.read_small(path)


def test_folder_without_a_lock_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def open_no_lock(path: os.PathLike[str] | str, *arguments: int, **more: int) -> int:
        if Path(path).name == ".lock":
            raise OSError(errno.EDQUOT, "no inode left")
        return really_open(path, *arguments, **more)

    monkeypatch.setattr("os.open", open_no_lock)
    with pytest.raises(WriteError, match="quota"), files.new_folder(tmp_path / "p", replace=False):
        pass
    assert not list(tmp_path.iterdir())


def test_old_folder_keeps_its_name_if_the_new_one_does_not_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a").write_text("old")
    rename, calls = os.rename, iter([True, False, True])

    def fail_once(source: Path, target: Path) -> None:
        if not next(calls):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr("os.rename", fail_once)
    with pytest.raises(WriteError), files.new_folder(tmp_path / "p", replace=True) as partial:
        files.write_text(partial / "a", "new")
    assert (tmp_path / "p" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_name_with_signs_of_a_pattern_means_itself(tmp_path: Path) -> None:
    for name in (".p[1].partial-0123abcd", ".p1.partial-0123abcd"):
        (tmp_path / name).mkdir()
    with files.new_folder(tmp_path / "p[1]", replace=False):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"p[1]", ".p1.partial-0123abcd"}


def test_interrupting_again_does_not_end_the_cleaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree, interrupts = shutil.rmtree, iter([KeyboardInterrupt, SystemExit])

    def interrupted(folder: Path, *, ignore_errors: bool) -> None:
        if again := next(interrupts, None):
            raise again
        rmtree(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(FileExistsError), files.new_folder(tmp_path / "p", replace=False) as partial:
        (partial / ".lock").mkdir()
    assert not list(tmp_path.iterdir())


def test_closing_does_not_wait_until_all_is_digested() -> None:
    """Gigabytes may be left when a build is interrupted."""
    begun, ended = threading.Event(), threading.Event()

    def pieces() -> Iterator[memoryview]:
        while not ended.is_set():
            begun.set()
            yield memoryview(b"x")

    digest = files.DigestBehind(behind=3)
    digest.update_from(pieces())
    digest.update_from(pieces())
    assert begun.wait(30)
    closing = threading.Thread(target=digest.close)
    closing.start()
    closing.join(10)
    in_time = not closing.is_alive()
    ended.set()
    closing.join()
    assert in_time
