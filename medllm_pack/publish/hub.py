"""A release to the Hugging Face Hub: everything in one commit, read back by its digests.

What is there already is not sent. The commit names its parent: whoever commits meanwhile wins, and
nothing is mixed. The token is the Hub library's; it is never seen here. Which files a release has
there is in hub_content.py.

Memory: the small files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from medllm_pack import __version__
from medllm_pack.errors import (
    CheckFailedError,
    SourceError,
    TransferError,
    UsageError,
)
from medllm_pack.ollama.image import Blob
from medllm_pack.pack.sums import SIGNATURE
from medllm_pack.patience import Patience
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish.hub_content import is_same, refuse_a_mixture, wanted_files
from medllm_pack.publish.hub_library import library, translated
from medllm_pack.publish.hub_upload import Upload
from medllm_pack.publish.release import Release
from medllm_pack.publish.targets import HubTarget
from medllm_pack.weights.answers import HUB, Address
from medllm_pack.weights.cache import COMMIT
from medllm_pack.weights.listing import list_files
from medllm_pack.weights.needed import listed

# A signature over another pack would make this one look forged.
_STALE: Final = (SIGNATURE,)
_MISSING: Final = ("RepositoryNotFoundError", "RevisionNotFoundError")


@dataclass(frozen=True)
class HubPublished:
    """What stands on the Hub after publishing.

    Attributes:
        target: the repository and its branch.
        commit: the commit that holds the release.
        url: where people look at it.
        created: whether the repository was made.
        private: whether it is private; None if the Hub does not say.
        sent: names of the files that were not there before; empty if nothing was committed.
        files: name -> SHA-256 of all files of the release.
    """

    target: HubTarget
    commit: str
    url: str
    created: bool
    private: bool | None
    sent: tuple[str, ...]
    files: Mapping[str, str]


def publish_to_hub(
    release: Release,
    target: HubTarget,
    *,
    private: bool = True,
    report: Reporter = SILENT,
    patience: Patience | None = None,
    endpoint: str | None = None,
) -> HubPublished:
    """Bring a release to a repository, in one commit, and compare what is there with it.

    Args:
        release: from :func:`medllm_pack.publish.make.make_release`.
        target: the repository, made if it is missing, and the branch, ``main`` by default.
        private: whether a repository that is made is private; one that exists stays as it is.
        report: listener.
        patience: how often and how long to try.
        endpoint: address of the Hub; by default HF_ENDPOINT, or huggingface.co.

    Raises:
        UsageError: if the target is a commit.
        TransferError: if the Hub refuses, or cannot be reached.
        SourceError: if a file of the release is missing or has changed.
        CheckFailedError: if the Hub holds something else than was sent.
    """
    files = wanted_files(release)
    hub = _Hub(target, report, patience or HUB, endpoint)
    with library():
        created = hub.ensure(private=private)
        head, there = hub.listing()
        changed = {n: blob for n, blob in files.items() if not is_same(blob, there.get(n))}
        refuse_a_mixture(release, files, there, target)
        stale = [name for name in _STALE if name in there and name not in files]
        commit = head
        if changed or stale:
            commit = hub.commit(changed, stale, head, _message(release))
        hub.check(files, commit)
        return HubPublished(
            target=target,
            commit=commit,
            url=f"{hub.address.endpoint}/{target.repository}/tree/{commit}",
            created=created,
            private=hub.is_private(),
            sent=tuple(sorted(changed)),
            files={name: blob.digest.hex for name, blob in sorted(files.items())},
        )


def missing_on_hub(
    release: Release,
    target: HubTarget,
    *,
    patience: Patience | None = None,
    endpoint: str | None = None,
) -> dict[str, int]:
    """Return name -> size of what publishing would send; nothing is changed.

    Raises:
        SourceError: if the repository may not be read, or the Hub cannot be reached.
        TransferError: if there is no token.
    """
    hub = _Hub(target, SILENT, patience or HUB, endpoint)
    there: Mapping[str, Any] = {}
    try:
        _, there = hub.listing()
    except SourceError as error:
        if type(error.__cause__).__name__ not in _MISSING:
            raise
    refuse_a_mixture(release, files := wanted_files(release), there, target)
    return {n: blob.size for n, blob in files.items() if not is_same(blob, there.get(n))}


def _message(release: Release) -> str:
    quants = ", ".join(tagged.quant for tagged in release.images)
    return f"Publish {quants} with medllm-pack {__version__}"


class _Hub:
    """The repository that is written to."""

    def __init__(
        self, target: HubTarget, report: Reporter, patience: Patience, endpoint: str | None
    ) -> None:
        from huggingface_hub import HfApi, constants, get_token

        branch = target.revision or constants.DEFAULT_REVISION
        if COMMIT.fullmatch(branch):
            raise UsageError(f"{target} is a commit, and those never change; name a branch")
        if constants.HF_HUB_OFFLINE:
            raise TransferError("HF_HUB_OFFLINE=1 forbids to publish to the Hub; unset it")
        if get_token() is None:
            raise TransferError(
                "publishing to the Hub needs a token with write access: log in with "
                "`hf auth login`, or set HF_TOKEN"
            )
        self.report, self.patience = report, patience
        self.address = Address(
            target.repository, branch, (endpoint or constants.ENDPOINT).rstrip("/")
        )
        self.api = HfApi(
            endpoint=self.address.endpoint, library_name="medllm-pack", library_version=__version__
        )

    def listing(self, revision: str | None = None) -> tuple[str, Mapping[str, Any]]:
        """Return commit and files of the branch, or of a revision."""
        address = replace(self.address, revision=revision or self.address.revision)
        return list_files(address, patience=self.patience)

    def ensure(self, *, private: bool) -> bool:
        """Make repository and branch if they are missing; say whether the repository was made."""
        try:
            self.listing()
            return False
        except SourceError as error:
            missing = type(error.__cause__).__name__
            if missing not in _MISSING:
                raise
        created = missing == "RepositoryNotFoundError"
        with translated(self.address):
            if created:
                self.api.create_repo(self.address.name, private=private, exist_ok=True)
            if not created or self.address.revision != "main":
                self.api.create_branch(
                    self.address.name, branch=self.address.revision, exist_ok=True
                )
        return created

    def is_private(self) -> bool | None:
        """Say whether the repository is private, as far as the Hub says."""
        with translated(self.address):
            return self.api.model_info(self.address.name, timeout=self.patience.stall_s).private

    def commit(
        self, files: Mapping[str, Blob], stale: Sequence[str], parent: str, message: str
    ) -> str:
        """Send files, commit them onto ``parent`` without the stale ones; return the commit."""
        upload = Upload(self.api, self.address, self.report)
        operations = upload.send(files)
        self.report.step("commit")
        try:
            with translated(self.address):
                return upload.commit(operations, stale, parent=parent, message=message)
        except TransferError:
            # An answer may be lost although the commit was made.
            head, there = self.listing()
            made = head != parent and not there.keys() & set(stale)
            if made and all(is_same(b, there.get(n)) for n, b in files.items()):
                return head
            raise

    def check(self, files: Mapping[str, Blob], commit: str) -> None:
        """Compare what the Hub lists at a commit with the release."""
        self.report.step("read back")
        _, there = self.listing(commit)
        if odd := sorted(n for n, blob in files.items() if not is_same(blob, there.get(n))):
            raise CheckFailedError(
                f"{self.address.name} at {commit[:12]} holds something else than was sent as "
                f"{listed(odd)}; publish again, and do not announce this commit"
            )
