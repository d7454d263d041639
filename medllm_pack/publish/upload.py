"""One blob to a registry: skipped, mounted, or sent, and sent on from where it stood.

What a registry forgives after a cut differs (distribution 2.8 forgets an upload that was cut inside
of a chunk), so after any failure the registry is asked, and an answer that does not fit our own
count means that the blob is sent anew. The digest at the end decides. Memory: one piece.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urljoin

from medllm_pack.errors import TransferError
from medllm_pack.ollama.image import Blob
from medllm_pack.patience import AGAIN, retry_after
from medllm_pack.publish.answers import Answer
from medllm_pack.publish.journal import Entry, Journal
from medllm_pack.publish.ollama_upload import PartedUpload
from medllm_pack.publish.part import Meter, Part
from medllm_pack.publish.registry import Registry
from medllm_pack.publish.trying import GivenUpError, InterruptedTransferError, StoppedError, insist

CHUNK: Final = 64 << 20
_RANGE: Final = re.compile(r"(?:bytes=)?0-(\d+)", re.ASCII)
_GONE: Final = (400, 404, 405, 410, 416)  # what registries say of an upload they forgot
_MOST_RESTARTS: Final = 3


@dataclass(frozen=True)
class Sent:
    """What became of a blob; ``n_bytes`` is what went over the wire for it."""

    blob: Blob
    how: Literal["there", "mounted", "sent"]
    n_bytes: int = 0


@dataclass(frozen=True)
class Sending:
    """What all uploads of a push share.

    Attributes:
        chunk: bytes of a request; a smaller blob is sent in one.
        stop: set when the user interrupted.
        advance: told of bytes that went over the wire for the first time.
        mount_from: repositories to mount from.
    """

    registry: Registry
    journal: Journal
    chunk: int
    stop: threading.Event
    advance: Callable[[int], None]
    mount_from: tuple[str, ...] = ()


def send_blob(blob: Blob, sending: Sending) -> Sent:
    """Bring a blob to a registry.

    Raises:
        TransferError: if it cannot be brought there.
        StoppedError: if the user interrupted.
        SourceError: if its file is not what its digest says.
    """
    registry, meter = sending.registry, Meter(sending.advance)
    if registry.blob_size(blob.digest, mend=True) == blob.size:
        meter.reached(blob.size)
        return Sent(blob, "there")
    for source in sending.mount_from:
        if registry.start_upload(blob.digest, mount_from=source) is None:
            meter.reached(blob.size)
            return Sent(blob, "mounted")
    kind = _Whole if blob.size <= sending.chunk else _Chunked
    upload = (_Parts if registry.target.kind == "ollama" else kind)(blob, sending, meter)
    upload.run()
    sending.journal.drop(blob)
    return Sent(blob, "sent", meter.total)


class _Whole:
    """A blob in one request."""

    def __init__(self, blob: Blob, sending: Sending, meter: Meter) -> None:
        self.blob, self.sending, self.meter = blob, sending, meter
        self.registry = sending.registry
        self._mended = False

    def run(self) -> None:
        failures = 0
        while True:
            self.check_stop()
            try:
                answer = self._attempt()
                if answer.status == 201:
                    return
                raise self.refused(answer)
            except GivenUpError:
                raise
            except InterruptedTransferError as error:
                failure = error
            if self.arrived():
                return  # it was taken, only the answer was lost
            failures += 1
            self.wait(failures, failure)

    def arrived(self) -> bool:
        """Whether the registry has it all; once, "it cannot say" means no, and it is sent anew."""
        try:
            return self.registry.blob_size(self.blob.digest) == self.blob.size
        except GivenUpError as error:
            self.mend(error)
            return False

    def mend(self, error: GivenUpError) -> None:
        """Begin anew, once, what a registry cannot read that was killed while it wrote it."""
        if error.status != 500 or self._mended:
            raise error
        self._mended = True

    def wait(self, failures: int, error: InterruptedTransferError) -> None:
        patience = self.registry.door.access.patience
        insist(patience, failures, error, stop=self.sending.stop)
        self.check_stop()

    def check_stop(self) -> None:
        if self.sending.stop.is_set():
            raise StoppedError("interrupted; the next run goes on from here")

    def refused(self, answer: Answer) -> TransferError:
        """Say what an answer means; another try may better some."""
        if b"DIGEST_INVALID" in answer.body:
            return TransferError(
                f"the registry received other bytes than those of {self.blob.digest}: the file "
                "was changed after it was packed, or the way is faulty; check it with "
                "`medllm-pack verify`"
            )
        error = self.registry.refused(answer, f"sending {self.blob.digest}")
        if answer.status in AGAIN or answer.status in _GONE:
            return InterruptedTransferError(
                str(error), asked_s=retry_after(answer.headers), status=answer.status
            )
        return error

    def _attempt(self) -> Answer:
        location = self.registry.start_upload(self.blob.digest)
        assert location is not None
        return self.finish(location, 0)

    def finish(self, location: str, start: int) -> Answer:
        def body() -> Part:
            self.meter.position = start
            return Part(self.blob, start, self.blob.size, self.meter.count)

        return self.registry.finish_upload(
            location, self.blob.digest, body=body, size=self.blob.size - start
        )


class _Parts(_Whole):
    """A blob to Ollama's own registry."""

    def __init__(self, blob: Blob, sending: Sending, meter: Meter) -> None:
        super().__init__(blob, sending, meter)
        self._meters: dict[int, Meter] = {}  # of parts that may be sent at once

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.meter.total = sum(meter.total for meter in self._meters.values())

    def _attempt(self) -> Answer:
        return PartedUpload(self.registry, self.blob, self._body, self.sending.stop).run()

    def _body(self, start: int, end: int) -> Iterator[bytes]:
        meter = self._meters.setdefault(start, Meter(self.sending.advance))
        meter.position = 0
        return iter(Part(self.blob, start, end, meter.count))


