"""Where weights come from: a folder, a shipped model, or a repository on the Hugging Face Hub.

The only user of huggingface_hub for reading. A branch or tag is turned into its commit once; only
the files that packing needs are brought, into the cache that all Hub tools share, so that what
one has downloaded the other need not. Pickles are never opened, not even downloaded.

Downloads go through the Hub library's connection but not through its download function: that one
starts again after the process was killed, and checks no digest. Here a partial file is named after
the digest of the whole; whoever finds it continues it, and it takes its place in the cache only
when its bytes have that digest.

Knows nothing of tensors. Memory: one network buffer.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urljoin, urlsplit

from medllm_pack import __version__, files, resources
from medllm_pack.errors import MedllmError, SourceError, UsageError, shown
from medllm_pack.progress import Reporter
from medllm_pack.weights import lora
from medllm_pack.weights.safetensors import INDEX, SINGLE, read_index

# huggingface_hub takes a third of a second to import; folders do without it.
if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub.errors import HfHubHTTPError

Kind = Literal["folder", "hub", "builtin"]
Role = Literal["base", "merged", "adapter"]

_BUILTIN = "builtin:"
_BOTH_FORMS = "give a folder such as ./model, or org/name[@revision] on the Hugging Face Hub"
# The Hub's rule for names (huggingface_hub, validate_repo_id), with the owner required.
_REPOSITORY = re.compile(
    r"(?!.*(?:--|\.\.))(?P<name>[A-Za-z0-9_][\w.\-]{0,95}/[A-Za-z0-9_][\w.\-]{0,95})"
    r"(?:@(?P<revision>[\w.][\w./\-]{0,254}))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git blob SHA-1, or SHA-256 of a large file

_CONFIG = "config.json"
_SMALL = frozenset(
    {
        _CONFIG, "generation_config.json", "tokenizer.model", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "README.md",
    }
)  # fmt: skip
_LEGAL = ("license", "licence", "notice", "use_policy")
_SMALL_LIMIT = 16 << 20  # what files.read_small accepts
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_LISTED = 6  # names in a message

_HASH_CHUNK = 4 << 20
_MAX_REDIRECTS = 5
_PASSING = frozenset({408, 429, 500, 502, 503, 504})  # statuses worth another try


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
        sha256: what the Hub states for these bytes; None where nothing is stated. A file that
            was downloaded now, or is small, has been compared with it. Weights that were already
            in the cache have not: whoever reads them hashes them anyway, and compares then.
    """

    name: str
    path: Path
    size: int
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


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to insist.

    Attributes:
        tries: failures in a row, without one new byte, after which a download is given up.
        first_wait_s: pause after the first failure; it doubles with each further one.
        longest_wait_s: bound of the pause, also where the server asks for more.
        stall_s: silence after which a connection counts as dead.
    """

    tries: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    stall_s: float = 30.0

    def wait(self, failures: int, asked_s: float = 0.0) -> None:
        """Sleep before the next try."""
        pause = max(self.first_wait_s * 2.0 ** max(failures - 1, 0), asked_s)
        time.sleep(min(pause, self.longest_wait_s))


class _UnreachableError(SourceError):
    """The Hub gave no answer; the cache may still have one."""


class _TryAgainError(Exception):
    """An answer that another try may better."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


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
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UsageError(f"{shown(text)} names a home folder that does not exist") from error
    path = Path.cwd() / (relative_to or "") / path
    # A link keeps its name; behind "..", only the file system knows what the name is.
    return path.resolve() if ".." in path.parts and os.path.exists(path) else path


def _is_revision(revision: str | None) -> bool:
    # It becomes a path below refs/ in the cache.
    return revision is None or not (
        "//" in revision or revision.endswith("/") or any(p == "." for p in revision.split("/"))
    )


# --- bringing it here


