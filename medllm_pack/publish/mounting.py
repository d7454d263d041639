"""Large blobs that an earlier push brought to another repository of the registry, mounted here.

What is remembered is where blobs went: digests and repositories, never a login, small files in the
user's state folder. Mounting is a connection of its own, because a registry may refuse a login that
also asks for another repository. Whatever fails is no failure: the blob is sent instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from medllm_pack import state
from medllm_pack.digests import Digest
from medllm_pack.errors import TransferError, UsageError, WriteError
from medllm_pack.ollama.image import Blob
from medllm_pack.publish.registry import Registry, opened
from medllm_pack.publish.targets import RegistryTarget, parse_target
from medllm_pack.publish.transport import Access

LARGE: Final = 1 << 20  # bytes; what is smaller is sent as fast as it is mounted
_MOST_BLOBS: Final = 1024
_MOST_PLACES: Final = 3


class Places:
    """Where this user's large blobs went on one registry, the newest last.

    Args:
        host: of the registry, as targets name it.
        folder: of the state; the user's own if None.
    """

    def __init__(self, host: str, *, folder: Path | None = None) -> None:
        key = Digest.of(host.encode()).hex
        self._host = host
        self._path = (folder or state.state_folder()) / "places" / f"{key}.json"

    def of(self, digest: Digest) -> tuple[str, ...]:
        """Return the repositories that have had a blob, the newest first."""
        found = self._read().get(digest.hex)
        names = found if isinstance(found, list) else []
        return tuple(name for name in reversed(names) if self._is_repository(name))

    def remember(self, blobs: Iterable[Blob], repository: str) -> None:
        """Remember that a repository has blobs."""
        places = self._read()
        for blob in blobs:
            if blob.size >= LARGE:
                others = [name for name in reversed(self.of(blob.digest)) if name != repository]
                places.pop(blob.digest.hex, None)
                places[blob.digest.hex] = [*others, repository][-_MOST_PLACES:]
        if places:
            newest = dict(list(places.items())[-_MOST_BLOBS:])
            with suppress(WriteError):  # it will be sent again
                state.write(self._path, {"host": self._host, "blobs": newest})

    def _read(self) -> dict[str, object]:
        blobs = state.read(self._path).get("blobs")
        return blobs if isinstance(blobs, dict) else {}

    def _is_repository(self, name: object) -> bool:
        try:
            parse_target(f"oci://{self._host}/{name}")
        except UsageError:
            return False
        return True


def mount_known(
    blobs: Sequence[Blob], target: RegistryTarget, access: Access, places: Places
) -> frozenset[Digest]:
    """Mount what other repositories are known to have; return what is mounted now."""
    if target.kind != "oci":
        return frozenset()  # whether Ollama's own registry does it was not found out
    wanted = {
        blob: [name for name in places.of(blob.digest) if name != target.repository]
        for blob in blobs
    }
    sources = tuple(dict.fromkeys(name for names in wanted.values() for name in names))
    if not sources:
        return frozenset()
    done: set[Digest] = set()
    with suppress(TransferError), opened(target, access, push=True, also=sources) as registry:
        for blob, names in wanted.items():
            absent = names and registry.blob_size(blob.digest, mend=True) is None
            if absent and any(_mounted(registry, blob, name) for name in names):
                done.add(blob.digest)
    return frozenset(done)


def _mounted(registry: Registry, blob: Blob, source: str) -> bool:
    location = registry.start_upload(blob.digest, mount_from=source)
    if location is not None:  # the registry opened an ordinary upload instead
        registry.call("DELETE", location, again=False)
    return location is None
