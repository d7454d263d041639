"""Control groups as the kernel shows them, written into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medllm_pack.groups import Group, above


def written(folder: Path, controller: str, groups: str, files: Mapping[str, str]) -> list[Group]:
    """Write what the kernel says of the groups, and the groups; return those that hold."""
    (folder / "groups").write_text(groups)
    for name, text in files.items():
        (folder / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / name).write_text(text)
    return list(above(controller, groups=folder / "groups", root=folder / "root"))
