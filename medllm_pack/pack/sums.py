"""SHA256SUMS: the one reader of it, the one writer, and the names that may stand in it.

Every line is one that ``sha256sum`` would write for a plain name; anything else is refused, since a
pack may come from anywhere and names in it become paths. Knows nothing of what the files are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from medllm_pack import files
from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError, shown

SUMS: Final = "SHA256SUMS"
SIGNATURE: Final = "model.sig"
# What cannot be in SHA256SUMS: itself, and a signature over all files.
BESIDE: Final = (SUMS, SIGNATURE)

# One path component that every file system takes, also with what is put around it while the file
# is being written: the names that packs have (the longest is a recipe's name, a mix's and ".gguf"),
# and no others.
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+\-]{0,159}", re.ASCII)
_DEVICES: Final = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_LINE: Final = re.compile(r"([0-9a-f]{64})  (.+)", re.ASCII)


def checked_name(name: object, *, of: str) -> str:
    """Return a file name that may be joined to a folder.

    Args:
        name: text from outside.
        of: what it is the name of, for the message.

    Raises:
        SourceError: if it is not one plain component.
    """
    if (
        not isinstance(name, str)
        or not _NAME.fullmatch(name)
        or _DEVICES.fullmatch(name)
        or name.endswith(".")
    ):
        raise SourceError(
            f"{of} names a file {shown(name)}; only plain names of ASCII letters, digits, '.', "
            "'_', '+' and '-' are accepted"
        )
    return name


def parse_sums(data: bytes, *, of: str = SUMS) -> dict[str, Digest]:
    """Return file name -> digest as SHA256SUMS has it; ``of`` names it in messages.

    Raises:
        SourceError: if a line is not a digest and a plain name, or a name stands twice.
    """
    sums: dict[str, Digest] = {}
    lines = data.decode("utf-8", "replace").split("\n")
    if lines.pop() != "":
        raise SourceError(f"{of} does not end with a line break; it is damaged")
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums or match[2] in BESIDE:
            raise SourceError(f"line {number} of {of} is not a digest and a new plain name")
        sums[checked_name(match[2], of=f"line {number} of {of}")] = Digest(match[1])
    return sums


def read_sums(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 as a pack's SHA256SUMS has it.

    Raises:
        SourceError: if it is missing, or not as :func:`parse_sums` wants it.
    """
    return {name: d.hex for name, d in parse_sums(files.read_small(folder / SUMS)).items()}


def text_of(sums: Mapping[str, str]) -> str:
    """Return the text of SHA256SUMS; ``parse_sums`` reads it back."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
