"""Files on their way to the Hub, through its own library: LFS or xet, whichever it chooses.

Keeps the library quiet (its log holds signed addresses), tells progress by where it reads, and
translates what it raises. Every large file's digest, taken from its bytes while they are sent, must
be the one that was to be sent. Knows nothing of packs.

Memory: the library's, some buffers.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from medllm_pack import files
from medllm_pack.errors import MedllmError, SourceError, TransferError, shown
from medllm_pack.known import Known
from medllm_pack.ollama.image import Blob
from medllm_pack.progress import Reporter
from medllm_pack.publish import read
from medllm_pack.weights.answers import Address, network_error, told

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_ANSWER_S: Final = 300.0  # the library would wait for ever; storage may take a minute to assemble
_LOOK_S: Final = 0.2


class _XetError(TransferError):
    """The xet library failed, with an answer of nobody; LFS may still work."""


@contextmanager
def library() -> Iterator[None]:
    """Keep the Hub library from printing, and give its requests an end."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        get_session,
    )

    log = logging.getLogger("huggingface_hub")
    level, session, silent = log.level, get_session(), are_progress_bars_disabled()
    patient = session.timeout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF_HUB_DISABLE_PROGRESS_BARS, metadata of the card
        log.setLevel(logging.CRITICAL)
        disable_progress_bars()
        session.timeout = _ANSWER_S
        try:
            yield
        finally:
            log.setLevel(level)
            session.timeout = patient
            if not silent:
                enable_progress_bars()


@contextmanager
def translated(address: Address) -> Iterator[None]:
    """Turn what the Hub library raises while writing into one line with the next step."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except MedllmError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "README.md" in str(error):
            raise TransferError(
                "the Hub does not accept the metadata at the top of README.md; correct the "
                "recipe's card and build again"
            ) from error
        for cause in _causes(error):
            if isinstance(cause, HfHubHTTPError):
                if not str(cause.response.url).startswith(f"{address.endpoint}/"):
                    status = cause.response.status_code
                    raise _unreachable(address, f"the storage answers {status}") from error
                raise address.refused(cause) from error
            if isinstance(cause, network_error()):
                raise _unreachable(address, told(cause)) from error
        if isinstance(error, OSError | RuntimeError):  # hf_xet
            raise _XetError(str(_unreachable(address, told(error)))) from error
        if isinstance(error, ValueError | KeyError | TypeError):
            raise TransferError(
                f"what answers at {address.host} does not answer as the Hub does; check "
                "HF_ENDPOINT, or try again later"
            ) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _unreachable(address: Address, problem: str) -> TransferError:
    return TransferError(
        f"the way to {address.name} broke off ({problem}) and nothing was committed; run the same "
        "command again, what has arrived is not sent twice"
    )


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
        except _XetError:
            if not _leave_xet():
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
            digest = _Digest(blob.source)
        try:
            with translated(self.address), _Watch(blob, self.report), digest or nullcontext():
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


def _leave_xet() -> bool:
    """Use LFS from now on; say whether that changes anything."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET:
        return False
    constants.HF_HUB_DISABLE_XET = True
    return True


class _Digest:
    """Digests a file beside the sending of it, to its end unless the user interrupts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.hex = ""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped = kind is not None and not issubclass(kind, Exception)
        self._thread.join()

    def _run(self) -> None:
        # A file that cannot be read leaves an empty digest, which is no file's.
        with suppress(OSError, InterruptedError):
            self.hex = files.sha256(self._path, advance=self._go_on)

    def _go_on(self, _: int) -> None:
        if self._stopped:
            raise InterruptedError


class _Watch:
    """Tells how far a file of this process has been read, whoever reads it.

    The library has no hook that serves both of its ways, so /proc is asked where it reads: the
    slowest reader counts, which sends. Without /proc the file is told when it is done. The thread
    that runs the job waits inside the library meanwhile.
    """

    def __init__(self, blob: Blob, report: Reporter) -> None:
        assert isinstance(blob.source, Path)
        self._path, self._size, self._report = str(blob.source.resolve()), blob.size, report
        self._told = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if kind is None:
            self._tell(self._size)

    def _look(self) -> None:
        while not self._done.wait(_LOOK_S):
            self._tell(self._position())

    def _tell(self, position: int) -> None:
        if position > self._told:
            self._report.advance(position - self._told)
            self._told = position

    def _position(self) -> int:
        found = []
        try:
            for number in os.listdir("/proc/self/fd"):
                if _target(number) == self._path:
                    lines = Path(f"/proc/self/fdinfo/{number}").read_text()
                    found.append(int(lines.split("pos:")[1].split()[0]))
        except (OSError, ValueError, IndexError):
            return 0
        return min(found, default=0)


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # closed meanwhile
        return ""
