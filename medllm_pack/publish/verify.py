"""Is a pack what it says it is? Every check that needs nothing but the pack, and a signer's key.

A check says yes, no, or that it was not asked. Nothing is repaired and nothing is written. A GGUF
file alone gets the checks that make sense for it; what was published is in verify_published.py and
verify_hub.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medllm_pack
from medllm_pack.errors import CheckFailedError, GGUFError, MedllmError, SourceError, shown
from medllm_pack.gguf.reader import read_gguf
from medllm_pack.pack import integrity, manifest, papers
from medllm_pack.pack.shape import read_pack
from medllm_pack.pack.sums import SIGNATURE, SUMS, read_sums
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish import gate, signing


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: such as ``digests``.
        passed: None if it was not asked.
        detail: a sentence; where the answer is no, what is wrong.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verified:
    """All checks of one thing, in order."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that say no."""
        return tuple(check for check in self.checks if check.passed is False)

    def document(self) -> dict[str, Any]:
        """Return the result as ``verify --json`` prints it."""
        return {
            "subject": self.subject,
            "passed": not self.failed,
            "checks": [
                {"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks
            ],
        }

    def raise_if_failed(self) -> None:
        """Raise if a check says no.

        Raises:
            CheckFailedError: naming the first.
        """
        if self.failed:
            first = self.failed[0]
            more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
            raise CheckFailedError(f"{self.subject}: {first.name}: {first.detail}{more}")


def verify_pack(
    folder: Path,
    *,
    key: Path | None = None,
    quants: Sequence[str] = (),
    report: Reporter = SILENT,
) -> Verified:
    """Check a pack.

    Args:
        folder: the pack.
        key: the signer's public key; the signature is not checked without.
        quants: only these variants, which must be here. If empty, those that are: a pack may have
            been fetched in part, and the check of the variants tells which.
        report: listener.

    Raises:
        SourceError: if the folder is no pack at all.
        UsageError: if the key cannot be read.
    """
    if not any((folder / name).exists() for name in (manifest.NAME, SUMS)):
        raise SourceError(f"{shown(folder)} is no pack: there is no {manifest.NAME} in it")
    checks: list[Check] = []
    document = attempt(checks, "pack.json", lambda: read_pack(folder))
    sums = attempt(checks, "sums", lambda: read_sums(folder))
    variants = _here(folder, document, quants) if document is not None else ()
    if sums is not None:
        spared = _weights(document) - {v["file"] for v in variants} if document else set()
        read = {name: digest for name, digest in sums.items() if name not in spared}
        checks.append(all_of("files", integrity.listing_faults(folder, sums, spared=spared),
                           f"all {len(read)} are there, and nothing else"))  # fmt: skip
        checks.append(all_of("digests", integrity.digest_faults(folder, read, report=report),
                           "every byte is the one that was written"))  # fmt: skip
    if sums is not None and document is not None:
        checks.append(all_of("agreement", integrity.agreement_faults(document, sums),
                           "pack.json and SHA256SUMS state the same digests"))  # fmt: skip
    if document is not None:
        checks.append(variants_check(document, variants))
        checks += _of_document(folder, document, variants)
    checks.append(_signature(folder, key))
    return Verified(str(folder), tuple(checks))


def verify_gguf(path: Path, *, report: Reporter = SILENT) -> Verified:
    """Check a GGUF file: its header, and its digest where a SHA256SUMS lies beside it."""
    try:
        header = read_gguf(path)
        checks = [Check("header", True, f"{len(header.tensors)} tensors, no gap and no rest")]
    except GGUFError as error:
        checks = [Check("header", False, str(error))]
    if not (path.parent / SUMS).exists():
        checks.append(Check("digest", None, f"there is no {SUMS} beside the file"))
        return Verified(str(path), tuple(checks))
    sums = attempt(checks, "sums", lambda: read_sums(path.parent))
    if sums is not None and path.name not in sums:
        checks.append(Check("digest", False, f"{SUMS} does not name {path.name}"))
    elif sums is not None:
        faults = integrity.digest_faults(path.parent, {path.name: sums[path.name]}, report=report)
        checks.append(all_of("digest", faults, f"SHA-256 {sums[path.name]}"))
    return Verified(str(path), tuple(checks))


def variants_check(document: manifest.Document, here: Sequence[manifest.Document]) -> Check:
    """Return how many of a pack's variants were looked at; not asked of the others."""
    named = ", ".join(variant["quant"] for variant in here)
    n, m = len(here), len(document["variants"])
    if n == 0:
        return Check("variants", False, f"none of {m} is here")
    if n == m:
        return Check("variants", True, f"{n} of {m} are here: {named}")
    return Check(
        "variants",
        None,
        f"{n} of {m} are here and were checked: {named}; nothing is said of the others",
    )


def _here(
    folder: Path, document: manifest.Document, quants: Sequence[str]
) -> Sequence[manifest.Document]:
    """Return the variants that are meant; if none is named those whose weights are here."""
    return manifest.chosen(document, quants) if quants else manifest.here(folder, document)


def _weights(document: manifest.Document) -> set[str]:
    return {variant["file"] for variant in document["variants"]}


def _of_document(
    folder: Path, document: manifest.Document, variants: Sequence[manifest.Document]
) -> list[Check]:
    return [
        all_of("headers", integrity.header_faults(folder, document, variants),
               "sizes, types, name and licence are those of pack.json"),
        *of_papers(folder, document, variants),
    ]  # fmt: skip


def of_papers(
    folder: Path, document: manifest.Document, variants: Sequence[manifest.Document]
) -> list[Check]:
    """Return the checks that need the papers alone, wherever the weights are."""
    licence = (reason.text for reason in gate.licence_reasons(folder, document))
    return [
        _papers(folder, document),
        all_of("licence", licence, f"{shown(document['license']['id'])}: its duties are fulfilled"),
        parity_check(document, variants),
    ]


def _papers(folder: Path, document: manifest.Document) -> Check:
    made_by = document["tools"].get("medllm-pack")
    if made_by != medllm_pack.__version__:  # it may have worded them otherwise
        return Check("papers", None, f"made by version {shown(made_by)}, this is another")
    return all_of("papers", _paper_faults(folder, document), "what derives from pack.json does")


def _paper_faults(folder: Path, document: manifest.Document) -> Iterable[str]:
    try:
        expected = papers.derived(document)
    except MedllmError as error:
        yield str(error)
        return
    for name, text in expected.items():
        path = folder / name
        if path.is_file() and path.read_bytes() != text.encode("utf-8"):
            yield f"{name} is not what this version derives from pack.json"


def parity_check(document: manifest.Document, variants: Sequence[manifest.Document]) -> Check:
    """Return what parity said of variants; not asked if it was not run."""
    if not variants:
        return Check("parity", None, "there is no variant to speak of")
    reasons = gate.parity_reasons(document, variants)
    faults = {reason.name: reason.text for reason in reasons}
    if gate.PARITY_FAILED in faults:
        return Check("parity", False, faults[gate.PARITY_FAILED])
    if gate.PARITY_MISSING in faults:
        return Check("parity", None, faults[gate.PARITY_MISSING])
    if gate.PARITY_LOOSENED in faults:
        return Check("parity", None, faults[gate.PARITY_LOOSENED])
    return Check("parity", True, "every variant is the model it was made from")


def publication_check(overrides: Callable[[], Iterable[str]]) -> Check:
    """Return what was accepted by name when something was published: told, not judged."""
    from medllm_pack.publish.publication import sentence

    try:
        return Check("publication", None, sentence(overrides()))
    except MedllmError as error:
        return Check("publication", False, str(error))


def _signature(folder: Path, key: Path | None) -> Check:
    name = "signature"
    if key is not None:
        fault = signing.check_signature(folder, key=key)
        return Check(name, fault is None, fault or f"made with the key of {key.name}")
    if (folder / SIGNATURE).exists():
        return Check(name, None, f"there is a {SIGNATURE}; --key PUB checks it")
    return Check(name, None, "the pack is not signed")


def all_of(name: str, faults: Iterable[str], good: str) -> Check:
    """Return a check that says no if there is a fault, naming the first."""
    found = list(faults)
    if not found:
        return Check(name, True, good)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Check(name, False, f"{found[0]}{more}")


def attempt(checks: list[Check], name: str, do: Callable[[], Any]) -> Any:
    """Return what ``do`` returns; note a check that says no, and return None, if it cannot."""
    try:
        result = do()
    except MedllmError as error:
        checks.append(Check(name, False, str(error)))
        return None
    checks.append(Check(name, True, "it can be read"))
    return result
