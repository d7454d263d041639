"""SHA-256 digests as values: the one form in which a digest may become a path or a URL.

Text from outside becomes a :class:`Digest` or is refused; nothing joins a path from a plain string.
Knows nothing of files: :mod:`medllm_pack.files` computes them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from medllm_pack.errors import DigestError, shown

_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ALGORITHM = "sha256"


@dataclass(frozen=True, order=True, slots=True)
class Digest:
    """A SHA-256; ``Digest.parse(str(digest)) == digest``.

    Attributes:
        hex: 64 lower-case hex digits.
    """

    hex: str

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.hex):
            raise DigestError(f"{shown(self.hex)} is not a SHA-256 of 64 lower-case hex digits")

    def __str__(self) -> str:
        return f"{_ALGORITHM}:{self.hex}"

    @property
    def file_name(self) -> str:
        """The name of a blob's file in Ollama's store, such as ``sha256-1f0c…``."""
        return f"{_ALGORITHM}-{self.hex}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read ``sha256:`` and 64 lower-case hex digits.

        Raises:
            DigestError: if it is anything else.
        """
        algorithm, _, hex_ = text.partition(":")
        if algorithm != _ALGORITHM or not _HEX.fullmatch(hex_):
            raise DigestError(f"{shown(text)} is not a digest; it is written sha256:<64 hex>")
        return cls(hex_)

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """Return the digest of bytes at hand."""
        return cls(hashlib.sha256(data).hexdigest())
