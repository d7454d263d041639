"""What this program remembers between runs: small JSON files in the user's state folder.

For the user alone. A file that is lost or damaged is an empty one: whatever is remembered here may
save work and never decides what is right. Knows nothing of what is remembered.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from medllm_pack import files
from medllm_pack.errors import SourceError
from medllm_pack.home import home


def state_folder() -> Path:
    """Return where this program keeps what it must remember."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else home() / ".local" / "state") / "medllm-pack"


def read(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing if it is not there or cannot be understood."""
    try:
        document = json.loads(files.read_small(path, limit=1 << 20))
    except (SourceError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a file in one step.

    Raises:
        WriteError: if the disk says no.
    """
    with files.translated(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(document, file)
        os.replace(beside, path)
