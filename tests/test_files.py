"""Folders that are whole or absent."""

from __future__ import annotations

import os
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
