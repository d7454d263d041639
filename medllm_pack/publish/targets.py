"""Where a release goes to and comes from: the four kinds of TARGET and REF texts as values.

    oci://host[:port]/path[:tag][@sha256:…]      any registry
    ollama://[host/]ns/model[:tag]               Ollama's registry, registry.ollama.ai if not said
    hf://org/repo[@revision]                     the Hugging Face Hub
    file://bundle.tar                            an OCI image layout in one file

Values only; whether a target exists is found out by who talks to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medllm_pack.digests import Digest
from medllm_pack.errors import UsageError, shown
from medllm_pack.ollama.names import ModelName

OLLAMA_HOST = "registry.ollama.ai"
FORMS = (
    "oci://host[:port]/ns/model, ollama://ns/model, hf://org/repo or file://bundle.tar; "
    "registries also take :tag"
)

# OCI distribution specification 1.1, "Pulling manifests": names and tags. Upper case in a path is
# refused by registries (404), although Ollama itself allows it.
_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9.\-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?",
    re.ASCII,
)
_HUB_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._\-]{0,94}[A-Za-z0-9])?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._\-/]{0,254})", re.ASCII)
_LONGEST_REPOSITORY = 255


@dataclass(frozen=True)
class RegistryTarget:
    """A repository of a registry; ``parse_target(str(target)) == target``.

    Attributes:
        kind: ``ollama`` where Ollama's own login and uploads are spoken, else ``oci``.
        host: name and, where said, port.
        repository: such as ``ns/model``.
        tag: as it was written, if it was.
        digest: of a manifest; wins over the tag.
    """

    kind: Literal["oci", "ollama"]
    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    def __str__(self) -> str:
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.kind}://{self.host}/{self.repository}{_after(':', self.tag)}{digest}"

    @property
    def reference(self) -> str:
        """What a manifest is asked for by: the digest, else the tag, else ``latest``."""
        return str(self.digest) if self.digest else self.tag or "latest"

    def tagged(self, tag: str) -> RegistryTarget:
        """Return the same repository under a tag.

        Raises:
            UsageError: if no registry would take the tag.
        """
        return replace(self, tag=_checked_tag(tag, tag), digest=None)


@dataclass(frozen=True)
class HubTarget:
    """A model repository on the Hugging Face Hub; ``parse_target(str(target)) == target``."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repository}{_after('@', self.revision)}"


@dataclass(frozen=True)
class BundleTarget:
    """An OCI image layout in one tar file; ``parse_target(str(target)) == target``."""

    path: Path

    def __str__(self) -> str:
        return f"file://{self.path}"


Target = RegistryTarget | HubTarget | BundleTarget


def is_target(text: str) -> bool:
    """Say whether a text is meant as a target rather than as a path."""
    return text.startswith(("oci://", "ollama://", "hf://", "file://"))


def parse_target(text: str) -> Target:
    """Read a TARGET or REF.

    Raises:
        UsageError: naming the part that is wrong.
    """
    kind, separator, rest = text.partition("://")
    if "@" in rest.partition("/")[0] and kind in ("oci", "ollama"):
        # The text itself is not repeated: it may hold a password.
        raise UsageError("a target holds no login; use `docker login HOST` instead")
    match kind if separator else "":
        case "oci":
            return _oci(text, rest)
        case "ollama":
            return _ollama(text, rest)
        case "hf":
            return _hub(text, rest)
        case "file" if rest:
            return BundleTarget(Path(rest))
    raise UsageError(f"{shown(text)} is not a target; write {FORMS}")


def checked_tag(tag: str) -> str:
    """Return a tag that every registry and Ollama take.

    Raises:
        UsageError: if it is not one.
    """
    return _checked_tag(tag, tag)


def _oci(text: str, rest: str) -> RegistryTarget:
    host, _, path = rest.partition("/")
    path, at, digest = path.partition("@")
    repository, colon, tag = path.partition(":")
    _check_host(host, text)
    _check_repository(repository, text)
    return RegistryTarget(
        "ollama" if host.lower() == OLLAMA_HOST else "oci",
        host.lower(),
        repository,
        _checked_tag(tag, text) if colon else None,
        Digest.parse(digest) if at else None,
    )


def _ollama(text: str, rest: str) -> RegistryTarget:
    path, at, digest = rest.partition("@")
    name = ModelName.parse(path)
    if name.namespace is None:
        raise UsageError(f"{shown(text)} has no namespace; write ollama://ns/model, ns your own")
    repository = f"{name.namespace}/{name.model}"
    _check_repository(repository, text)
    host = name.host or OLLAMA_HOST
    _check_host(host, text)
    return RegistryTarget(
        "ollama", host.lower(), repository, name.tag, Digest.parse(digest) if at else None
    )


def _hub(text: str, rest: str) -> HubTarget:
    repository, at, revision = rest.partition("@")
    parts = repository.split("/")
    if len(parts) != 2 or not all(_HUB_PART.fullmatch(part) for part in parts):
        raise UsageError(f"{shown(text)} is not a repository of the Hub; write hf://org/repo")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{shown(text)}: {shown(revision)} is not a branch, tag or commit")
    return HubTarget(repository, revision if at else None)


def _check_host(host: str, text: str) -> None:
    match = _HOST.fullmatch(host)
    if not match or (match["port"] and not 0 < int(match["port"]) < 1 << 16):
        raise UsageError(f"{shown(text)}: {shown(host)} is not a host[:port]; write {FORMS}")


def _check_repository(repository: str, text: str) -> None:
    if not _REPOSITORY.fullmatch(repository) or len(repository) > _LONGEST_REPOSITORY:
        raise UsageError(
            f"{shown(text)}: {shown(repository)} is not a repository; registries take lower-case "
            "letters, digits, '.', '_' and '-', such as ns/model"
        )


def _checked_tag(tag: str, text: str) -> str:
    # Ollama takes 80 characters, registries 128: what is published must fit both.
    if not _TAG.fullmatch(tag) or len(tag) > 80:
        raise UsageError(
            f"{shown(text)}: {shown(tag)} is not a tag; up to 80 ASCII letters, digits, '.', '_' "
            "and '-' are taken, the first no '.' or '-'"
        )
    return tag


def _after(mark: str, part: str | None) -> str:
    return f"{mark}{part}" if part else ""