def fetch(
    source: Source,
    *,
    role: Role,
    report: Reporter,
    cache: Path | None = None,
    offline: bool = False,
    weights: bool = True,
    endpoint: str | None = None,
    patience: Patience | None = None,
) -> LocalCopy:
    """Return the files of ``source`` that packing needs, downloading what is not here yet.

    Args:
        source: from :func:`parse_source`.
        role: what the files are to be; decides which are needed.
        report: told of downloads, bytes counted once.
        cache: the Hub cache; by default the one of all Hub tools (HF_HOME, HF_HUB_CACHE).
        offline: use the cache alone, as HF_HUB_OFFLINE=1 does.
        weights: whether to bring the weight files; otherwise those that are not here yet are
            named in ``remote``.
        endpoint: address of the Hub; by default HF_ENDPOINT, or huggingface.co.
        patience: how often and how long to try.

    Raises:
        SourceError: if a file is missing, refused, damaged, or cannot be brought.
        CheckpointError: if the index of the shards is damaged.
    """
    if source.kind != "hub":
        return _from_folder(source, role)
    repository = _Repository(
        source, role=role, report=report, cache=cache, endpoint=endpoint, patience=patience
    )
    if offline or repository.is_offline_mode():
        return repository.from_cache()
    try:
        return repository.from_hub(weights=weights)
    except _UnreachableError as unreachable:
        return repository.from_cache(instead=unreachable)


def _from_folder(source: Source, role: Role) -> LocalCopy:
    folder, where = source.folder, shown(source.name)
    assert folder is not None
    try:
        names = frozenset(os.listdir(folder))
    except OSError as error:
        raise SourceError(
            f"the folder {shown(folder)} cannot be read: {error.strerror}; {_BOTH_FORMS}"
        ) from error
    _check_names(names, role, where)
    found = {name: _regular(folder / name) for name in names if _is_small(name, role)}
    needed = _weight_names(names, role, where, lambda name: _regular(folder / name).path)
    if missing := sorted(set(needed) - names):
        raise SourceError(
            f"{where} lacks {_listed(missing)}, which its {INDEX} names; copy the missing files"
        )
    found |= {name: _regular(folder / name) for name in needed}
    return LocalCopy(
        source=str(source) if source.kind == "builtin" else source.name,
        kind=source.kind,
        revision=None,
        files=_by_name(found.values()),
        folder=folder,
    )


def _regular(path: Path, sha256: str | None = None) -> LocalFile:
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{shown(path.name)} cannot be read; it may be a dead link") from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{shown(path.name)} in {shown(path.parent.name)} is not a regular file")
    _check_small(path.name, status.st_size)
    return LocalFile(path.name, real, status.st_size, sha256)


def _by_name(found: Collection[LocalFile]) -> Mapping[str, LocalFile]:
    return MappingProxyType({file.name: file for file in sorted(found, key=lambda f: f.name)})


# --- which files


def _is_small(name: str, role: Role) -> bool:
    """Say whether a file other than the weights is needed."""
    if name == lora.CONFIG:
        return role == "adapter"
    if name in _SMALL:
        return True
    return name.lower().startswith(_LEGAL) and _is_plain(name)


def _is_plain(name: str) -> bool:
    return name.isprintable() and not set(name) & set("/\\:") and len(name.encode()) <= 255


def _check_small(name: str, size: int) -> None:
    if not name.endswith(".safetensors") and size > _SMALL_LIMIT:
        raise SourceError(
            f"{shown(name)} has {size:,} bytes; at most {_SMALL_LIMIT:,} are read from such a file"
        )


def _check_names(names: Collection[str], role: Role, where: str) -> None:
    """Refuse what can be refused from the names alone, before anything is downloaded."""
    has_adapter, has_model = lora.WEIGHTS in names, SINGLE in names or INDEX in names
    if role == "adapter" and not has_adapter:
        if has_model:
            raise SourceError(f"{where} is a whole model, no adapter; use --merged or --base")
        raise _no_weights(names, where, lora.WEIGHTS)
    if role != "adapter" and not has_model:
        if has_adapter:
            raise SourceError(f"{where} is an adapter, no whole model; use --adapter")
        raise _no_weights(names, where, f"{SINGLE} nor {INDEX}")
    config = lora.CONFIG if role == "adapter" else _CONFIG
    if config not in names:
        raise SourceError(f"{where} has no {config}; without it the weights cannot be understood")