class _Chunked(_Whole):
    """A blob in chunks, each written down when the registry has it."""

    def run(self) -> None:
        failures = restarts = 0
        entry = self._resumed()
        while True:
            try:
                entry = entry or self._started()
                while entry.offset < self.blob.size:
                    entry = self._next(entry)
                    failures = 0
                answer = self.registry.finish_upload(entry.location, self.blob.digest)
                if answer.status == 201:
                    return
                failure = self.refused(answer)
                if restarts or isinstance(failure, InterruptedTransferError):
                    raise failure
                # Of an upload that was gone on with, bytes may be missing.
                self._drop(entry)
                entry, failure = None, InterruptedTransferError(str(failure))
            except GivenUpError:
                raise
            except InterruptedTransferError as error:
                failure = error
                if self.arrived():
                    return
                entry = self._recovered(entry) if entry else None
            if entry is None:
                restarts += 1
                if restarts > _MOST_RESTARTS:
                    raise failure
            failures += 1
            try:
                self.wait(failures, failure)
            except GivenUpError as error:
                self.mend(error)
                if entry:
                    self._drop(entry)
                entry, failures = None, 0

    def _started(self) -> Entry:
        location = self.registry.start_upload(self.blob.digest)
        assert location is not None
        return Entry(location, 0)

    def _resumed(self) -> Entry | None:
        entry = self.sending.journal.entry(self.blob)
        return self._recovered(entry) if entry else None

    def _next(self, entry: Entry) -> Entry:
        """Send the next chunk and return where the upload stands then."""
        self.check_stop()
        end = min(entry.offset + self.sending.chunk, self.blob.size)

        def body() -> Part:
            self.meter.position = entry.offset
            return Part(self.blob, entry.offset, end, self.meter.count)

        answer = self.registry.call(
            "PATCH",
            entry.location,
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(end - entry.offset),
                "Content-Range": f"{entry.offset}-{end - 1}",
            },
            body=body,
            again=False,
        )
        if answer.status not in (201, 202, 204):
            raise self.refused(answer)
        entry = Entry(self.registry.location(answer), end)
        self.sending.journal.save(self.blob, entry)
        return entry

    def _recovered(self, entry: Entry) -> Entry | None:
        """Ask where an upload stands; None if it must begin anew."""
        try:
            answer = self.registry.call("GET", entry.location, again=False)
        except InterruptedTransferError:
            return entry  # still unreachable; the next try asks again
        if answer.status in AGAIN:
            return entry
        match = _RANGE.fullmatch(answer.headers.get("Range", ""))
        if answer.status == 204 and match:
            # 0 bytes and 1 byte both read 0-0; a chunk is never one byte.
            end = int(match[1])
            offset = end + 1 if end else 0
            if offset in (entry.offset, min(entry.offset + self.sending.chunk, self.blob.size)):
                location = _newest(answer, entry.location)
                self.meter.reached(offset)
                return Entry(location, offset)
        self._drop(entry)
        return None

    def _drop(self, entry: Entry) -> None:
        """Give an upload up, on both sides."""
        self.sending.journal.drop(self.blob)
        try:
            self.registry.call("DELETE", entry.location, again=False)
        except TransferError:
            return  # it is the registry's to clean up


def _newest(answer: Answer, location: str) -> str:
    """Return the newest address of an upload."""
    named = answer.headers.get("Location")
    return urljoin(answer.url, named) if named else location
