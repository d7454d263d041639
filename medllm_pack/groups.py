"""Control groups: where the limits of a container stand that hold for this process.

Knows the two versions of the kernel's interface, and nothing of what is limited.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Group:
    """A control group that the process is in, itself or by one of its children.

    Attributes:
        folder: its files.
        version: 1 or 2 of the kernel's interface; the names of the files depend on it.
    """

    folder: Path
    version: int

    def read(self, name: str) -> str:
        """Return the text of one of its files; empty if there is none."""
        return _text(self.folder / name)


def above(controller: str, *, groups: Path = _GROUPS, root: Path = _ROOT) -> Iterator[Group]:
    """Yield every group whose limits of a kind hold for this process; none without control groups.

    Args:
        controller: ``cpu`` or ``memory``.
        groups: what the kernel says of the process's groups.
        root: where the groups lie.
    """
    for line in _text(groups).splitlines():
        _, controllers, place = line.split(":", 2)
        # Version 2 has one hierarchy, without controllers' names; version 1 one for each.
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        # A container sees its own group as the top, at times under the path of the machine.
        for folder in (top / place.strip("/"), *(top / place.strip("/")).parents):
            if folder.is_relative_to(top):
                yield Group(folder, 1 if controllers else 2)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
