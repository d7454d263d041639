"""The reference's logits, kept from one check to the next: a sixth variant computes nothing anew.

One file a sequence, float32 as it was computed: ``KEY-DIGEST.npy``, where KEY stands for the
inputs, the libraries, this code, the device and the ids, and DIGEST for the file's bytes, which are
compared before they are believed. A text of 256 ids and 32000 pieces takes 33 MB. Whoever checks
texts of users uses no cache: what follows from them must not stay behind.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medllm_pack import files
from medllm_pack.home import home
from medllm_pack.parity import original, reference, whole

LIMIT = 2 << 30  # bytes; the oldest files go first
_LIBRARIES = ("torch", "transformers", "peft", "numpy", "safetensors")

Sequences = Sequence[Sequence[int]]
Compute = Callable[[Sequences], list[Path]]


def folder() -> Path:
    """Return where the cache is: ``MEDLLM_CACHE``, or medllm-pack in ``XDG_CACHE_HOME``."""
    if own := os.environ.get("MEDLLM_CACHE"):
        return Path(own) / "parity"
    base = os.environ.get("XDG_CACHE_HOME") or home() / ".cache"
    return Path(base) / "medllm-pack" / "parity"


def model_key(manifest: Mapping[str, Any], way: Mapping[str, str]) -> str:
    """Return what decides the reference's logits beside the ids: inputs, libraries, code, way.

    Another device, or the model in one piece, gives the same logits up to float32's noise. That is
    nothing to a verdict; but parity.json says where the reference was computed, and who looks at a
    device, or at two of them, must not be shown what another one computed.
    """
    inputs = [
        [entry["role"], sorted([file["name"], file["sha256"]] for file in entry["files"])]
        for entry in manifest["inputs"]
    ]
    code = [files.sha256(Path(str(module.__file__))) for module in (original, reference, whole)]
    libraries = {name: version(name) for name in _LIBRARIES}
    return _digest({"inputs": inputs, "code": code, "libraries": libraries, "way": dict(way)})


class Cache:
    """Logits of sequences for one model.

    Args:
        place: folder of the cache.
        key: returns what :func:`model_key` does. It is asked again after computing, since that may
            have gone another way than the one that was planned.
        limit: bytes that the cache may take.
    """

    def __init__(self, place: Path, key: Callable[[], str], *, limit: int = LIMIT) -> None:
        self.place, self.key, self.limit = place, key, limit

    def logits(self, sequences: Sequences, compute: Compute) -> list[Path]:
        """Return the files of all sequences; only those that are not there are computed.

        The files of the cache may be read while the caller is inside :meth:`used`.
        """
        names = self._names(sequences)
        found = {name: path for name in set(names) if (path := self._find(name))}
        missing = [i for i, name in enumerate(names) if name not in found]
        computed = compute([sequences[i] for i in missing]) if missing else []
        kept = self._names([sequences[i] for i in missing])
        fits = self._room() >= sum(path.stat().st_size for path in computed)
        for i, name, path in zip(missing, kept, computed, strict=True):
            found[names[i]] = self._keep(name, path) if fits else path
        return [found[name] for name in names]

    def _names(self, sequences: Sequences) -> list[str]:
        key = self.key()
        return [_digest({"model": key, "ids": list(ids)}) for ids in sequences]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Trim the cache, unless another reads it, and let nobody trim it until the block ends.

        Raises:
            WriteError: if there can be none.
        """
        elsewhere = "another folder with MEDLLM_CACHE, or --no-cache"
        with files.translated(self.place, what="the cache", elsewhere=elsewhere):
            self.place.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.place / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            self._trim(lock)
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield
        finally:
            os.close(lock)

    def _trim(self, lock: int) -> None:
        """Remove what was used longest ago until half is free; not while others read."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for partial in self.place.glob(".*.partial"):
            partial.unlink()
        by_age = sorted(self.place.glob("*.npy"), key=lambda path: path.stat().st_mtime)
        for path in by_age:
            if self._room() >= self.limit // 2:
                return
            path.unlink()

    def _room(self) -> int:
        return self.limit - sum(path.stat().st_size for path in self.place.glob("*.npy"))

    def _find(self, name: str) -> Path | None:
        """Return the file of a sequence if its bytes are those that were written."""
        for path in self.place.glob(f"{name}-*.npy"):
            if files.sha256(path) == path.stem.rpartition("-")[2]:
                os.utime(path)
                return path
            path.unlink(missing_ok=True)
        return None

    def _keep(self, name: str, path: Path) -> Path:
        """Copy a file into the cache; it is there under its name as a whole or not at all."""
        target = self.place / f"{name}-{files.sha256(path)}.npy"
        partial = self.place / f".{secrets.token_hex(8)}.partial"
        try:
            partial.write_bytes(path.read_bytes())
            os.replace(partial, target)
        except OSError:  # a full disk is no reason to lose a check
            partial.unlink(missing_ok=True)
            return path
        return target


def _digest(value: Any) -> str:
    return sha256(files.canonical_json(value).encode()).hexdigest()
