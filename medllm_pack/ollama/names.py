"""Model names as Ollama reads them: ``[host/][namespace/]model[:tag]``.

Knows nothing of the store or of registries, and fills in no defaults: what was not said stays
unsaid, so a name prints as it was written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from medllm_pack.errors import UsageError, shown

# ollama types/model/name.go, isValidPart: first character, further characters, greatest length.
_PARTS = {
    "host": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,349}"),
    "namespace": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,79}"),
    "model": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,79}"),
    "tag": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,79}"),
}


@dataclass(frozen=True)
class ModelName:
    """A name for ``ollama create``, ``run`` and ``push``; ``parse(str(name)) == name``."""

    model: str
    tag: str | None = None
    namespace: str | None = None
    host: str | None = None

    def __str__(self) -> str:
        path = "/".join(part for part in (self.host, self.namespace, self.model) if part)
        return f"{path}:{self.tag}" if self.tag else path

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read a name such as ``clinical-br:7b-q4_k_m`` or ``me/clinical-br``.

        Raises:
            UsageError: naming the part that Ollama would refuse.
        """
        path, colon, tag = (
            text.rpartition(":") if ":" in text.rpartition("/")[2] else (text, "", "")
        )
        parts: dict[str, str] = dict(
            zip(("model", "namespace", "host"), _split(path), strict=False)
        )
        if colon:
            parts["tag"] = tag
        for kind, part in parts.items():
            if not _PARTS[kind].fullmatch(part):
                raise UsageError(_refusal(text, kind=kind, part=part))
        return cls(**parts)


def _split(path: str) -> list[str]:
    """Return model, namespace and host, as far as they are there."""
    return path.rsplit("/", 2)[::-1]


def _refusal(text: str, *, kind: str, part: str) -> str:
    return (
        f"{shown(text)} is not a model name: Ollama does not take {shown(part)} as a {kind}; "
        "write [host/][namespace/]model[:tag] with ASCII letters, digits, '-', '_' and, "
        "except in a namespace, '.'"
    )
