"""Files on their way to the Hub, through its own library: LFS or xet, whichever it chooses.

Every large file's digest, taken from its bytes while they are sent, must be the one that was to be
sent. Knows nothing of packs.

Memory: the library's, some buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from medllm_pack.errors import SourceError, TransferError, shown
from medllm_pack.known import Known
from medllm_pack.ollama.image import Blob
from medllm_pack.progress import Reporter
from medllm_pack.publish import read
from medllm_pack.publish.alongside import Digesting, Watch
from medllm_pack.publish.hub_library import XetError, leave_xet, translated
from medllm_pack.weights.answers import Address

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


class Upload:
    """Sends the bytes of files, then commits them."""

    def __init__(self, api: HfApi, address: Address, report: Reporter) -> None:
        self.api, self.address, self.report = api, address, report

    def send(self, blobs: Mapping[str, Blob]) -> list[CommitOperationAdd]:
        """Bring the bytes to the Hub's storage; nothing is visible yet.

        Raises:
            SourceError: if a file is missing or is not what its digest says.
            TransferError: if the Hub refuses or cannot be reached.
        """
        large = [name for name, blob in blobs.items() if isinstance(blob.source, Path)]
        total = sum(blobs[name].size for name in large)
        self.report.step(f"upload to {self.address.name}", total_bytes=total)
        operations = [self._sent(name, blobs[name]) for name in sorted(large)]
        rest = sorted(blobs.keys() - set(large))
        return operations + [_operation(name, blobs[name]) for name in rest]

    def commit(
        self,
        operations: Sequence[CommitOperationAdd],
        stale: Sequence[str],
        *,
        parent: str,
        message: str,
    ) -> str:
        """Commit what was sent, if the branch still stands at ``parent``; return the commit.

        Args:
            operations: from :meth:`send`.
            stale: files to be removed.
            parent: the commit that the listing was of.
            message: one line.
        """
        from huggingface_hub import CommitOperationDelete

        info = self.api.create_commit(
            self.address.name,
            [*operations, *(CommitOperationDelete(name) for name in stale)],
            commit_message=message,
            revision=self.address.revision,
            parent_commit=parent,
        )
        return str(info.oid)

    def _sent(self, name: str, blob: Blob) -> CommitOperationAdd:
        try:
            operation, found = self._send(name, blob)
        except XetError:
            if not leave_xet():
                raise
            self.report.notice("the Hub's xet storage is out of reach; sending by LFS instead")
            operation, found = self._send(name, blob)
        if found != blob.digest.hex:
            raise SourceError(
                f"{shown(name)} is not what the pack says: its SHA-256 is {found[:12]}…; nothing "
                "was committed, build again"
            )
        return operation

    def _send(self, name: str, blob: Blob) -> tuple[CommitOperationAdd, str]:
        """Send a file; return its digest as it was taken from the bytes meanwhile.

        Where the bytes are known to be the same before and after, none is taken.
        """
        from huggingface_hub import constants

        assert isinstance(blob.source, Path)
        operation, before = _operation(name, blob), Known().sha256(blob.source)
        digest = None
        if constants.HF_HUB_DISABLE_XET or before == blob.digest.hex:
            # The library would digest first and send then; xet does both in one passage.
            operation.upload_info.sha256 = bytes.fromhex(blob.digest.hex)
        if before != blob.digest.hex and constants.HF_HUB_DISABLE_XET:
            digest = Digesting(blob.source)
        try:
            with translated(self.address), Watch(blob, self.report), digest or nullcontext():
                self.api.preupload_lfs_files(
                    self.address.name,
                    [operation],
                    revision=self.address.revision,
                    free_memory=False,
                )
        except TransferError:
            if digest is None or digest.hex in ("", blob.digest.hex):
                raise
            return operation, digest.hex  # the storage may have refused it for that very reason
        if before == blob.digest.hex:
            return operation, Known().sha256(blob.source) or Known().digest(blob.source)
        return operation, digest.hex if digest else operation.upload_info.sha256.hex()


def _operation(name: str, blob: Blob) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    if not isinstance(blob.source, Path):
        return CommitOperationAdd(name, read.small(blob))
    try:
        return CommitOperationAdd(name, blob.source)
    except (ValueError, OSError) as error:
        raise SourceError(f"{shown(name)} cannot be read; build the pack again") from error
