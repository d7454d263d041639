"""From a source to its files on this machine, if need be from the Hugging Face Hub.

A branch or tag is turned into its commit once; only the files that packing needs are brought, and
nothing but the cache is used where the Hub gives no answer. huggingface_hub is imported when a
repository is asked for.

Knows nothing of tensors, and leaves to download.py how a file comes over.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from medllm_pack.errors import SourceError
from medllm_pack.patience import Patience
from medllm_pack.progress import Reporter
from medllm_pack.weights.answers import HUB, Address
from medllm_pack.weights.cache import Cache, Item
from medllm_pack.weights.checkpoint import INDEX, SINGLE
from medllm_pack.weights.download import bring
from medllm_pack.weights.listing import UnreachableError, item_of, list_files
from medllm_pack.weights.needed import (
    Role,
    check_names,
    has_model,
    is_small,
    listed,
    weight_names,
)
from medllm_pack.weights.sources import LocalCopy, LocalFile, Source, by_name, from_folder


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
        source: from :func:`medllm_pack.weights.sources.parse_source`.
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
        return from_folder(source, role)
    repository = _Repository(
        source, role=role, report=report, cache=cache, endpoint=endpoint, patience=patience
    )
    if offline or repository.is_offline_mode():
        return repository.from_cache()
    try:
        return repository.from_hub(weights=weights)
    except UnreachableError as unreachable:
        return repository.from_cache(instead=unreachable)


class _Repository:
    """One repository, as the Hub has it and as the cache has it."""

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
        self.patience = patience or HUB
        self.address = Address(self.name, self.revision, self.endpoint)
        root = cache or Path(constants.HF_HUB_CACHE)
        self.cache = Cache(root, name=self.name, revision=self.revision)

    def is_offline_mode(self) -> bool:
        from huggingface_hub import constants

        return constants.HF_HUB_OFFLINE

    def from_hub(self, *, weights: bool) -> LocalCopy:
        """Bring what is needed. Small files come first: where weights are, all else is."""
        # With a complete cache to fall back on, a Hub that is down should cost no minute.
        hasty = replace(self.patience, tries=1)
        patience = hasty if self.cache.is_complete(self.role) else self.patience
        commit, listing = list_files(self.address, patience=patience)
        listing = {name: sibling for name, sibling in listing.items() if "/" not in name}
        check_names(listing, self.role, self.name)
        self.cache.remember(commit)
        small = [item_of(listing[name]) for name in sorted(listing) if is_small(name, self.role)]
        if has_model(self.role) and SINGLE not in listing:
            small.append(item_of(listing[INDEX]))
        found = self._bring(small, commit, "small files")
        names = weight_names(listing, self.role, lambda name: found[name].path)
        if missing := [name for name in names if name not in listing]:
            raise SourceError(
                f"{self.name} lacks {listed(missing)}, which its {INDEX} names; "
                "choose another revision or ask its author"
            )
        large = [item_of(listing[name]) for name in names if name not in found]
        if weights:
            found |= self._bring(large, commit, "weights")
        else:
            here = [item for item in large if self.cache.has(item, commit)]
            found |= {item.name: self.cache.take(item, commit) for item in here}
        remote = [item for item in large if item.name not in found]
        return self._copy(commit, found.values(), remote)

    def from_cache(self, *, instead: UnreachableError | None = None) -> LocalCopy:
        """Return what the cache has, if it is all that is needed.

        Args:
            instead: why the Hub is not asked, if it should have been.
        """
        commit, found, missing = self.cache.contents(self.role)
        if missing or commit is None:
            why = f"{instead}, and " if instead else ""
            what = f"its cache lacks {listed(missing)}" if commit else "nothing of it is cached"
            raise SourceError(
                f"{why}{self.name}@{self.revision} is not complete here: {what}. Connect once, or "
                "give a folder that holds the files"
            ) from instead
        if instead:
            self.report.notice(f"{instead}; using {self.name} at {commit[:12]} from the cache")
        return self._copy(commit, found, ())

    def _copy(
        self, commit: str, found: Collection[LocalFile], remote: Collection[Item]
    ) -> LocalCopy:
        return LocalCopy(
            source=self.name,
            kind="hub",
            revision=commit,
            files=by_name(found),
            folder=self.cache.snapshot(commit),
            remote=MappingProxyType({item.name: item.size for item in remote}),
        )

    def _bring(self, items: Sequence[Item], commit: str, what: str) -> dict[str, LocalFile]:
        return bring(
            items,
            commit,
            what=what,
            address=self.address,
            cache=self.cache,
            patience=self.patience,
            report=self.report,
        )
