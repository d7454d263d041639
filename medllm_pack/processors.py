"""How many processors this process may keep busy.

A container's limit is mostly a share of the time of all processors (``docker --cpus 2``), which the
list of processors that a process may run on does not show. As many threads as the machine has
processors would take their memory and wait for each other. Knows nothing of models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def usable(groups: Path = _GROUPS, root: Path = _ROOT) -> int:
    """Return the number of processors, limited by the quotas of the control groups, rounded up.

    Args:
        groups: what the kernel says of the process's groups.
        root: where the groups lie.
    """
    allowed = len(os.sched_getaffinity(0))
    return max(1, min([allowed, *(math.ceil(share) for share in _shares(groups, root))]))


def _shares(groups: Path, root: Path) -> Iterator[float]:
    """Yield the quota of every group above the process, in processors; nothing without one."""
    for line in _text(groups).splitlines():
        _, controllers, place = line.split(":", 2)
        # Version 2 has one hierarchy, without controllers' names; version 1 one for each.
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        # A container sees its own group as the top, at times under the path of the machine.
        for folder in (top / place.strip("/"), *(top / place.strip("/")).parents):
            if folder.is_relative_to(top):
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
                quota = " ".join(_text(folder / name) for name in names).split()
                if len(quota) == 2 and quota[0] not in ("max", "-1"):
                    yield int(quota[0]) / int(quota[1])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
