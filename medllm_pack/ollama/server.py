"""The door to an Ollama server: the few calls of its HTTP API that this package makes.

The address is ``OLLAMA_HOST``'s, read as Ollama's own client reads it. Nothing is followed: no
redirect, no proxy of the environment. An answer of unexpected form or size is a
:class:`~medllm_pack.errors.ServerError`. Knows nothing of packs; the calls are those of Ollama's
docs/api.md.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit

from medllm_pack.digests import Digest
from medllm_pack.errors import ServerError, UsageError, shown
from medllm_pack.ollama.image import Blob

Document = dict[str, Any]

# ollama envconfig/config.go, Host().
_DEFAULT: Final = "127.0.0.1:11434"
_PORTS: Final = {"http": 80, "https": 443}
_ANSWER_LIMIT: Final = 16 << 20  # bytes; /api/show repeats the licence, the rest is small


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens; ``parse(str(address)) == address``.

    Attributes:
        scheme: ``http`` or ``https``.
        path: what stands before ``/api``, without a slash at its end; usually empty.
    """

    scheme: str
    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``[scheme://]host[:port][/path]`` as ``OLLAMA_HOST`` holds it.

        Raises:
            UsageError: if it is no address.
        """
        given = text.strip().strip("\"'") or _DEFAULT
        scheme, colon, rest = given.partition("://")
        if not colon:
            scheme, rest = "http", given
        try:
            parts = urlsplit(f"//{rest}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(_refusal(text)) from error
        if scheme not in _PORTS or parts.username is not None or parts.query or parts.fragment:
            raise UsageError(_refusal(text))
        if port is None:
            port = _PORTS[scheme] if colon else 11434
        return cls(scheme, host or "127.0.0.1", port, parts.path.rstrip("/"))


def _refusal(text: str) -> str:
    return (
        f"OLLAMA_HOST {shown(text)} is not the address of an Ollama server; it is written "
        f"http://{_DEFAULT}"
    )


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model wrote.

    Attributes:
        text: without the prompt.
        read: tokens of the prompt, as the server counts them; None if it does not say. Some
            versions leave out those that they had kept from the prompt before.
    """

    text: str
    read: int | None


@dataclass(frozen=True, slots=True)
class Server:
    """An Ollama server.

    Attributes:
        address: where it listens.
        timeout: seconds without a byte after which a call is given up; loading a model takes long.
    """

    address: Address
    timeout: float = 600.0

    @classmethod
    def from_environment(cls, *, timeout: float = 600.0) -> Server:
        """Return the server that ``OLLAMA_HOST`` names, or the one of this machine."""
        return cls(Address.parse(os.environ.get("OLLAMA_HOST", "")), timeout)

    def version(self, *, timeout: float = 3.0) -> str:
        """Return the server's version; asked first, with little patience, to see if it is there."""
        return _text(self.call("GET", "/api/version", timeout=timeout), "version")

    def show(self, model: str) -> Document:
        """Return what the server says of a model: its ``modelfile`` above all.

        Raises:
            ServerError: also if there is no such model.
        """
        return self.call("POST", "/api/show", {"model": model})

    def generate(
        self, model: str, prompt: str, *, raw: bool, options: Mapping[str, Any], system: str = ""
    ) -> Generated:
        """Return what a model writes after a prompt.

        Args:
            model: its name on the server.
            prompt: the text.
            raw: whether the prompt goes to the model without the template.
            options: of ``PARAMETER``; they replace the model's one by one.
            system: system text in place of the model's; not used with ``raw``.
        """
        question = {
            "model": model, "prompt": prompt, "raw": raw, "stream": False, "options": dict(options),
        }  # fmt: skip
        if system:
            question["system"] = system
        answer = self.call("POST", "/api/generate", question)
        read = answer.get("prompt_eval_count")  # left out where it is 0
        return Generated(_text(answer, "response"), read if isinstance(read, int) else None)

    def models(self) -> dict[str, str]:
        """Return name -> manifest digest in hex of every model the server has."""
        listed = self.call("GET", "/api/tags").get("models") or []
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise ServerError(f"{self.address}/api/tags lists no models; is it Ollama?")
        return {_text(item, "name"): str(item.get("digest", "")) for item in listed}

    def has_blob(self, digest: Digest) -> bool:
        """Say whether the server's store holds a blob."""
        status = self._blob("HEAD", digest, None, {})
        if status not in (http.client.OK, http.client.NOT_FOUND):
            raise ServerError(f"{self.address} answered {status} when asked for a blob")
        return status == http.client.OK

    def send_blob(self, blob: Blob, *, advance: Callable[[int], None]) -> None:
        """Send a blob's bytes; the server compares them with the digest."""
        with blob.open() as file:
            body = _Counted(file, advance)
            status = self._blob("POST", blob.digest, body, {"Content-Length": str(blob.size)})
        if status not in (http.client.OK, http.client.CREATED):
            raise ServerError(f"{self.address} answered {status} to the blob {blob.digest}")

    def create(self, model: str, question: Document) -> None:
        """Make a model of blobs that the server has; ``question`` as /api/create takes it."""
        self.call("POST", "/api/create", {"model": model, "stream": False} | question)

    def _blob(self, method: str, digest: Digest, body: Any, headers: dict[str, str]) -> int:
        path = f"/api/blobs/{digest}"
        connection = self.connect(timeout=self.timeout)
        connection.blocksize = 1 << 20
        try:
            connection.request(method, self.address.path + path, body, headers)
            with connection.getresponse() as response:
                response.read(_ANSWER_LIMIT)
                return response.status
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(path, error) from error
        finally:
            connection.close()

    def call(
        self, method: str, path: str, question: Document | None = None, *, timeout: float = 0
    ) -> Document:
        """Send one request and return the JSON object that answers it.

        Raises:
            ServerError: if the server is not there, says no, or answers something else.
        """
        body = None if question is None else json.dumps(question).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection = self.connect(timeout=timeout or self.timeout)
        try:
            connection.request(method, self.address.path + path, body, headers)
            with connection.getresponse() as response:
                status, data = response.status, response.read(_ANSWER_LIMIT + 1)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(path, error) from error
        finally:
            connection.close()
        return self._read(path, status, data)

    def connect(self, *, timeout: float) -> http.client.HTTPConnection:
        """Return a connection that is not open yet."""
        kind = (
            http.client.HTTPSConnection
            if self.address.scheme == "https"
            else http.client.HTTPConnection
        )
        return kind(self.address.host, self.address.port, timeout=timeout)

    def _unreachable(self, path: str, error: Exception) -> ServerError:
        fact = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ServerError(
            f"the Ollama server at {self.address} does not answer {path} ({fact}); start it with "
            "'ollama serve', or name another with OLLAMA_HOST"
        )

    def _read(self, path: str, status: int, data: bytes) -> Document:
        if len(data) > _ANSWER_LIMIT:
            raise ServerError(
                f"{self.address}{path} answered more than {_ANSWER_LIMIT} bytes; is it Ollama?"
            )
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        if status != http.client.OK:
            said = document.get("error") if isinstance(document, dict) else None
            raise ServerError(
                f"{self.address}{path} answered {status}: {shown(said or 'without a reason')[:300]}"
            )
        if not isinstance(document, dict):
            raise ServerError(f"{self.address}{path} answered no JSON object; is it Ollama?")
        return document


class _Counted:
    """A file that tells how much of it was read."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def read(self, n: int) -> bytes:
        data = self._file.read(n)
        self._advance(len(data))
        return data


def _text(document: Document, key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise ServerError(f"the Ollama server's answer has no text {key!r}; is it Ollama?")
    return value
