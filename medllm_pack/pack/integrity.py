"""Is a pack still what was built? Its files against SHA256SUMS and pack.json, byte for byte.

SHA256SUMS names every file of a pack but itself and the signature, and nothing else may be there.
It finds accidents of every kind; who can write to the folder can also write new sums, and against
that only a signature helps (publish/signing.py). Every fault is a sentence; nothing is repaired.

Memory: a buffer. Every byte of what is asked for is read.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import Keys

from medllm_pack.errors import GGUFError, shown
from medllm_pack.gguf.reader import GGUFFile, read_gguf
from medllm_pack.known import Known
from medllm_pack.pack import manifest
from medllm_pack.pack.sums import BESIDE, SUMS
from medllm_pack.progress import Reporter


def listing_faults(
    folder: Path, names: Collection[str], *, spared: Collection[str] = ()
) -> Iterator[str]:
    """Yield which files are missing from a folder, are there without being named, or are odd.

    Args:
        folder: the pack.
        names: what SHA256SUMS names.
        spared: names that may be missing, where a pack was fetched in part.
    """
    present = {entry.name: entry for entry in os.scandir(folder)}
    for name in sorted(set(names) - set(present) - set(spared)):
        yield f"{name} is missing"
    for name, entry in sorted(present.items()):
        if name in BESIDE or name in names:
            if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                yield f"{shown(name)} is not a regular file"
        else:
            yield f"{shown(name)} is not part of the pack: {SUMS} does not name it"


def agreement_faults(document: Mapping[str, Any], sums: Mapping[str, str]) -> Iterator[str]:
    """Yield where pack.json and SHA256SUMS contradict each other."""
    for variant in document["variants"]:
        stated = sums.get(variant["file"])
        if stated != variant["sha256"]:
            yield (
                f"{variant['file']}: pack.json states SHA-256 {variant['sha256'][:12]}…, {SUMS} "
                f"{'nothing' if stated is None else f'{stated[:12]}…'}"
            )
    named = {manifest.NAME, *document["license"]["files"]}
    named |= {variant["modelfile"] for variant in document["variants"]}
    for name in sorted(named - set(sums)):
        yield f"{name} is not in {SUMS}"


def digest_faults(
    folder: Path, sums: Mapping[str, str], *, report: Reporter, sizes: Mapping[str, int] = {}
) -> Iterator[str]:
    """Read the files and yield those whose bytes are not the ones that were written.

    Every byte is read, whatever is known; what is found of large files is remembered.

    Args:
        folder: the pack.
        sums: the files to read, with their digests; missing ones are not spoken of here.
        report: listener.
        sizes: what pack.json states; a file of another size is not read.
    """
    here = {name: folder / name for name in sums if (folder / name).is_file()}
    total = sum(path.stat().st_size for path in here.values())
    report.step("reading every byte", total_bytes=total)
    known = Known()
    for name, path in here.items():
        size = path.stat().st_size
        if size != sizes.get(name, size):
            yield f"{name} has {size} bytes, pack.json states {sizes[name]}"
            continue
        try:
            found = known.digest(path, advance=report.advance)
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
            continue
        if found != sums[name]:
            yield f"{name} has SHA-256 {found[:12]}…, {SUMS} states {sums[name][:12]}…"


def header_faults(
    folder: Path, document: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield where a GGUF file's header is unsound or is not what pack.json says of it."""
    for variant in variants:
        try:
            header = read_gguf(folder / variant["file"])
        except GGUFError as error:
            yield str(error)
            continue
        yield from header_differences(header, document, variant)


def header_differences(
    header: GGUFFile, document: Mapping[str, Any], variant: Mapping[str, Any]
) -> Iterator[str]:
    """Yield where a header, wherever it was read, is not what pack.json says of the variant."""
    types = dict(Counter(tensor.type for tensor in header.tensors))
    pairs = (
        ("bytes", header.size, variant["size"]),
        ("parameters", header.parameters, variant["parameters"]),
        ("tensors by type", types, variant["types"]),
        ("the name", header.metadata.get(Keys.General.NAME), document["name"]),
        ("the licence", header.metadata.get(Keys.General.LICENSE), document["license"]["id"]),
    )
    for what, found, stated in pairs:
        if found != stated:
            yield f"{variant['file']}: {what} {shown(found)}, pack.json states {shown(stated)}"
