"""A repository of a pack on the Hub, at one commit: names, digests, and files as they are needed.

Pinned when it is opened. What comes over goes through the Hub's cache. Writes nothing to the Hub.

Memory: the small files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError
from medllm_pack.ollama.image import Blob
from medllm_pack.pack.manifest import NAME as PACK_JSON
from medllm_pack.pack.manifest import Document
from medllm_pack.pack.shape import read_pack
from medllm_pack.pack.sums import SUMS, parse_sums
from medllm_pack.patience import Patience
from medllm_pack.progress import Reporter
from medllm_pack.publish.publication import NAME as RECORD
from medllm_pack.publish.publication import overrides_in
from medllm_pack.publish.targets import HubTarget
from medllm_pack.weights.answers import Address
from medllm_pack.weights.cache import Cache, Item
from medllm_pack.weights.download import bring
from medllm_pack.weights.listing import item_of, list_files
from medllm_pack.weights.needed import listed


class HubFiles:
    """A repository at one commit.

    Attributes:
        commit: the commit that the revision stood for when it was asked.
        address: the repository.
        report: listener.
        patience: how often and how long to try.
    """

    def __init__(
        self,
        target: HubTarget,
        report: Reporter,
        patience: Patience,
        cache: Path | None,
        endpoint: str | None,
    ) -> None:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise SourceError("HF_HUB_OFFLINE=1 forbids to ask the Hub; unset it, or use a bundle")
        revision = target.revision or constants.DEFAULT_REVISION
        self.report, self.patience = report, patience
        self.address = Address(
            target.repository, revision, (endpoint or constants.ENDPOINT).rstrip("/")
        )
        root = cache or Path(constants.HF_HUB_CACHE)
        self._cache = Cache(root, name=target.repository, revision=revision)
        self.commit, self._there = list_files(self.address, patience=patience)

    @property
    def names(self) -> tuple[str, ...]:
        """All files at the top of the repository."""
        return tuple(sorted(name for name in self._there if "/" not in name))

    def has(self, name: str) -> bool:
        """Say whether a file is there."""
        return name in self._there

    def item(self, name: str) -> Item:
        """Return a file as the Hub lists it."""
        return item_of(self._there[name])

    def require(self, names: Sequence[str]) -> None:
        """Raise SourceError if a file is missing."""
        if missing := sorted(name for name in names if name not in self._there):
            raise SourceError(
                f"{self.address.name} lacks {listed(missing)}, which its {SUMS} names; name "
                "another revision, or ask its author"
            )

    def manifest(self) -> tuple[Document, dict[str, Digest]]:
        """Return pack.json and the sums, checked against each other.

        Raises:
            SourceError: if the repository is no pack.
        """
        if lacking := [name for name in (PACK_JSON, SUMS) if name not in self._there]:
            raise SourceError(
                f"{self.address.name} has no {' and no '.join(lacking)}: it is not a pack. "
                "`hf download` fetches any repository"
            )
        paths = self.bring([PACK_JSON, SUMS])
        sums = parse_sums(files.read_small(paths[SUMS]), of=f"{SUMS} of {self.address.name}")
        checked(PACK_JSON, paths[PACK_JSON], sums.get(PACK_JSON))
        return read_pack(self._cache.snapshot(self.commit)), sums

    def overrides(self, sums: Mapping[str, Digest]) -> tuple[str, ...]:
        """Return what was accepted by name when this pack was published.

        Raises:
            SourceError: if the record of it cannot be understood.
        """
        if RECORD not in self._there or PACK_JSON not in sums:
            return ()
        path = self.bring([RECORD])[RECORD]
        return overrides_in(files.read_small(path), pack=sums[PACK_JSON])

    def check_stated(self, variant: Mapping[str, Any], sums: Mapping[str, Digest]) -> None:
        """Raise SourceError if sums, pack.json and the Hub do not state the same weights."""
        name = variant["file"]
        item, digest = self.item(name), sums.get(name)
        stated = variant["sha256"]
        agree = {stated, item.sha256 or stated, digest.hex if digest else ""} == {stated}
        if not agree or item.size != variant["size"]:
            raise SourceError(
                f"{name} of {self.address.name} is not the file that its pack.json and {SUMS} "
                "describe; name another revision, or ask its author"
            )

    def bring(self, names: Sequence[str], what: str = "papers") -> dict[str, Path]:
        """Return files by name, after downloading what is not here."""
        items = [self.item(name) for name in names]
        local = bring(
            items,
            self.commit,
            what=what,
            address=self.address,
            cache=self._cache,
            patience=self.patience,
            report=self.report,
        )
        return {name: file.path for name, file in local.items()}

    def weights(self, name: str, digest: Digest) -> Blob:
        """Return a file of weights, whose bytes have been compared with its digest."""
        item = self.item(name)
        known = self._cache.has(item, self.commit)
        path = self.bring([name], name)[name]
        # What came over now had the Hub's digest, and that was compared; all else is read again.
        if known or item.sha256 is None:
            self.report.step(f"checking {name}", total_bytes=item.size)
            if files.sha256(path, advance=self.report.advance) != digest.hex:
                raise SourceError(
                    f"{name} in the Hub cache is damaged; remove {path} and pull again"
                )
        return Blob("", digest, item.size, path)


def checked(name: str, path: Path, digest: Digest | None) -> Blob:
    """Return a small file; compared with its sum, if it has one.

    Raises:
        SourceError: if it is another one.
    """
    blob = Blob.of(files.read_small(path), "")
    if digest is not None and blob.digest != digest:
        raise SourceError(
            f"{name} is not what {SUMS} says; the repository was changed after it was "
            "published, name another revision"
        )
    return blob
