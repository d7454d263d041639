"""How many processors this process may keep busy.

A container's limit is mostly a share of the time of all processors (``docker --cpus 2``), which the
list of processors that a process may run on does not show. As many threads as the machine has
processors would take their memory and wait for each other. Knows nothing of models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator

from medllm_pack.groups import Group, above


def usable(groups: Iterable[Group] | None = None) -> int:
    """Return the number of processors, limited by the quotas of the control groups, rounded up.

    Args:
        groups: those of this process if None.
    """
    allowed = len(os.sched_getaffinity(0))
    shares = _shares(above("cpu") if groups is None else groups)
    return max(1, min([allowed, *(math.ceil(share) for share in shares)]))


def _shares(groups: Iterable[Group]) -> Iterator[float]:
    """Yield the quota of every group, in processors; nothing for one without."""
    for group in groups:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if group.version == 1 else ("cpu.max",)
        quota = " ".join(map(group.read, names)).split()
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            yield int(quota[0]) / int(quota[1])
