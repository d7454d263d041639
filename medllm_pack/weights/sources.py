"""Where weights come from: a folder, a shipped model, or a repository on the Hugging Face Hub.

Says what SRC means, on the command line and in recipes, and what a source is once its files are on
this machine. Folders and shipped models are read here; a repository is only named, hub.py brings
it. Never imports huggingface_hub.

Knows nothing of what is inside the files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from medllm_pack import resources
from medllm_pack.errors import SourceError, UsageError, shown
from medllm_pack.home import expanded
from medllm_pack.weights.checkpoint import INDEX
from medllm_pack.weights.needed import (
    Role,
    check_names,
    check_small,
    is_small,
    listed,
    weight_names,
)

Kind = Literal["folder", "hub", "builtin"]

_BUILTIN = "builtin:"
_BOTH_FORMS = "give a folder such as ./model, or org/name[@revision] on the Hugging Face Hub"
# The Hub's rule for names (huggingface_hub, validate_repo_id), with the owner required.
_REPOSITORY = re.compile(
    r"(?!.*(?:--|\.\.))(?P<name>[A-Za-z0-9_][\w.\-]{0,95}/[A-Za-z0-9_][\w.\-]{0,95})"
    r"(?:@(?P<revision>[\w.][\w./\-]{0,254}))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where to read from; ``parse_source(str(x)) == x``.

    Attributes:
        kind: a folder of this machine, a repository, or a model that ships inside the package.
        name: ``org/name``, the shipped model's name, or the folder's last component.
        revision: branch, tag or commit as it was asked for; None for the default branch.
        folder: the absolute folder; None for a repository.
    """

    kind: Kind
    name: str
    revision: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        match self.kind:
            case "folder":
                return str(self.folder)
            case "builtin":
                return _BUILTIN + self.name
            case "hub":
                return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file that is here.

    Attributes:
        name: its name in the folder or repository.
        path: the regular file, links resolved.
        size: bytes.
        modified_ns: when it was modified, as the file system says.
        sha256: what the Hub states for these bytes; None where nothing is stated. A file that
            was downloaded now, or is small, has been compared with it. Weights that were already
            in the cache have not: whoever reads them hashes them anyway, and compares then.
    """

    name: str
    path: Path
    size: int
    modified_ns: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """What a source holds for us, on this machine.

    Attributes:
        source: ``org/name``, ``builtin:…``, or the last component of the folder.
        kind: as in :class:`Source`.
        revision: the commit, 40 hex digits; None unless it comes from the Hub.
        files: what is here, by name; top-level files only.
        folder: the folder that shows these files under their names.
        remote: weights that were left on the Hub, name to size.
    """

    source: str
    kind: Kind
    revision: str | None
    files: Mapping[str, LocalFile]
    folder: Path
    remote: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


# --- naming a source


def parse_source(text: str, *, relative_to: Path | None = None) -> Source:
    """Read SRC: a folder, ``org/name[@revision]``, or ``builtin:NAME``.

    What begins with ``.``, ``/`` or ``~`` is a folder, whether or not it exists; anything else is
    one if it exists, and a repository otherwise.

    Args:
        text: as the user or a recipe wrote it.
        relative_to: the folder that relative paths count from; the current one by default.

    Raises:
        UsageError: if it is none of these.
    """
    if text.startswith(_BUILTIN):
        return _builtin(text.removeprefix(_BUILTIN))
    if not text or "\0" in text:
        raise UsageError(f"{shown(text)} names no source: {_BOTH_FORMS}")
    path = _absolute(text, relative_to)
    if os.path.isfile(path):
        raise UsageError(f"{shown(text)} is a file; name the folder that it lies in")
    if text.startswith(("./", "../", "/", "~")) or text in {".", ".."} or os.path.isdir(path):
        return Source("folder", path.name or "/", folder=path)
    match = _REPOSITORY.fullmatch(text)
    if match is None or match["name"].endswith(".git") or not _is_revision(match["revision"]):
        raise UsageError(f"{shown(text)} is neither a folder nor a repository: {_BOTH_FORMS}")
    return Source("hub", match["name"], revision=match["revision"])


def _builtin(name: str) -> Source:
    if not re.fullmatch(r"[a-z0-9_\-]+(/[a-z0-9_\-]+)*", name):
        raise UsageError(f"{shown(_BUILTIN + name)} names no shipped model; {_BOTH_FORMS}")
    try:
        return Source("builtin", name, folder=resources.folder(f"examples/{name}"))
    except FileNotFoundError as error:
        raise UsageError(f"no model {shown(name)} is shipped; {_BOTH_FORMS}") from error


def _absolute(text: str, relative_to: Path | None) -> Path:
    path = Path.cwd() / (relative_to or "") / expanded(text)
    # A link keeps its name; behind "..", only the file system knows what the name is.
    return path.resolve() if ".." in path.parts and os.path.exists(path) else path


def _is_revision(revision: str | None) -> bool:
    # It becomes a path below refs/ in the cache.
    return revision is None or not (
        "//" in revision or revision.endswith("/") or any(p == "." for p in revision.split("/"))
    )


# --- a folder


def from_folder(source: Source, role: Role) -> LocalCopy:
    """Return the needed files of a folder or of a shipped model.

    Raises:
        SourceError: if one is missing, or cannot be read.
        CheckpointError: if the index of the shards is damaged.
    """
    folder, where = source.folder, shown(source.name)
    assert folder is not None
    try:
        names = frozenset(os.listdir(folder))
    except OSError as error:
        raise SourceError(
            f"the folder {shown(folder)} cannot be read: {error.strerror}; {_BOTH_FORMS}"
        ) from error
    check_names(names, role, where)
    found = {name: regular_file(folder / name) for name in names if is_small(name, role)}
    needed = weight_names(names, role, lambda name: regular_file(folder / name).path)
    if missing := sorted(set(needed) - names):
        raise SourceError(
            f"{where} lacks {listed(missing)}, which its {INDEX} names; copy the missing files"
        )
    found |= {name: regular_file(folder / name) for name in needed}
    return LocalCopy(
        source=str(source) if source.kind == "builtin" else source.name,
        kind=source.kind,
        revision=None,
        files=by_name(found.values()),
        folder=folder,
    )


def regular_file(path: Path, sha256: str | None = None) -> LocalFile:
    """Return the file at ``path``, links followed.

    Raises:
        SourceError: if it is none, or larger than a file of its name may be.
    """
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{shown(path.name)} cannot be read; it may be a dead link") from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{shown(path.name)} in {shown(path.parent.name)} is not a regular file")
    check_small(path.name, status.st_size)
    return LocalFile(path.name, real, status.st_size, status.st_mtime_ns, sha256)


def by_name(found: Collection[LocalFile]) -> Mapping[str, LocalFile]:
    """Return the files by name, in order."""
    return MappingProxyType({file.name: file for file in sorted(found, key=lambda f: f.name)})
