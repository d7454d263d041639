"""The calls of the OCI distribution API for one repository, with the login they need.

One method a call; what an answer means for a whole push or pull is decided by who asks. Answers are
checked where a registry could mislead: types against headers, addresses against origins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, urlencode, urljoin

import httpx

from medllm_pack.digests import Digest
from medllm_pack.errors import TransferError, shown
from medllm_pack.ollama.image import DOCKER_MANIFEST
from medllm_pack.publish.answers import Answer
from medllm_pack.publish.auth import Key, Session
from medllm_pack.publish.credentials import docker_login, ollama_key_path
from medllm_pack.publish.guard import Origin
from medllm_pack.publish.release import OCI_INDEX, OCI_MANIFEST
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Access, Door
from medllm_pack.publish.trying import GivenUpError

_ANY_MANIFEST: Final = ", ".join((DOCKER_MANIFEST, OCI_MANIFEST))
_CODE: Final = re.compile(r"[A-Z_]{3,40}")
_BYTES: Final = "application/octet-stream"


@dataclass(frozen=True)
class Manifest:
    """A manifest as a registry served it; its digest is of the bytes at hand."""

    media_type: str
    data: bytes = field(repr=False)

    @property
    def digest(self) -> Digest:
        """Digest of the bytes."""
        return Digest.of(self.data)


@contextmanager
def opened(
    target: RegistryTarget,
    access: Access,
    *,
    push: bool = False,
    also: Sequence[str] = (),
    anonymous: bool = False,
) -> Iterator[Registry]:
    """Yield a repository to talk to.

    Args:
        target: which.
        access: how we get in.
        push: whether the login must allow it.
        also: repositories to mount blobs from.
        anonymous: show no login.
    """
    with Door(target.host, access) as door:
        actions = "pull,push" if push else "pull"
        scopes = [f"repository:{target.repository}:{actions}"]
        scopes += [f"repository:{name}:pull" for name in also]
        session = Session(
            door,
            origin := door.origin(),
            login=lambda: None if anonymous else docker_login(target.host),
            key=_ollama_key if target.kind == "ollama" and not anonymous else None,
            scopes=scopes,
        )
        yield Registry(door, origin, target, session)


def _ollama_key() -> Key:
    return Key.read(ollama_key_path())


class Registry:
    """One repository of one registry; made by :func:`opened`."""

    def __init__(
        self, door: Door, origin: Origin, target: RegistryTarget, session: Session
    ) -> None:
        self.door, self.origin, self.target = door, origin, target
        self._session = session

    def call(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Iterable[bytes]] | bytes | None = None,
        again: bool = True,
        answer_s: float | None = None,
    ) -> Answer:
        """Send a request, logging in once if that is asked for.

        Args:
            method: of HTTP.
            path: below ``/v2/<repository>/``, or an absolute URL.
            headers: without the login.
            body: the bytes, or what makes their pieces anew for each try.
            again: insist where the connection fails or the server is busy.
            answer_s: how long the answer may take, if longer than a silence.
        """
        url = self.url(path)
        ours = Origin.of(url) == self.origin
        used = self._session.header() if ours else None
        for _ in range(2):
            content = body() if callable(body) else body
            answer = self.door.request(
                method, url, headers=headers, body=content, authorization=used, again=again,
                answer_s=answer_s,
            )  # fmt: skip
            if answer.status != 401 or not ours or not self._session.renew(answer, used=used):
                break
            used = self._session.header()
        return answer

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        follow: Callable[[Origin, Origin], bool] | None = None,
    ) -> Iterator[httpx.Response]:
        """Send a request without a body and yield the answer unread, logged in if need be."""
        used = self._session.header()
        for attempt in range(2):
            with self.door.stream(
                method, self.url(path), headers=headers, authorization=used, follow=follow
            ) as answer:
                if answer.status_code == 401 and attempt == 0:
                    refusal = Answer(401, answer.headers, str(answer.url), b"")
                else:
                    yield answer
                    return
            if not self._session.renew(refusal, used=used):
                raise self.refused(refusal, "reading")
            used = self._session.header()

    def url(self, path: str) -> str:
        """Return the address of a path below the repository."""
        return path if "://" in path else f"{self.origin}/v2/{self.target.repository}/{path}"

    def blob_size(self, digest: Digest, *, mend: bool = False) -> int | None:
        """Return the size of a blob that is there, else None.

        Args:
            digest: of the blob.
            mend: as for ``manifest``.
        """
        answer = self._looked_up("HEAD", f"blobs/{digest}", mend=mend)
        if answer is None:
            return None
        if answer.status != 200:
            raise self.refused(answer, "asking for a blob")
        text = answer.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() else -1

    def _looked_up(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, mend: bool
    ) -> Answer | None:
        """Ask for what may be there; None if it is not.

        A registry that was killed while it wrote a link to a blob answers 500 to every question
        about it (distribution 2.8), until the blob is stored again.
        """
        try:
            answer = self.call(method, path, headers=headers)
        except GivenUpError as error:
            if mend and error.status == 500:
                return None
            raise
        return None if answer.status == 404 else answer

    def start_upload(self, digest: Digest, *, mount_from: str | None = None) -> str | None:
        """Open an upload and return its address; None if the blob was mounted instead."""
        query = {"mount": str(digest), "from": mount_from} if mount_from else {}
        path = "blobs/uploads/" + (f"?{urlencode(query)}" if query else "")
        answer = self.call("POST", path, headers={"Content-Length": "0"})
        if answer.status == 201 and mount_from:
            return None
        if answer.status != 202:
            raise self.refused(answer, "starting an upload")
        return self.location(answer)

    def finish_upload(
        self,
        location: str,
        digest: Digest,
        *,
        body: Callable[[], Iterable[bytes]] | bytes = b"",
        size: int = 0,
        query: Mapping[str, str] | None = None,
        again: bool = False,
    ) -> Answer:
        """Name the digest of an upload, with the rest of its bytes."""
        joined = "&" if "?" in location else "?"
        url = location + joined + urlencode({"digest": str(digest), **(query or {})})
        headers = {"Content-Length": str(size), "Content-Type": _BYTES}
        # What came in chunks may have to be put together first.
        answer_s = self.door.access.patience.finish_s if not size else None
        return self.call("PUT", url, headers=headers, body=body, again=again, answer_s=answer_s)

    def location(self, answer: Answer) -> str:
        """Return the address an answer names for the next request of an upload."""
        named = answer.headers.get("Location", "")
        if not named:
            raise TransferError(f"{self.origin.host} opened an upload without saying where")
        url: str = urljoin(answer.url, named)
        there = Origin.of(url)
        if self.origin.scheme == "https" and there.scheme == "http":
            raise TransferError(
                f"{self.origin.host} wants the upload unencrypted; the proxy in front of it must "
                "set X-Forwarded-Proto"
            )
        return url

    def manifest(
        self, reference: str, *, accept: str = _ANY_MANIFEST, mend: bool = False
    ) -> Manifest | None:
        """Return a manifest, or None if there is none; its type is that of its header.

        Args:
            reference: tag or digest.
            accept: media types.
            mend: take one that the registry fails to read for absent, to be stored anew.

        Raises:
            TransferError: if a digest was asked for and other bytes came.
        """
        path = f"manifests/{quote(reference, safe=':')}"
        answer = self._looked_up("GET", path, headers={"Accept": accept}, mend=mend)
        if answer is None:
            return None
        if answer.status != 200:
            raise self.refused(answer, "reading a manifest")
        found = Manifest(answer.headers.get("Content-Type", "").partition(";")[0], answer.body)
        if ":" in reference and str(found.digest) != reference:
            raise TransferError(f"{self.origin.host} gives other bytes than those of {reference}")
        _check_type(found)
        return found

    def put_manifest(self, reference: str, *, media_type: str, data: bytes) -> Answer:
        """Store a manifest under a tag or its digest and return the answer, whatever it is."""
        return self.call(
            "PUT",
            f"manifests/{quote(reference, safe=':')}",
            headers={"Content-Type": media_type},
            body=data,
        )

    def referrers(self, digest: Digest) -> Manifest | None:
        """Return the index of what is attached to a manifest, or None if it has no list."""
        answer = self.call("GET", f"referrers/{digest}", headers={"Accept": OCI_INDEX})
        if answer.status == 200 and answer.headers.get("Content-Type", "").startswith(OCI_INDEX):
            return Manifest(OCI_INDEX, answer.body)
        return self.manifest(digest.file_name, accept=OCI_INDEX)

    def tags(self) -> tuple[str, ...]:
        """Return the tags that are there, as far as the registry says."""
        answer = self.call("GET", "tags/list")
        try:
            found = json.loads(answer.body).get("tags") if answer.status == 200 else None
        except (ValueError, AttributeError, RecursionError):
            found = None
        return tuple(str(tag) for tag in found) if isinstance(found, list) else ()

    def refused(self, answer: Answer, doing: str) -> TransferError:
        """Say what an answer means; the registry's own words are not repeated, only its code."""
        host, place = self.target.host, self.target.repository
        code = _error_code(answer.body)
        login = (
            "add ~/.ollama/id_ed25519.pub at https://ollama.com/settings/keys, and publish below "
            "your own name"
            if self.target.kind == "ollama"
            else f"log in with `docker login {host}`, as who may do this"
        )
        meaning = {
            401: f"it wants a login for {place}: {login}",
            403: f"your login may not do this in {place}: {login}",
            404: f"it has no {place}, or hides it",
            413: "something in front of it takes no body of this size: for nginx set "
            "client_max_body_size 0, or send less at once with --chunk-mib",
            507: "it has no space left",
        }.get(answer.status, "nothing was tagged; try again later")
        said = f"{answer.status} {code}".rstrip()
        return TransferError(f"{doing}: {shown(host)} answers {said}: {meaning}")


def _check_type(found: Manifest) -> None:
    """Refuse bytes whose own media type is another than the header's (CVE-2021-41190)."""
    try:
        document = json.loads(found.data)
    except (ValueError, RecursionError):
        document = None
    stated = document.get("mediaType", found.media_type) if isinstance(document, dict) else None
    if stated != found.media_type:
        raise TransferError(
            f"a manifest came as {shown(found.media_type)} and says {shown(stated)}; refused"
        )


def _error_code(body: bytes) -> str:
    try:
        code = json.loads(body)["errors"][0]["code"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return ""
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""
