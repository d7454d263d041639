"""The verdict of a parity check as it stands in a pack: parity.json, its page, and pack.json.

No text of a user, no time, host or path is in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from medllm_pack import files
from medllm_pack.pack import manifest, papers
from medllm_pack.parity.checks import Verdict, rounded
from medllm_pack.parity.measures import KLD_EDGES, KLD_QUANTILES
from medllm_pack.parity.report import page as report
from medllm_pack.parity.texts import Texts

NAME = "parity.json"
SCHEMA = 1
_KEY_FIGURES = ("kld_mean", "kld_p99", "top1", "ppl", "ppl_ratio")
_REFERENCE = ("torch", "transformers", "peft")


def describe(
    texts: Texts, verdicts: Sequence[Verdict], way: Mapping[str, str], runtime: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of parity.json.

    Args:
        texts: what was predicted.
        verdicts: one a variant.
        way: how the reference was computed.
        runtime: how llama.cpp was run.
    """
    return {
        "schema": SCHEMA,
        "passed": all(verdict.passed for verdict in verdicts),
        "texts": texts.document(),
        "tools": manifest.tools() | {name: version(name) for name in _REFERENCE},
        "reference": dict(way),
        "llama.cpp": dict(runtime),
        "kld": {"edges": list(KLD_EDGES), "quantiles": list(KLD_QUANTILES)},
        "variants": [verdict.document() for verdict in verdicts],
    }


def summary(texts: Texts, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the entry ``parity`` of pack.json."""
    return {
        "passed": all(verdict.passed for verdict in verdicts),
        "texts": texts.document(),
        "variants": [
            {
                "quant": verdict.quant,
                "passed": verdict.passed,
                "failed": verdict.failed.name if verdict.failed else None,
                "limits": [departure.document() for departure in verdict.departures],
            }
            | {name: rounded(verdict.figures.get(name)) for name in _KEY_FIGURES}
            for verdict in verdicts
        ],
    }


def require_place(folder: Path) -> None:
    """Find out now, and not after hours, whether a verdict can be written into a pack.

    Raises:
        WriteError: if not.
    """
    with files.translated(folder / NAME, elsewhere="a copy of the pack in a folder of yours"):
        TemporaryFile(dir=folder).close()


def write(
    folder: Path,
    document: manifest.Document,
    texts: Texts,
    verdicts: Sequence[Verdict],
    way: Mapping[str, str],
    runtime: Mapping[str, Any],
) -> None:
    """Write the verdict into a pack.

    Args:
        folder: the pack.
        document: the content of its pack.json.
        texts: what was predicted.
        verdicts: one a variant.
        way: how the reference was computed.
        runtime: how llama.cpp was run.

    Raises:
        SourceError: if pack.json or SHA256SUMS cannot be understood.
        WriteError: if the disk says no.
    """
    verdict = document | {"parity": summary(texts, verdicts)}
    parity = describe(texts, verdicts, way, runtime)
    more = {NAME: files.canonical_json(parity), report.NAME: report.page(verdict, parity)}
    papers.update(folder, verdict, more)
