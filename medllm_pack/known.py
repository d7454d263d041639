"""Which large files have been digested on this machine and are the same still.

An entry holds a digest and what the file system said of the file before its bytes were read. The
time of change is part of it: a program can set back when a file was modified, but not when it was
changed. So a file that was edited, copied, or moved to another disk is digested once more. Making
or removing a hard link changes that time too, and so does `ollama rm` of a linked model.

Entries are this user's, and lost ones cost a reading. Who can write to the user's own state folder
is not kept out. Memory: one entry.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from medllm_pack import files, state
from medllm_pack.errors import WriteError

LARGE: Final = 1 << 20  # bytes; what is smaller is read faster than looked up
_TICK: Final = 0.05  # seconds; file systems note times by the kernel's clock tick, at most 10 ms
_MOST: Final = 4096  # entries; beyond that, those of files that are gone are removed


@dataclass(frozen=True)
class Identity:
    """What the file system says of a file; as long as it says the same, the bytes are the same.

    The device is not part of it: its number changes between starts of a machine.
    """

    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Identity:
        """Return the identity of a file, by its path or descriptor, now.

        Raises:
            OSError: if there is none.
        """
        s = os.stat(file)
        return cls(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)

    @classmethod
    def settled(cls, path: Path) -> Identity:
        """Return the identity of a file once any later change of it would show.

        Raises:
            OSError: if there is none.
        """
        found = cls.of(path)
        while abs(time.time_ns() - found.changed_ns) < _TICK * 1e9:
            time.sleep(_TICK)
            found = cls.of(path)
        return found


class Known:
    """The files that are known.

    Args:
        folder: of the state; the user's own if None.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self._folder: Path | None = (folder or state.state_folder()) / "known"
        except RuntimeError:
            self._folder = None  # a user without a home remembers nothing

    def sha256(self, path: Path) -> str | None:
        """Return the digest of a file that is the same as when it was digested; else None."""
        document = state.read(entry) if (entry := self._entry(path)) else {}
        try:
            now = Identity.of(path)
        except OSError:
            return None
        same = document.get("identity") == list(vars(now).values())
        digest = document.get("sha256")
        return digest if same and isinstance(digest, str) else None

    def remember(self, path: Path, sha256: str, identity: Identity) -> None:
        """Remember the digest of a file that had this identity before its bytes were read."""
        entry = self._entry(path)
        if entry is None or identity.size < LARGE:
            return
        document = {
            "path": str(path.resolve()),
            "identity": list(vars(identity).values()),
            "sha256": sha256,
        }
        with suppress(WriteError):  # it will be digested again
            state.write(entry, document)
        self._tidy(entry.parent)

    def digest(self, path: Path, *, advance: Callable[[int], None] | None = None) -> str:
        """Digest a file, and remember it if it stayed the same meanwhile.

        Raises:
            OSError: if it cannot be read.
        """
        before = Identity.settled(path)
        found = files.sha256(path, advance=advance)
        if Identity.of(path) == before:
            self.remember(path, found, before)
        return found

    def made(self, path: Path, sha256: str) -> None:
        """Remember a file that was just written with this digest."""
        with suppress(OSError):
            self.remember(path, sha256, Identity.settled(path))

    @contextmanager
    def linking(self, path: Path) -> Iterator[None]:
        """Keep a file known although the block makes links to it, which changes its time."""
        known = self.sha256(path)
        before = Identity.of(path) if known else None
        yield
        if known and before:
            after = Identity.settled(path)
            if replace(before, changed_ns=after.changed_ns) == after:
                self.remember(path, known, after)

    def _entry(self, path: Path) -> Path | None:
        if self._folder is None:
            return None
        key = hashlib.sha256(os.fsencode(path.resolve()))
        return self._folder / f"{key.hexdigest()}.json"

    def _tidy(self, folder: Path) -> None:
        with suppress(OSError):
            entries = list(folder.glob("*.json"))
            for entry in entries if len(entries) > _MOST else ():
                if not os.path.exists(str(state.read(entry).get("path"))):
                    entry.unlink()
