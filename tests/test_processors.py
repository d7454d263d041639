"""The number of processors, with the limits that containers set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medllm_pack.groups import above
from medllm_pack.processors import usable
from tests.groups import written


@pytest.fixture(autouse=True)
def _many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # A container in version 2: its own group is the top.
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
        # A service: the quota may be a group's above.
        (
            "0::/a.slice/b.service\n",
            {"a.slice/cpu.max": "300000 100000\n", "a.slice/b.service/cpu.max": "max 100000\n"},
            3,
        ),
        # Version 1, seen from inside of a container: the path is the machine's.
        (
            "4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        (
            "1:cpu:/a/b\n",
            {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"},
            64,
        ),
        ("1:cpuset:/a\n", {"cpu.max": "100000 100000\n"}, 64),
        ("", {}, 64),
    ],
)
def test_a_quota_is_a_number_of_processors(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    assert usable(written(tmp_path, "cpu", groups, files)) == expected


def test_without_control_groups_the_list_of_processors_counts(tmp_path: Path) -> None:
    assert usable(above("cpu", groups=tmp_path / "none", root=tmp_path / "neither")) == 64