def _no_weights(names: Collection[str], where: str, wanted: str) -> SourceError:
    pickles = sorted(
        name
        for name in names
        if name.lower().endswith(_PICKLES) and not name.startswith(_TRAINING_STATE)
    )
    if pickles:
        return SourceError(
            f"{where} has its weights only as pickle: {_listed(pickles)}. Pickles can run code and "
            "are never opened; ask its author for safetensors, or convert them where nothing can "
            "be harmed (transformers: save_pretrained with safe_serialization)"
        )
    neither = "neither " if " nor " in wanted else "no "
    return SourceError(f"{where} has {neither}{wanted}; it holds {_listed(sorted(names))}")


def _weight_names(
    names: Collection[str], role: Role, where: str, path_of: Callable[[str], Path]
) -> tuple[str, ...]:
    """Return the index, if there is one, and the weight files; they may not all exist."""
    if role == "adapter":
        return (lora.WEIGHTS,)
    # The order of transformers: the single file wins, and the shards beside it are left alone.
    if SINGLE in names:
        return (SINGLE,)
    return (INDEX, *sorted(set(read_index(path_of(INDEX)).values())))


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(shown(name) for name in names[:_LISTED]) or "nothing") + rest


# --- the Hub


@dataclass(frozen=True, slots=True)
class _Item:
    """A file as the Hub lists it. Its digest is also its name in the cache."""

    name: str
    size: int
    digest: str

    @property
    def sha256(self) -> str | None:
        return self.digest if len(self.digest) == 64 else None

    def hasher(self) -> Any:
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
        if self.size > _SMALL_LIMIT or self.name.endswith(".safetensors"):
            return True
        digest = self.hasher()
        digest.update(path.read_bytes())
        return bool(digest.hexdigest() == self.digest)


