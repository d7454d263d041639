"""Where an upload stood, so that another process goes on with it.

Small files in the user's state folder, for the user alone. They hold addresses of uploads, never a
login. A lost or wrong entry costs a blob sent anew, nothing else: the registry's own answer decides
where an upload goes on, and the digest at its end whether it was right.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from medllm_pack import state
from medllm_pack.digests import Digest
from medllm_pack.ollama.image import Blob
from medllm_pack.publish.guard import Origin


@dataclass(frozen=True)
class Entry:
    """An open upload: the newest address, and the bytes the registry confirmed."""

    location: str
    offset: int


class Journal:
    """The open uploads of this user to one repository.

    Args:
        origin: of the registry.
        repository: its path.
        folder: of the state; the user's own if None.
    """

    def __init__(self, origin: Origin, repository: str, *, folder: Path | None = None) -> None:
        self._folder = folder or state.state_folder()
        self._key = f"{origin}/{repository}"

    def entry(self, blob: Blob) -> Entry | None:
        """Return where the upload of a blob stood, if its file is still the same."""
        document = state.read(self._path(blob))
        if document.get("source") != _identity(blob):
            return None
        location, offset = document.get("location"), document.get("offset")
        if isinstance(location, str) and type(offset) is int and 0 < offset <= blob.size:
            return Entry(location, offset)
        return None

    def save(self, blob: Blob, entry: Entry) -> None:
        """Remember where the upload of a blob stands."""
        state.write(
            self._path(blob),
            {"location": entry.location, "offset": entry.offset, "source": _identity(blob)},
        )

    def drop(self, blob: Blob) -> None:
        """Forget the upload of a blob."""
        self._path(blob).unlink(missing_ok=True)

    def _path(self, blob: Blob) -> Path:
        key = Digest.of(f"{self._key} {blob.digest}".encode())
        return self._folder / "uploads" / f"{key.hex}.json"


def _identity(blob: Blob) -> list[int]:
    if not isinstance(blob.source, Path):
        return [blob.size]
    status = os.stat(blob.source)
    return [status.st_size, status.st_mtime_ns, status.st_ino]
