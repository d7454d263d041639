"""One repository's part of the cache that all Hub tools share, so that each uses what one brought.

Laid out as they lay it out: ``blobs/DIGEST`` holds bytes, ``snapshots/COMMIT/NAME`` links to them,
``refs/REVISION`` names a commit. Small files are compared with their digest whenever they are
taken, weights with their size; whoever reads the weights hashes them anyway.

Knows nothing of the network. Memory: one small file.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllm_pack import files
from medllm_pack.errors import MedllmError, SourceError, shown
from medllm_pack.weights.checkpoint import INDEX, SINGLE
from medllm_pack.weights.needed import (
    SMALL_LIMIT,
    Role,
    config_name,
    has_model,
    is_small,
    weight_names,
)
from medllm_pack.weights.sources import LocalFile, regular_file

COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git blob SHA-1, or SHA-256 of a large file


@dataclass(frozen=True, slots=True)
class Item:
    """A file as the Hub lists it. Its digest is also its name in the cache."""

    name: str
    size: int
    digest: str

    @property
    def sha256(self) -> str | None:
        """The digest, if it is one of the bytes alone."""
        return self.digest if len(self.digest) == 64 else None

    def hasher(self) -> Any:
        """Return a fresh hash whose digest over the whole file is ``digest``."""
        if self.sha256:
            return hashlib.sha256()
        # git hashes a header with the bytes.
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def is_at(self, path: Path) -> bool:
        """Say whether the file is here; a small one is read whole, weights are sized."""
        try:
            status = path.stat()
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != self.size:
            return False
        if self.size > SMALL_LIMIT or self.name.endswith(".safetensors"):
            return True
        digest = self.hasher()
        digest.update(path.read_bytes())
        return bool(digest.hexdigest() == self.digest)


class Cache:
    """What the cache has of one repository.

    Args:
        root: the cache.
        name: ``org/name``.
        revision: branch, tag or commit that is asked for.

    Attributes:
        root: the cache.
        folder: the repository's place in it; it may not exist yet.
    """

    def __init__(self, root: Path, *, name: str, revision: str) -> None:
        self.root = root
        self.folder = root / f"models--{name.replace('/', '--')}"
        self._revision = revision

    def snapshot(self, commit: str) -> Path:
        """Return the folder that shows a commit's files under their names."""
        return self.folder / "snapshots" / commit

    def blob(self, item: Item) -> Path:
        """Return where the bytes of a file are kept."""
        return self.folder / "blobs" / item.digest

    def part(self, item: Item) -> Path:
        """Return where they are kept until they are complete."""
        # `hf cache prune` knows this ending and removes what is never continued.
        return self.folder / "blobs" / f"{item.digest}.medllm-pack.incomplete"

    def has(self, item: Item, commit: str) -> bool:
        """Say whether a file is here."""
        return item.is_at(self.snapshot(commit) / item.name) or item.is_at(self.blob(item))

    def take(self, item: Item, commit: str) -> LocalFile:
        """Return a file that is here, linked under its name."""
        pointer = self.snapshot(commit) / item.name
        if not item.is_at(pointer):
            with self.writing():
                _link(pointer, f"../../blobs/{item.digest}")
        return regular_file(pointer, item.sha256)

    def contents(self, role: Role) -> tuple[str | None, Collection[LocalFile], list[str]]:
        """Return the commit that the revision stood for, its good files, and what is missing."""
        commit = self._remembered()
        if commit is None or not self.snapshot(commit).is_dir():
            return None, (), []
        names = os.listdir(self.snapshot(commit))
        found = {
            name: file
            for name in names
            if (is_small(name, role) or name.endswith((".safetensors", INDEX)))
            and (file := self._good_file(commit, name))
        }
        configs = set() if role == "license" else {config_name(role)}
        if has_model(role) and SINGLE not in found and INDEX not in found:
            return commit, (), sorted(configs - found.keys()) + [f"{SINGLE} (or {INDEX})"]
        needed = weight_names(found, role, lambda name: found[name].path)
        kept = [found[name] for name in found if is_small(name, role) or name in needed]
        return commit, kept, sorted({*configs, *needed} - found.keys())

    def _good_file(self, commit: str, name: str) -> LocalFile | None:
        pointer = self.snapshot(commit) / name
        # The link names the digest. Not its resolved target: that may be in a store of other names.
        target = os.path.basename(os.readlink(pointer)) if pointer.is_symlink() else ""
        if not pointer.is_file():
            return None
        if not DIGEST.fullmatch(target):
            return regular_file(pointer)
        item = Item(name, pointer.stat().st_size, target)
        return regular_file(pointer, item.sha256) if item.is_at(pointer) else None

    def is_complete(self, role: Role) -> bool:
        """Say whether nothing that ``role`` needs is missing."""
        try:
            commit, _, missing = self.contents(role)
        except MedllmError:  # damaged; the Hub has it whole
            return False
        return commit is not None and not missing

    def _remembered(self) -> str | None:
        if COMMIT.fullmatch(self._revision):
            return self._revision
        try:
            commit = files.read_small(self.folder / "refs" / self._revision).decode().strip()
        except (SourceError, UnicodeDecodeError):
            return None
        return commit if COMMIT.fullmatch(commit) else None

    def remember(self, commit: str) -> None:
        """Note the commit that the revision stands for now."""
        if commit in {self._revision, self._remembered()}:
            return
        ref = self.folder / "refs" / self._revision
        with self.writing():
            ref.parent.mkdir(parents=True, exist_ok=True)
            beside = ref.with_name(f"{ref.name}.{secrets.token_hex(4)}.tmp")
            beside.write_text(commit)
            os.replace(beside, ref)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failure to write into a SourceError that says what to do."""
        try:
            yield
        except OSError as error:
            raise SourceError(
                f"the Hub cache {shown(self.root)} cannot be written: {error.strerror}; "
                "free some space, or set HF_HOME to a folder on another disk. What has been "
                "downloaded is kept and will be continued"
            ) from error


def _link(pointer: Path, target: str) -> None:
    pointer.parent.mkdir(parents=True, exist_ok=True)
    beside = pointer.with_name(f".{secrets.token_hex(4)}.link")
    os.symlink(target, beside)
    os.replace(beside, pointer)
