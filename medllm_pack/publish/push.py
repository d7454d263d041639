"""A release to a registry: blobs, then manifests by digest, then a look at all of it, then tags.

A tag is written only after its manifest was read back and every blob under it was seen with its
size, so that no tag ever names what is not there, whenever the process dies. Knows nothing of packs
or of how a blob is sent.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medllm_pack.digests import Digest
from medllm_pack.ollama.image import Blob
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish.credentials import exposed
from medllm_pack.publish.journal import Journal
from medllm_pack.publish.manifests import attach, put_image, put_tag
from medllm_pack.publish.mounting import Places, mount_known
from medllm_pack.publish.probe import Verdict, probe
from medllm_pack.publish.registry import Registry, opened
from medllm_pack.publish.release import Release
from medllm_pack.publish.targets import RegistryTarget, checked_tag
from medllm_pack.publish.transport import Access
from medllm_pack.publish.trying import InterruptedTransferError, StoppedError
from medllm_pack.publish.upload import CHUNK, Sending, Sent, send_blob

_AT_ONCE = 2  # blobs; one large one fills most lines
_LAST_S = 20.0  # for the running chunks to end after an interrupt


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        target: the repository.
        images: digest of each image's manifest and its tags.
        transferred: bytes of blobs that went over the wire.
        sent: number of blobs sent; likewise ``skipped``, ``mounted``.
        probe: whether Ollama can pull; None if it was not asked.
        notices: what the user should know.
    """

    target: RegistryTarget
    images: tuple[tuple[Digest, tuple[str, ...]], ...]
    transferred: int
    sent: int
    skipped: int
    mounted: int
    probe: Verdict | None
    notices: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return what --json shows."""
        return {
            "target": str(self.target),
            "images": [{"digest": str(d), "tags": list(tags)} for d, tags in self.images],
            "transferred_bytes": self.transferred,
            "blobs": {"sent": self.sent, "skipped": self.skipped, "mounted": self.mounted},
            "ollama_can_pull": self.probe and {"pulls": self.probe.pulls, "why": self.probe.why},
            "notices": list(self.notices),
        }


@dataclass(frozen=True)
class Options:
    """How a push is made.

    Attributes:
        chunk: bytes of a request.
        mount_from: repositories of the same registry that may have the blobs.
        ask_ollama: probe at the end.
        state: folder of the journal; the user's own if None.
    """

    chunk: int = CHUNK
    mount_from: tuple[str, ...] = ()
    ask_ollama: bool = True
    state: Path | None = field(default=None, repr=False)


def push(
    release: Release,
    target: RegistryTarget,
    *,
    access: Access | None = None,
    options: Options | None = None,
    report: Reporter = SILENT,
) -> Pushed:
    """Publish a release and return what was done.

    Raises:
        UsageError: if a tag is none.
        TransferError: if the registry refuses, cannot be reached, or has not what it took.
    """
    access, options = access or Access(), options or Options()
    for tagged in release.images:
        for tag in tagged.tags:
            checked_tag(tag)
    for line in exposed(target.kind):
        report.notice(line)
    with opened(target, access, push=True, also=options.mount_from) as registry:
        journal = Journal(registry.origin, target.repository, folder=options.state)
        blobs, places = list(release.blobs), Places(target.host, folder=options.state)
        mounted = mount_known(blobs, target, access, places)
        done = [
            replace(sent, how="mounted") if sent.blob.digest in mounted else sent
            for sent in _send_blobs(blobs, registry, journal, options, report)
        ]
        notices = []
        for tagged in release.images:
            put_image(registry, tagged.image, by_digest=target.kind == "oci", report=report)
            for paper in tagged.attached:
                notices += attach(registry, paper, subject=tagged.image)
        for tagged in release.images:
            for tag in tagged.tags:
                put_tag(registry, tagged.image, tag)
        places.remember(blobs, target.repository)
    images = tuple((tagged.image.digest, tagged.tags) for tagged in release.images)
    verdict = None
    if options.ask_ollama:
        try:
            verdict = _probed(target, release, access)
        except InterruptedTransferError as error:
            # Everything is published by now: not knowing is no failure.
            notices.append(f"all is published, but whether Ollama can pull it is unknown: {error}")
    return Pushed(
        target, images,
        transferred=sum(sent.n_bytes for sent in done),
        sent=_count(done, "sent"), skipped=_count(done, "there"), mounted=_count(done, "mounted"),
        probe=verdict, notices=tuple(dict.fromkeys(notices)),
    )  # fmt: skip


def missing(
    release: Release, target: RegistryTarget, *, access: Access | None = None
) -> tuple[Blob, ...]:
    """Return the blobs that a push would have to send; sends nothing.

    Raises:
        TransferError: if the registry cannot be asked.
    """
    with opened(target, access or Access(), push=True) as registry:
        return tuple(b for b in release.blobs if registry.blob_size(b.digest, mend=True) != b.size)


def _count(done: Sequence[Sent], how: str) -> int:
    return sum(sent.how == how for sent in done)


def _send_blobs(
    blobs: list[Blob],
    registry: Registry,
    journal: Journal,
    options: Options,
    report: Reporter,
) -> list[Sent]:
    """Send every blob, a few at once; an interrupt lets the running chunks end."""
    report.step("sending", total_bytes=sum(blob.size for blob in blobs))
    advanced: queue.SimpleQueue[int] = queue.SimpleQueue()
    stop = threading.Event()
    sending = Sending(
        registry, journal, options.chunk, stop, advanced.put, options.mount_from
    )  # fmt: skip
    work = iter(sorted(blobs, key=lambda blob: -blob.size))
    done: list[Sent] = []
    errors: list[BaseException] = []
    lock = threading.Lock()

    def worker() -> None:
        try:
            for blob in _taken(work, lock):
                if stop.is_set():
                    raise StoppedError("interrupted; the next run goes on from here")
                done.append(send_blob(blob, sending))
        except BaseException as error:
            errors.append(error)
            stop.set()

    # Daemons: a second interrupt must end the process while a chunk is under way.
    threads = [threading.Thread(target=worker, daemon=True) for _ in range(_AT_ONCE)]
    try:
        for thread in threads:
            thread.start()
        _listen(advanced, report, threads)
    except BaseException:
        stop.set()
        report.notice("finishing the running chunk, so that the next run goes on from there")
        _listen(advanced, report, threads, until=time.monotonic() + _LAST_S)
        raise
    _raise_first(errors)
    return done


def _taken(work: Iterator[Blob], lock: threading.Lock) -> Iterator[Blob]:
    while True:
        with lock:
            blob = next(work, None)
        if blob is None:
            return
        yield blob


def _listen(
    advanced: queue.SimpleQueue[int],
    report: Reporter,
    threads: Sequence[threading.Thread],
    *,
    until: float = float("inf"),
) -> None:
    """Report what the workers send, from this thread, until all have ended or it is late."""
    while any(thread.is_alive() for thread in threads) or not advanced.empty():
        if time.monotonic() > until:
            return
        try:
            report.advance(advanced.get(timeout=0.05))
        except queue.Empty:
            continue


def _raise_first(errors: Sequence[BaseException]) -> None:
    """Raise the error that stopped the others."""
    for error in errors:
        if not isinstance(error, StoppedError):
            raise error
    if errors:
        raise errors[0]


def _probed(target: RegistryTarget, release: Release, access: Access) -> Verdict | None:
    tags = [tag for tagged in release.images for tag in tagged.tags]
    return probe(target.tagged(tags[-1]), access) if tags else None
