"""Where a pack will lie: whether it may be written there, and whether there is room.

Looks, and writes nothing. Knows nothing of what is in a pack but its size and that ``pack.json``
makes a folder one.
"""

from __future__ import annotations

from pathlib import Path

from medllm_pack import files
from medllm_pack.errors import WriteError, shown

_SPARE = 1.05  # file systems keep some room for themselves


def check_free_name(out: Path, *, replace: bool) -> None:
    """Refuse a folder that exists, unless it is a pack that may be replaced.

    Raises:
        WriteError: if so.
    """
    if out.exists() and not replace:
        raise WriteError(f"{shown(out)} exists; --force replaces it, or name another --out")
    if out.exists() and not (out / "pack.json").exists():
        raise WriteError(
            f"{shown(out)} is not a pack, --force does not replace it; name another --out"
        )


def check_free_space(out: Path, *, need: int) -> None:
    """Refuse a disk on which ``need`` bytes, and a little more, are not free.

    Raises:
        WriteError: if so.
    """
    free = files.disk_free(out)
    if need * _SPARE > free:
        raise WriteError(
            f"the pack needs {need / 1e9:.2f} GB and some room, {shown(out)} has "
            f"{free / 1e9:.2f} GB free; free some space, choose fewer variants or another --out"
        )
