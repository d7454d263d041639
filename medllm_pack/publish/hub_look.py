"""What a repository of the Hub holds, told without bringing the weights.

Digests and sizes are the Hub's listing; of each GGUF file the header comes over by range requests.
A repository that is no pack is shown as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from medllm_pack.errors import SourceError, shown
from medllm_pack.gguf.reader import GGUFFile, read_header
from medllm_pack.pack.manifest import NAME as PACK_JSON
from medllm_pack.pack.manifest import Document
from medllm_pack.pack.sums import SUMS
from medllm_pack.patience import Patience
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish.hub_files import HubFiles
from medllm_pack.publish.targets import HubTarget
from medllm_pack.weights.answers import HUB
from medllm_pack.weights.ranges import RemoteFile


@dataclass(frozen=True)
class HubFile:
    """A GGUF file on the Hub.

    Attributes:
        name: its name.
        size: bytes.
        sha256: what the Hub states; None for a file that it does not keep by SHA-256.
        header: as the strict reader found it.
        fetched: bytes that came over for it.
    """

    name: str
    size: int
    sha256: str | None
    header: GGUFFile
    fetched: int


@dataclass(frozen=True)
class HubLook:
    """A repository at a commit.

    Attributes:
        target: as it was asked for.
        commit: what that stood for.
        document: its pack.json; None if it is no pack.
        files: its GGUF files, by name.
        overrides: asks what was accepted by name when it was published.
    """

    target: HubTarget
    commit: str
    document: Document | None
    files: tuple[HubFile, ...]
    overrides: Callable[[], tuple[str, ...]] = field(repr=False, compare=False)


def look_at_hub(
    target: HubTarget,
    *,
    report: Reporter = SILENT,
    patience: Patience | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> HubLook:
    """Return what a repository holds.

    Args:
        target: the repository, and a branch, tag or commit; ``main`` by default.
        report: listener.
        patience: how often and how long to try.
        cache: the Hub cache, for the small files.
        endpoint: address of the Hub; by default HF_ENDPOINT, or huggingface.co.

    Raises:
        SourceError: if it cannot be read, or holds no GGUF file.
        GGUFError: if a file of it breaks a rule of the format.
    """
    hub = HubFiles(target, report, patience or HUB, cache, endpoint)
    names = [name for name in hub.names if name.lower().endswith(".gguf")]
    if not names:
        raise SourceError(f"{target.repository} holds no GGUF file at {shown(hub.commit[:12])}")
    document, sums = hub.manifest() if hub.has(PACK_JSON) and hub.has(SUMS) else (None, {})
    found = tuple(look(hub, name) for name in names)
    return HubLook(target, hub.commit, document, found, lambda: hub.overrides(sums))


def look(hub: HubFiles, name: str) -> HubFile:
    """Return one GGUF file, its header fetched.

    Raises:
        SourceError: if it does not come.
        GGUFError: if it breaks a rule of the format.
    """
    item = hub.item(name)
    file = RemoteFile(item, hub.commit, address=hub.address, patience=hub.patience)
    header = read_header(file, size=item.size, name=name)
    return HubFile(name, item.size, item.sha256, header, file.fetched)
