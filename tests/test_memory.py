"""The memory that is left, with the limits that containers set."""

from __future__ import annotations

from pathlib import Path

import pytest

from medllm_pack.memory import available
from tests.groups import written

MACHINE = "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"
V1 = "9:memory:/docker/1f\n3:cpu:/docker/1f\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # A container in version 2; what its page cache holds can be had back.
        (
            "0::/\n",
            {
                "memory.max": "2000000\n",
                "memory.current": "1500000\n",
                "memory.stat": "anon 300000\ninactive_file 700000\nactive_file 400000\n",
            },
            1_600_000,
        ),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "1500000\n"}, 8_192_000),
        ("0::/\n", {"memory.max": "90000000\n", "memory.current": "1\n"}, 8_192_000),
        ("0::/\n", {"memory.max": "1000\n", "memory.current": "2000\n"}, 0),
        # The limit may be a group's above.
        (
            "0::/a.slice/b.service\n",
            {
                "a.slice/memory.max": "5000000\n",
                "a.slice/memory.current": "1000000\n",
                "a.slice/b.service/memory.max": "max\n",
            },
            4_000_000,
        ),
        # Version 1, seen from inside of a container: the path is the machine's.
        (
            V1,
            {
                "memory/memory.limit_in_bytes": "3000000\n",
                "memory/memory.usage_in_bytes": "2000000\n",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500000\n",
            },
            1_500_000,
        ),
        (
            V1,
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "2000000\n",
            },
            8_192_000,
        ),
        ("", {}, 8_192_000),
    ],
)
def test_a_limit_counts_less_what_is_used_for_good(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "meminfo").write_text(MACHINE)
    limits = written(tmp_path, "memory", groups, files)
    assert available(limits, tmp_path / "meminfo") == expected


def test_without_word_of_the_system_nothing_is_too_much(tmp_path: Path) -> None:
    assert available([], tmp_path / "none") > 1 << 60
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 8000 kB\n")
    assert available([], tmp_path / "meminfo") > 1 << 60