class _Repository:
    """One repository, as the Hub has it and as the cache has it.

    The cache is laid out as all Hub tools lay it out: ``blobs/DIGEST`` holds bytes,
    ``snapshots/COMMIT/NAME`` links to them, ``refs/REVISION`` names a commit.
    """

    def __init__(
        self,
        source: Source,
        *,
        role: Role,
        report: Reporter,
        cache: Path | None,
        endpoint: str | None,
        patience: Patience | None,
    ) -> None:
        from huggingface_hub import constants

        self.name = source.name
        self.revision = source.revision or constants.DEFAULT_REVISION
        self.role = role
        self.report = report
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.patience = patience or Patience()
        root = cache or Path(constants.HF_HUB_CACHE)
        self.folder = root / f"models--{self.name.replace('/', '--')}"

    def is_offline_mode(self) -> bool:
        from huggingface_hub import constants

        return constants.HF_HUB_OFFLINE

    def from_hub(self, *, weights: bool) -> LocalCopy:
        """Bring what is needed. Small files come first: where weights are, all else is."""
        commit, listing = self._listing()
        _check_names(listing, self.role, self.name)
        self._remember(commit)
        small = [_item(listing[name]) for name in sorted(listing) if _is_small(name, self.role)]
        if self.role != "adapter" and SINGLE not in listing:
            small.append(_item(listing[INDEX]))
        found = self._bring(small, commit, "small files")
        names = _weight_names(listing, self.role, self.name, lambda name: found[name].path)
        if missing := [name for name in names if name not in listing]:
            raise SourceError(
                f"{self.name} lacks {_listed(missing)}, which its {INDEX} names; "
                "choose another revision or ask its author"
            )
        large = [_item(listing[name]) for name in names if name not in found]
        if weights:
            found |= self._bring(large, commit, "weights")
        else:
            found |= {i.name: self._here(i, commit) for i in large if self._is_here(i, commit)}
        remote = [item for item in large if item.name not in found]
        return self._copy(commit, found.values(), remote)

    def from_cache(self, *, instead: _UnreachableError | None = None) -> LocalCopy:
        """Return what the cache has, if it is all that is needed.

        Args:
            instead: why the Hub is not asked, if it should have been.
        """
        commit, found, missing = self._cached()
        if missing or commit is None:
            why = f"{instead}, and " if instead else ""
            what = f"its cache lacks {_listed(missing)}" if commit else "nothing of it is cached"
            raise SourceError(
                f"{why}{self.name}@{self.revision} is not complete here: {what}. Connect once, or "
                "give a folder that holds the files"
            ) from instead
        if instead:
            self.report.notice(f"{instead}; using {self.name} at {commit[:12]} from the cache")
        return self._copy(commit, found, ())

    def _copy(
        self, commit: str, found: Collection[LocalFile], remote: Collection[_Item]
    ) -> LocalCopy:
        return LocalCopy(
            source=self.name,
            kind="hub",
            revision=commit,
            files=_by_name(found),
            folder=self._snapshot(commit),
            remote=MappingProxyType({item.name: item.size for item in remote}),
        )

    # - what the Hub says

    def _listing(self) -> tuple[str, Mapping[str, Any]]:
        """Return the commit and its top-level files, in one request."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(endpoint=self.endpoint, library_name="medllm-pack", library_version=__version__)
        # With a complete cache to fall back on, a Hub that is down should cost no minute.
        tries = 1 if self._is_cached() else self.patience.tries
        for failures in range(1, tries + 1):
            wait_s = 0.0
            cause: Exception
            try:
                info = api.model_info(
                    self.name,
                    revision=self.revision,
                    files_metadata=True,
                    timeout=self.patience.stall_s,
                )
                break
            except HfHubHTTPError as error:
                if error.response.status_code not in _PASSING:
                    raise self._explained(error) from error
                wait_s, problem, cause = _retry_after(error.response), _status(error), error
            except _network_error() as error:
                problem, cause = _told(error), error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._no_hub() from error
            if failures < tries:
                self.patience.wait(failures, wait_s)
        else:
            raise _UnreachableError(f"{self._host} is not reachable ({problem})") from cause
        if not _COMMIT.fullmatch(info.sha or ""):
            raise self._no_hub()
        return str(info.sha), {
            sibling.rfilename: sibling
            for sibling in info.siblings or ()
            if "/" not in sibling.rfilename
        }

    @property
    def _host(self) -> str:
        return urlsplit(self.endpoint).hostname or self.endpoint

    def _no_hub(self) -> SourceError:
        return SourceError(
            f"what answers at {shown(self.endpoint)} is no Hugging Face Hub; check HF_ENDPOINT, "
            "and whether the network wants a login page to be visited first"
        )

    def _explained(self, error: HfHubHTTPError, file: str = "") -> SourceError:
        """Say what an answer means and what to do, by the library's class, then by status."""
        status = error.response.status_code
        for cls in type(error).__mro__:
            if meaning := _MEANINGS.get((cls.__name__, status)) or _MEANINGS.get(cls.__name__):
                break
        else:
            meaning = _MEANINGS.get(status, "the Hub answers {status} for {repo}; try again later")
        return SourceError(
            meaning.format(
                repo=self.name,
                page=f"https://huggingface.co/{self.name}",
                revision=shown(self.revision),
                file=shown(file),
                status=status,
            )
        )

    # - what the cache holds

    def _snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def _blob(self, item: _Item) -> Path:
        return self.folder / "blobs" / item.digest

    def _part(self, item: _Item) -> Path:
        # `hf cache prune` knows this ending and removes what is never continued.
        return self.folder / "blobs" / f"{item.digest}.medllm-pack.incomplete"

    def _is_here(self, item: _Item, commit: str) -> bool:
        return item.is_at(self._snapshot(commit) / item.name) or item.is_at(self._blob(item))

    def _here(self, item: _Item, commit: str) -> LocalFile:
        """Return a file that is here, linked under its name."""
        pointer = self._snapshot(commit) / item.name
        if not item.is_at(pointer):
            with self._writing():
                _link(pointer, f"../../blobs/{item.digest}")
        return _regular(pointer, item.sha256)

    def _cached(self) -> tuple[str | None, Collection[LocalFile], list[str]]:
        """Return the commit that the revision stood for, its good files, and what is missing."""
        commit = self._remembered()
        if commit is None or not self._snapshot(commit).is_dir():
            return None, (), []
        names = os.listdir(self._snapshot(commit))
        found = {
            name: file
            for name in names
            if (_is_small(name, self.role) or name.endswith((".safetensors", INDEX)))
            and (file := self._cached_file(commit, name))
        }
        config = lora.CONFIG if self.role == "adapter" else _CONFIG
        if self.role != "adapter" and SINGLE not in found and INDEX not in found:
            return commit, (), sorted({config} - found.keys()) + [f"{SINGLE} (or {INDEX})"]
        needed = _weight_names(found, self.role, self.name, lambda name: found[name].path)
        kept = [found[name] for name in found if _is_small(name, self.role) or name in needed]
        return commit, kept, sorted({config, *needed} - found.keys())

    def _cached_file(self, commit: str, name: str) -> LocalFile | None:
        pointer = self._snapshot(commit) / name
        # The link names the digest. Not its resolved target: that may be in a store of other names.
        target = os.path.basename(os.readlink(pointer)) if pointer.is_symlink() else ""
        if not pointer.is_file():
            return None
        if not _DIGEST.fullmatch(target):
            return _regular(pointer)
        item = _Item(name, pointer.stat().st_size, target)
        return _regular(pointer, item.sha256) if item.is_at(pointer) else None

    def _is_cached(self) -> bool:
        try:
            commit, _, missing = self._cached()
        except MedllmError:  # damaged; the Hub has it whole
            return False
        return commit is not None and not missing

    def _remembered(self) -> str | None:
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            commit = files.read_small(self.folder / "refs" / self.revision).decode().strip()
        except (SourceError, UnicodeDecodeError):
            return None
        return commit if _COMMIT.fullmatch(commit) else None

    def _remember(self, commit: str) -> None:
        if commit in {self.revision, self._remembered()}:
            return
        ref = self.folder / "refs" / self.revision
        with self._writing():
            ref.parent.mkdir(parents=True, exist_ok=True)
            beside = ref.with_name(f"{ref.name}.{secrets.token_hex(4)}.tmp")
            beside.write_text(commit)
            os.replace(beside, ref)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SourceError(
                f"the Hub cache {shown(self.folder.parent)} cannot be written: {error.strerror}; "
                "free some space, or set HF_HOME to a folder on another disk. What has been "
                "downloaded is kept and will be continued"
            ) from error

    # - from there to here

    def _bring(self, items: Sequence[_Item], commit: str, what: str) -> dict[str, LocalFile]:
        missing = [item for item in items if not self._is_here(item, commit)]
        if missing:
            self._check_space(missing)
            total = sum(item.size for item in missing)
            self.report.step(f"download {self.name}: {what}", total_bytes=total)
            for item in missing:
                self._download(item, commit)
        return {item.name: self._here(item, commit) for item in items}

    def _check_space(self, items: Sequence[_Item]) -> None:
        parts = [self._part(item) for item in items]
        have = sum(part.stat().st_size for part in parts if part.exists())
        needed, free = sum(item.size for item in items) - have, files.disk_free(self.folder)
        if needed > free:
            raise SourceError(
                f"{self.name} needs {needed:,} more bytes and the disk of the Hub cache "
                f"{shown(self.folder.parent)} has {free:,} free; free some space, or set HF_HOME "
                "to a folder on another disk"
            )

    def _download(self, item: _Item, commit: str) -> None:
        with self._writing():
            self._blob(item).parent.mkdir(parents=True, exist_ok=True)
            part = _Part(self._part(item), item, self.report)
        try:
            if item.is_at(self._blob(item)):  # another process was faster
                part.discard()
                self.report.advance(item.size - part.furthest)
                return
            self._transfer(item, commit, part)
            if part.digest() != item.digest:
                part.discard()
                raise SourceError(
                    f"{shown(item.name)} of {self.name} arrived with the digest {part.digest()}; "
                    f"the Hub states {item.digest}. Nothing of it was kept; try again, and suspect "
                    "what lies between you and the Hub if it happens again"
                )
            with self._writing():
                part.become(self._blob(item))
        finally:
            part.close()

    def _transfer(self, item: _Item, commit: str, part: _Part) -> None:
        """Stream until the part is full; every try asks the Hub for a fresh address."""
        from huggingface_hub.errors import HfHubHTTPError

        failures = 0
        while part.offset < item.size:
            before, wait_s = part.furthest, 0.0
            cause: Exception | None = None
            try:
                self._stream(item, commit, part)
                problem = "the connection ended early"
            except _TryAgainError as error:
                problem, wait_s, cause = str(error), error.wait_s, error
            except HfHubHTTPError as error:
                raise self._explained(error, item.name) from error
            except _network_error() as error:
                problem, cause = _told(error), error
            if part.offset == item.size:
                return
            failures = 1 if part.furthest > before else failures + 1
            if failures >= self.patience.tries:
                raise SourceError(
                    f"{shown(item.name)} of {self.name} stops at byte {part.offset:,} of "
                    f"{item.size:,} ({problem}); what has arrived is kept. Run the same command "
                    "again to continue"
                ) from cause
            self.patience.wait(failures, wait_s)

    def _stream(self, item: _Item, commit: str, part: _Part) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
            build_hf_headers,
            get_session,
        )

        url = hf_hub_url(self.name, item.name, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="medllm-pack", library_version=__version__)
        headers["Accept-Encoding"] = "identity"  # ranges count bytes of the file
        if part.offset:
            headers["Range"] = f"bytes={part.offset}-"
        home = _origin(url)
        for _ in range(_MAX_REDIRECTS + 1):
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=False, timeout=self.patience.stall_s
            ) as response:
                at_home = _origin(url) == home
                if at_home:
                    self._check_announced(item, response)
                if not response.has_redirect_location:
                    self._check_status(response, part, at_home=at_home)
                    for chunk in response.iter_bytes():
                        with self._writing():
                            part.write(chunk)
                    return
                url = self._redirected(url, response.headers["Location"])
            if _origin(url) != home:
                headers.pop("authorization", None)  # for good, even if the next hop leads home
        raise SourceError(f"{self._host} sends {shown(item.name)} in circles; try again later")

    def _redirected(self, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
            scheme = _origin(target)[0]
        except ValueError:
            scheme = ""
        if scheme not in {"http", "https"} or (scheme, urlsplit(url).scheme) == ("http", "https"):
            raise SourceError(
                f"{self._host} redirects to an address that is refused: only http and https are "
                "followed, and https is never left. Check HF_ENDPOINT and the proxy settings"
            )
        return target

    def _check_announced(self, item: _Item, response: Response) -> None:
        if not (response.is_success or response.has_redirect_location):
            return
        # X-Linked-Etag describes the file behind a redirect; a bare ETag only the answer itself.
        plain = None if response.has_redirect_location else response.headers.get("ETag")
        etag = (response.headers.get("X-Linked-Etag") or plain or "").removeprefix("W/").strip('"')
        comparable = _DIGEST.fullmatch(etag) and len(etag) == len(item.digest)
        if comparable and etag != item.digest:
            raise SourceError(
                f"the Hub announces {shown(item.name)} of {self.name} with the digest {etag}, "
                f"its listing says {item.digest}; try again later"
            )

    def _check_status(self, response: Response, part: _Part, *, at_home: bool) -> None:
        """Place the part where the answer begins, or raise."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status = response.status_code
        if status == 206:
            if not _continues(response, part):
                part.restart()
                raise _TryAgainError("the server sent another range than it was asked for")
        elif status == 200:
            part.restart()
        elif status == 416:
            part.restart()
            raise _TryAgainError("the server refused the range")
        elif status in _PASSING or not at_home:
            # Behind the Hub, 403 is an address that expired; the next try gets a fresh one.
            raise _TryAgainError(
                f"{response.url.host} answered {status}", wait_s=_retry_after(response)
            )
        else:
            hf_raise_for_status(response)
            raise _TryAgainError(f"{response.url.host} answered {status}")


_MEANINGS: Mapping[Any, str] = {
    ("GatedRepoError", 403): "your account has no access to the gated repository {repo} yet: ask "
    "for it at {page}, and use a token of that account (`hf auth login`)",
    "GatedRepoError": "{repo} is gated: accept its conditions at {page}, log in with "
    "`hf auth login`, and try again",
    "RepositoryNotFoundError": "{repo} is not on the Hub, or it is private: check the name; if it "
    "is private, log in with `hf auth login`",
    "RevisionNotFoundError": "{repo} has no revision {revision}; {page}/commits lists them",
    "EntryNotFoundError": "{repo} lists {file} at {revision} but does not serve it; try again "
    "later or name another revision",
    "DisabledRepoError": "{repo} has been disabled on the Hub; {page} may say why",
    401: "the Hub does not accept your token: log in again with `hf auth login`, or unset HF_TOKEN",
    403: "your token may not read {repo}: allow it at https://huggingface.co/settings/tokens",
}


def _item(sibling: Any) -> _Item:
    """Take what the Hub lists for a file, trusting none of it as a path."""
    lfs = sibling.lfs
    size, digest = (lfs.size, lfs.sha256) if lfs else (sibling.size, sibling.blob_id)
    if type(size) is not int or size < 0 or not _DIGEST.fullmatch(str(digest)):
        raise SourceError(
            f"the Hub states no size and digest for {shown(sibling.rfilename)}; if HF_ENDPOINT "
            "names a mirror, use huggingface.co or a folder"
        )
    _check_small(sibling.rfilename, size)
    return _Item(sibling.rfilename, size, str(digest))


def _network_error() -> tuple[type[Exception], ...]:
    """Return the errors of the HTTP library that the Hub library is built on.

    Which library that is changed between its major versions (httpx, httpx2).
    """
    from huggingface_hub.errors import HfHubHTTPError

    library = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    return library.HTTPError, library.InvalidURL


def _told(error: Exception) -> str:
    # Not the error's text: it may hold an address with a signature in it.
    name = type(error).__name__
    return "no answer in time" if name.endswith("Timeout") else f"network error: {name}"


def _status(error: HfHubHTTPError) -> str:
    return f"it answers {error.response.status_code}"


def _retry_after(response: Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default


def _continues(response: Response, part: _Part) -> bool:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (
        match is not None
        and int(match[1]) == part.offset
        and match[2] in {"*", str(part.item.size)}
    )


def _link(pointer: Path, target: str) -> None:
    pointer.parent.mkdir(parents=True, exist_ok=True)
    beside = pointer.with_name(f".{secrets.token_hex(4)}.link")
    os.symlink(target, beside)
    os.replace(beside, pointer)


class _Part:
    """A file on its way. Named after the digest of the whole, so that anyone may continue it.

    The lock saves the work of two processes that want the same file; it carries no correctness,
    because some network file systems grant it to everybody. Two that write at once write the same
    bytes to the same places: nothing is appended, nothing is cut off.
    """

    def __init__(self, path: Path, item: _Item, report: Reporter) -> None:
        self.path, self.item, self._report = path, item, report
        self._fd = self._open()
        self.furthest = 0
        self.restart()
        try:
            self._take_up()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(self.path, flags, 0o666)
            self._lock(fd)
            try:
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)  # who held the lock has finished it or thrown it away

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._report.notice(f"waiting: another process downloads {shown(self.item.name)}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks on this file system

    def _take_up(self) -> None:
        """Hash what an earlier run has left; the digest of the whole judges it later."""
        left = min(os.fstat(self._fd).st_size, self.item.size)
        while chunk := os.pread(self._fd, min(_HASH_CHUNK, left - self.offset), self.offset):
            self._hash.update(chunk)
            self._advance(len(chunk))

    def restart(self) -> None:
        """Go back to the first byte."""
        self.offset = 0
        self._hash = self.item.hasher()

    def write(self, chunk: bytes) -> None:
        """Add bytes.

        Raises:
            SourceError: if they are more than the file may have.
        """
        if self.offset + len(chunk) > self.item.size:
            self.discard()
            raise SourceError(
                f"the server sends more than the {self.item.size:,} bytes of "
                f"{shown(self.item.name)}; nothing of it was kept. Try again"
            )
        view = memoryview(chunk)
        while view:
            n = os.pwrite(self._fd, view, self.offset)
            self._hash.update(view[:n])
            self._advance(n)
            view = view[n:]

    def _advance(self, n_bytes: int) -> None:
        self.offset += n_bytes
        if self.offset > self.furthest:
            self._report.advance(self.offset - self.furthest)
            self.furthest = self.offset

    def digest(self) -> str:
        """Return the digest of what has been written."""
        return str(self._hash.hexdigest())

    def become(self, blob: Path) -> None:
        """Sync, and take the place in the cache."""
        os.ftruncate(self._fd, self.item.size)
        os.fsync(self._fd)
        try:
            os.replace(self.path, blob)
        except FileNotFoundError:
            if not self.item.is_at(blob):  # the same bytes, written by both
                raise

    def discard(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the descriptor and the lock back."""
        os.close(self._fd)
