"""The verdict of a parity check as it stands in a pack: parity.json, pack.json, SHA256SUMS.

Each file is replaced in one step, SHA256SUMS last: a run that is killed in between leaves sums that
do not fit, which ``sha256sum -c`` says and the next run repairs. No text of a user, no time, host
or path is in them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medllm_pack import files
from medllm_pack.pack import manifest
from medllm_pack.parity.checks import Verdict, rounded
from medllm_pack.parity.texts import Texts

NAME = "parity.json"
SCHEMA = 1
_SUMS = "SHA256SUMS"
_KEY_FIGURES = ("kld_mean", "kld_p99", "top1", "ppl", "ppl_ratio")
_REFERENCE = ("torch", "transformers", "peft")


def describe(texts: Texts, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the content of parity.json."""
    return {
        "schema": SCHEMA,
        "passed": all(verdict.passed for verdict in verdicts),
        "texts": texts.document(),
        "tools": manifest.tools() | {name: version(name) for name in _REFERENCE},
        "variants": [verdict.document() for verdict in verdicts],
    }


def summary(texts: Texts, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the entry ``parity`` of pack.json."""
    return {
        "passed": all(verdict.passed for verdict in verdicts),
        "texts": texts.document(),
        "variants": [
            {"quant": verdict.quant, "passed": verdict.passed}
            | {name: rounded(verdict.figures.get(name)) for name in _KEY_FIGURES}
            for verdict in verdicts
        ],
    }


def write(
    folder: Path, document: manifest.Document, texts: Texts, verdicts: Sequence[Verdict]
) -> None:
    """Write the verdict into a pack.

    Args:
        folder: the pack.
        document: the content of its pack.json.
        texts: what was predicted.
        verdicts: one a variant.

    Raises:
        WriteError: if the disk says no.
    """
    contents = {
        NAME: files.canonical_json(describe(texts, verdicts)),
        manifest.NAME: files.canonical_json(document | {"parity": summary(texts, verdicts)}),
    }
    for name, content in contents.items():
        _replace(folder / name, content)
    _replace(folder / _SUMS, _sums(folder, sorted(contents)))


def _replace(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    with files.translated(path):
        try:
            files.write_text(partial, content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        files.sync_folder(path.parent)


def _sums(folder: Path, changed: Sequence[str]) -> str:
    """Return SHA256SUMS with the lines of changed files anew; the others stay as they are."""
    lines = files.read_small(folder / _SUMS).decode("utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    sums |= {name: files.sha256(folder / name) for name in changed}
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
