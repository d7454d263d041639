"""What a repository on the Hub holds at a commit: one request, names with sizes and digests.

A branch or tag is turned into its commit by the same answer. None of what is listed is trusted as
a path. Brings no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medllm_pack import __version__
from medllm_pack.errors import SourceError, shown
from medllm_pack.patience import Patience
from medllm_pack.weights.answers import Address, PassingError, understood
from medllm_pack.weights.cache import COMMIT, DIGEST, Item
from medllm_pack.weights.needed import check_small

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


class UnreachableError(SourceError):
    """The Hub gave no answer; a cache may still have one."""


def list_files(address: Address, *, patience: Patience) -> tuple[str, Mapping[str, Any]]:
    """Return the commit and its files as the Hub library gives them; see :func:`item_of`.

    Args:
        address: the repository and revision.
        patience: how often and how long to try.

    Raises:
        SourceError: if there is no such repository or revision, or it may not be read.
        UnreachableError: if the Hub gives no answer.
    """
    failures = 0
    while True:
        try:
            info = _info(address, patience)
            break
        except PassingError as error:
            failures += 1
            if said := patience.given_up(failures, str(error), asked_s=error.asked_s):
                raise UnreachableError(f"{address.host} is not reachable ({said})") from error
            patience.wait(failures, asked_s=error.asked_s)
    if not COMMIT.fullmatch(info.sha or ""):
        raise no_hub(address)
    return str(info.sha), {sibling.rfilename: sibling for sibling in info.siblings or ()}


def _info(address: Address, patience: Patience) -> ModelInfo:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=address.endpoint, library_name="medllm-pack", library_version=__version__)
    try:
        with understood(address):
            return api.model_info(
                address.name,
                revision=address.revision,
                files_metadata=True,
                timeout=patience.stall_s,
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise no_hub(address) from error


def no_hub(address: Address) -> SourceError:
    """Say that something else answers where the Hub should be."""
    return SourceError(
        f"what answers at {shown(address.endpoint)} is no Hugging Face Hub; check HF_ENDPOINT, "
        "and whether the network wants a login page to be visited first"
    )


def item_of(sibling: Any) -> Item:
    """Take what the Hub lists for a file, trusting none of it as a path.

    Raises:
        SourceError: if size or digest is missing, or such a file may not be so large.
    """
    lfs = sibling.lfs
    size, digest = (lfs.size, lfs.sha256) if lfs else (sibling.size, sibling.blob_id)
    if type(size) is not int or size < 0 or not DIGEST.fullmatch(str(digest)):
        raise SourceError(
            f"the Hub states no size and digest for {shown(sibling.rfilename)}; if HF_ENDPOINT "
            "names a mirror, use huggingface.co or a folder"
        )
    check_small(sibling.rfilename, size)
    return Item(sibling.rfilename, size, str(digest))
