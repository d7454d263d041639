"""How much memory programs and page cache may still take.

A container's limit is smaller than what the machine has, and counts the page cache that the
container fills. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from medllm_pack.groups import Group, above

_MEMINFO = Path("/proc/meminfo")
_PLENTY = 1 << 62  # where the system does not say; nothing reaches it


def available(groups: Iterable[Group] | None = None, meminfo: Path = _MEMINFO) -> int:
    """Return the bytes that the machine and the control groups leave; page cache counts as free.

    Args:
        groups: those of this process if None.
        meminfo: what the kernel says of the machine's memory.
    """
    left = _left(above("memory") if groups is None else groups)
    return max(0, min([_of_machine(meminfo), *left]))


def _of_machine(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return _PLENTY
    values = dict(line.split(":", 1) for line in lines)
    said = values.get("MemAvailable")  # since Linux 3.14
    return int(said.split()[0]) * 1024 if said else _PLENTY


def _left(groups: Iterable[Group]) -> Iterator[int]:
    """Yield what every group with a limit leaves."""
    for group in groups:
        if group.version == 1:
            names, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            names, prefix = ("memory.max", "memory.current"), ""
        limit, used = (group.read(name).strip() for name in names)
        if limit.isdecimal() and used.isdecimal():
            stat = dict(line.split(" ", 1) for line in group.read("memory.stat").splitlines())
            files = (f"{prefix}active_file", f"{prefix}inactive_file")
            yield int(limit) - int(used) + sum(int(stat.get(name, 0)) for name in files)
