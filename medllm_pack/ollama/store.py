"""Ollama's store on this machine: blobs by digest and manifests by name, written as Ollama does.

Blobs come first, each under a hidden name until it is whole; the manifest comes last. Nothing else
in a store is touched. Where pack and store share a file system no weights are copied: a blob shares
the blocks of the pack's file, or is a second name of it. Ollama never writes into a blob, and
removing a model removes that name only. Two layouts are known: ``manifests/`` with files, and the
younger ``manifests-v2/`` with symbolic links to manifests that are blobs; ollama manifest/paths.go.
"""

from __future__ import annotations

import os
import pwd
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import MedllmError, SourceError, StoreAccessError, WriteError, shown
from medllm_pack.home import home, is_missing
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.ollama.names import ModelName
from medllm_pack.ollama.placing import check, place, remove_stale, same_bytes
from medllm_pack.progress import Reporter

# ollama types/model/name.go, DefaultName; manifest/paths.go for the second host.
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_V2_HOST: Final = "ollama.com"
_PUBLIC: Final = (_HOST, _V2_HOST)
_SERVICE: Final = Path("/usr/share/ollama/.ollama/models")  # of the user that install.sh makes


@dataclass(frozen=True)
class Placed:
    """What an installation did.

    Attributes:
        changed: whether the name means something else than before.
        shared: bytes of weights that needed no copy.
        copied: bytes of weights that were copied.
    """

    changed: bool
    shared: int
    copied: int


def candidates() -> list[Path]:
    """Return where stores may be, in the order in which they are looked for.

    ``OLLAMA_MODELS`` alone if it is set; else the user's own store and that of the service.
    """
    if said := os.environ.get("OLLAMA_MODELS", "").strip().strip("\"'"):
        return [Path(said)]
    return [home() / ".ollama" / "models", _SERVICE]


def full_name(name: ModelName) -> ModelName:
    """Return a name with Ollama's defaults in place of what was not said."""
    return ModelName(name.model, name.tag or _TAG, name.namespace or _NAMESPACE, name.host or _HOST)


@dataclass(frozen=True)
class Store:
    """A store; ``root`` is what ``OLLAMA_MODELS`` names."""

    root: Path

    def blob(self, digest: Digest) -> Path:
        """Return the place of a blob."""
        return self.root / "blobs" / digest.file_name

    def manifest(self, name: ModelName) -> Path:
        """Return the place of a name's manifest: where it is, else where it would be."""
        for path in self._manifests(full_name(name)):
            if os.path.lexists(path):
                return path
        return self._new_manifest(full_name(name))

    def check_access(self) -> None:
        """Refuse a store that this user may not write to.

        Raises:
            StoreAccessError: with the way out.
        """
        if is_missing(self.root):
            raise StoreAccessError(
                "there is no home folder for a store of Ollama's; set HOME, name the store with "
                "--store, or start Ollama so that its API can be used"
            )
        folder, writable, owner = self.root / "blobs", False, "another user"
        try:
            while not folder.exists():
                folder = folder.parent
            writable = os.access(folder, os.W_OK | os.X_OK)
            owner = _user(folder.stat().st_uid)
        except OSError:
            pass  # not even to be looked into
        if not writable:
            raise StoreAccessError(
                f"the store {shown(self.root)} belongs to {owner}; run the same command with sudo "
                f"and --store {self.root}, or start Ollama so that its API can be used"
            )

    def install(self, image: Image, name: ModelName, *, replace: bool, report: Reporter) -> Placed:
        """Bring an image into the store under a name.

        Raises:
            StoreAccessError: if this user may not write there.
            WriteError: if the name means another model, or the disk says no.
            SourceError: if a blob is not what its digest says.
        """
        self.check_access()
        old = self._read(name)
        if old is not None and old != image.manifest and not replace:
            raise WriteError(
                f"{name} exists in {shown(self.root)}; --force replaces it, --name takes another "
                "name"
            )
        with files.translated(
            self.root,
            what="the store",
            elsewhere="another store with --store",
            state="no name was changed",
        ):
            self._make_folder(self.root / "blobs")
            remove_stale(self.root / "blobs", "sha256-*")
            sizes = {"shared": 0, "copied": 0, "written": 0}
            for blob in image.blobs:
                sizes[self._bring(blob, report)] += blob.size
            if old != image.manifest:
                self._write_manifest(image, full_name(name))
            # An Ollama that starts just now removes blobs that no manifest names yet.
            for blob in image.blobs:
                if not self.blob(blob.digest).exists():
                    self._bring(blob, report)
        return Placed(old != image.manifest, sizes["shared"], sizes["copied"])

    def holds(self, name: ModelName) -> bool:
        """Say whether the store has a manifest of this name."""
        return self._read(name) is not None

    def _bring(self, blob: Blob, report: Reporter) -> str:
        """Make a blob be there; return whether its bytes were shared, copied or just written."""
        target = self.blob(blob.digest)
        text = isinstance(blob.source, bytes)
        if self._is_there(blob, target, report):
            return "written" if text else "shared"
        self._check_readable(blob)
        advance = _Copying(blob, report)
        how = place(blob, target, advance=advance)
        if how != "link":
            self._give(target)
        if text:
            return "written"
        return "copied" if how == "copy" else "shared"

    def _is_there(self, blob: Blob, target: Path, report: Reporter) -> bool:
        """Say whether a blob is in the store: the pack's own bytes, or a file whose digest fits."""
        try:
            status = os.lstat(target)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(status.st_mode):
            raise WriteError(f"{shown(target)} is no regular file; look at it before going on")
        if status.st_size != blob.size:
            report.notice(f"{target.name} in the store was damaged and is replaced")
            return False
        if isinstance(blob.source, Path) and same_bytes(blob.source, target):
            return True
        return self._fits(blob, target, report)

    def _fits(self, blob: Blob, target: Path, report: Reporter) -> bool:
        if blob.size > 1 << 20:
            report.step("checking what is there", total_bytes=blob.size)
        try:
            with target.open("rb") as file:
                check(blob, file, advance=report.advance)
        except SourceError:
            report.notice(f"{target.name} in the store was damaged and is replaced")
            return False
        return True

    def _check_readable(self, blob: Blob) -> None:
        """Refuse weights that the user of the store could not read once they are linked."""
        if not isinstance(blob.source, Path):
            return
        owner, file = self.root.stat(), blob.source.stat()
        bit = (
            stat.S_IRUSR
            if owner.st_uid == file.st_uid
            else stat.S_IRGRP
            if owner.st_gid == file.st_gid
            else stat.S_IROTH
        )
        if owner.st_uid and not file.st_mode & bit:
            raise WriteError(
                f"{blob.source.name} cannot be read by {_user(owner.st_uid)}, whose store "
                f"{shown(self.root)} is; run: chmod o+r {blob.source}"
            )

    def _read(self, name: ModelName) -> bytes | None:
        for path in self._manifests(full_name(name)):
            try:
                return files.read_small(path, limit=4 << 20)
            except MedllmError:
                if os.path.lexists(path) and not path.is_symlink():
                    raise
        return None

    def _manifests(self, name: ModelName) -> Iterator[Path]:
        """Yield where a name may be, in the order in which Ollama looks."""
        hosts = [name.host or _HOST]
        if hosts[0].lower() in _PUBLIC:
            yield self._spelled("manifests-v2", name, _V2_HOST)
            hosts += [host for host in _PUBLIC if host != hosts[0].lower()]
        else:
            yield self._spelled("manifests-v2", name, hosts[0])
        for host in hosts:
            yield self._spelled("manifests", name, host)

    def _spelled(self, layout: str, name: ModelName, host: str) -> Path:
        """Return a path in the case in which it exists: names differ in more than case."""
        path = self.root / layout
        for part in (host, name.namespace or "", name.model, name.tag or ""):
            there = [] if (path / part).exists() else _entries(path)
            same = [entry for entry in there if entry.lower() == part.lower()]
            path = path / (same[0] if same else part)
        return path

    def _new_manifest(self, name: ModelName) -> Path:
        return next(self._manifests(name)) if self._is_v2() else self._legacy(name)

    def _legacy(self, name: ModelName) -> Path:
        return self._spelled("manifests", name, name.host or _HOST)

    def _is_v2(self) -> bool:
        return (self.root / "manifests-v2").is_dir()

    def _write_manifest(self, image: Image, name: ModelName) -> None:
        blob = Blob.of(image.manifest, image.media_type)
        if not self._is_v2():
            target = self.manifest(name)
            self._make_folder(target.parent)
            place(blob, target)
            self._give(target)
            return
        place(blob, self.blob(blob.digest))
        self._give(self.blob(blob.digest))
        first, *older = self._manifests(name)
        self._make_folder(first.parent)
        self._link(self.blob(blob.digest), first)
        for path in older:
            path.unlink(missing_ok=True)

    def _link(self, blob: Path, target: Path) -> None:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        partial.symlink_to(os.path.relpath(blob, target.parent))
        os.replace(partial, target)
        self._give(target)
        files.sync_folder(target.parent)

    def _make_folder(self, path: Path) -> None:
        if not path.is_dir():
            self._make_folder(path.parent)
            path.mkdir(mode=0o755, exist_ok=True)
            if self.root in path.parents:
                self._give(path)

    def _give(self, path: Path) -> None:
        """Give what root made to the user of the store."""
        owner = self.root.stat()
        if os.geteuid() == 0 and owner.st_uid != 0:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


class _Copying:
    """Begins a step at the first byte that is copied: without a copy there is nothing to see."""

    def __init__(self, blob: Blob, report: Reporter) -> None:
        self.blob, self.report, self.begun = blob, report, blob.size <= 1 << 20

    def __call__(self, n: int) -> None:
        if not self.begun:
            self.report.step("copying into the store", total_bytes=self.blob.size)
            self.begun = True
        self.report.advance(n)


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _user(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user with number {uid}"
