"""The gate: what a pack must be before anybody else gets it.

Refuses, with every reason at once, a pack that was changed, whose parity is missing, failed, or was
judged by limits that its recipe loosened, that lacks what its licence asks for, or that claims a
licence its base does not allow. All but the first can be overridden, by name; what was overridden
goes into everything that is published, so that who receives the model knows. Knows nothing of
targets and sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from medllm_pack import files
from medllm_pack.errors import GateError, MedllmError, UsageError, shown
from medllm_pack.known import Identity
from medllm_pack.limits import described
from medllm_pack.pack import integrity
from medllm_pack.pack.manifest import NAME, Document, chosen
from medllm_pack.pack.shape import read_pack
from medllm_pack.pack.sums import read_sums
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish import licences

PARITY_MISSING = "parity-missing"
PARITY_FAILED = "parity-failed"
PARITY_LOOSENED = "parity-loosened"
LICENCE_CLAIM = "licence-claim"
LICENCE_DUTY = "licence-duty:"

_PLAIN = (PARITY_MISSING, PARITY_FAILED, PARITY_LOOSENED, LICENCE_CLAIM)
ACCEPTABLE = (*_PLAIN, f"{LICENCE_DUTY}NAME")
SCHEMA = 1

# Annotations of what is published; the values are short texts.
ANNOTATIONS = "medllm-pack."


@dataclass(frozen=True)
class Reason:
    """Something that closes the gate.

    Attributes:
        name: what ``--accept`` must name to go on; None if nothing can open the gate.
        text: a sentence.
    """

    name: str | None
    text: str


@dataclass(frozen=True)
class Permit:
    """The right to publish variants of a pack, and what must be said along with them.

    Attributes:
        folder: the pack.
        document: its pack.json.
        pack_sha256: digest of pack.json.
        variants: the entries of pack.json that may be published, in its order.
        overrides: the reasons that were accepted by name.
        identities: file name -> what the file system said of it before its bytes were hashed.
    """

    folder: Path
    document: Document = field(repr=False)
    pack_sha256: str
    variants: tuple[Document, ...] = field(repr=False)
    overrides: tuple[Reason, ...]
    identities: Mapping[str, Identity] = field(repr=False)

    @property
    def quants(self) -> tuple[str, ...]:
        """The variants by name."""
        return tuple(variant["quant"] for variant in self.variants)

    def unchanged(self, name: str) -> bool:
        """Say whether a file is still the one whose bytes were hashed for this permit."""
        try:
            return Identity.of(self.folder / name) == self.identities[name]
        except (OSError, KeyError):
            return False

    def publication(self) -> dict[str, Any]:
        """Return what is published with every target, as ``publication.json``."""
        return {
            "schema": SCHEMA,
            "name": self.document["name"],
            "pack": {"file": NAME, "sha256": self.pack_sha256},
            "variants": [
                {key: variant[key] for key in ("quant", "file", "size", "sha256")}
                for variant in self.variants
            ],
            "license": self.document["license"]["id"],
            "parity": {variant["quant"]: self._verdict(variant) for variant in self.variants},
            "limits": {v["quant"]: departures_of(self.document, v["quant"]) for v in self.variants},
            "deviations": list(self.document["deviations"]),
            "overrides": [{"name": o.name, "reason": o.text} for o in self.overrides],
        }

    def annotations(self, quant: str | None = None) -> dict[str, str]:
        """Return the same in brief, for manifests.

        Args:
            quant: only this variant's verdict counts; the worst of all if None.
        """
        verdicts = {
            self._verdict(v) for v in self.variants if quant in (None, v["quant"])
        }  # fmt: skip
        worst = next(word for word in ("failed", "missing", "passed") if word in verdicts)
        said = {
            "pack": f"sha256:{self.pack_sha256}",
            "license": str(self.document["license"]["id"]),
            "parity": worst,
            "deviations": "; ".join(self.document["deviations"]),
            "overrides": ",".join(str(reason.name) for reason in self.overrides),
        }
        return {ANNOTATIONS + key: value for key, value in said.items() if value}

    def _verdict(self, variant: Document) -> str:
        passed = verdict_of(self.document, variant["quant"])
        return {True: "passed", False: "failed", None: "missing"}[passed]


def check(
    folder: Path,
    quants: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    report: Reporter = SILENT,
) -> Permit:
    """Decide whether variants of a pack may be published.

    Every byte of what would be published is read and hashed.

    Args:
        folder: the pack.
        quants: the variants; all if empty.
        overrides: names of reasons that are accepted, such as ``parity-missing``.
        report: listener.

    Raises:
        UsageError: if a variant or an override does not exist.
        SourceError: if the folder is no pack.
        GateError: with every reason why not.
    """
    accepted = parse_overrides(overrides)
    document = read_pack(folder)
    variants = chosen(document, quants)
    before = _identities(folder)
    reasons = tuple(_reasons(folder, document, variants, report))
    refused = [reason for reason in reasons if reason.name not in accepted]
    if refused:
        raise GateError(shown(folder), [_sentence(reason) for reason in refused])
    return Permit(
        folder, document, files.sha256(folder / NAME), variants, reasons, MappingProxyType(before)
    )


def parse_overrides(names: Sequence[str]) -> frozenset[str]:
    """Return the overrides as a set.

    Raises:
        UsageError: if one has no known name.
    """
    for name in names:
        duty = name.removeprefix(LICENCE_DUTY)
        if name not in _PLAIN and duty in (name, ""):
            raise UsageError(
                f"--accept {shown(name)} names nothing that can be accepted; there are "
                f"{', '.join(ACCEPTABLE)}"
            )
    return frozenset(names)


def verdict_of(document: Mapping[str, Any], quant: str) -> bool | None:
    """Return the parity verdict of a variant; None if it was not checked."""
    parity = document["parity"]
    verdicts = {v["quant"]: v["passed"] for v in parity["variants"]} if parity else {}
    return verdicts.get(quant)


def departures_of(document: Mapping[str, Any], quant: str) -> list[Document]:
    """Return the limits of a variant's verdict that are not the shipped ones."""
    verdicts = document["parity"]["variants"] if document["parity"] else ()
    return [one for v in verdicts if v["quant"] == quant for one in v.get("limits", ())]


def licence_reasons(folder: Path, document: Mapping[str, Any]) -> Iterator[Reason]:
    """Yield what the pack lacks that its licence asks for, and what it claims without right."""
    for claim in licences.claim_problems(document):
        yield Reason(LICENCE_CLAIM, claim)
    for duty in licences.duties(document):
        text = _text(folder / duty.file)
        if not licences.fulfils(duty, text):
            fact = "is missing" if text is None else "does not hold it"
            yield Reason(
                f"{LICENCE_DUTY}{duty.name}",
                f"the licence asks for {duty.asks}: {duty.file} {fact}. Put it beside the weights "
                "of the base, or into the recipe, and build again",
            )


def parity_reasons(
    document: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]
) -> Iterator[Reason]:
    """Yield which variants are not proven to be the model they were made from."""
    verdicts = {v["quant"]: verdict_of(document, v["quant"]) for v in variants}
    if missing := [quant for quant, passed in verdicts.items() if passed is None]:
        yield Reason(
            PARITY_MISSING,
            f"{', '.join(missing)}: not compared with the model it was made from; run "
            "medllm-pack parity on the pack",
        )
    if failed := [quant for quant, passed in verdicts.items() if passed is False]:
        yield Reason(
            PARITY_FAILED,
            f"{', '.join(failed)}: parity says that this is not the model it was made from",
        )
    if loosened := [text for quant in verdicts for text in _loosened(document, quant)]:
        yield Reason(
            PARITY_LOOSENED,
            f"{'; '.join(loosened)}: the verdict is by limits that the recipe loosened; take them "
            "out of its table [parity], build again and run medllm-pack parity",
        )


def _loosened(document: Mapping[str, Any], quant: str) -> Iterator[str]:
    said = [described(one) for one in departures_of(document, quant) if one["looser"]]
    if said:
        yield f"{quant}: {', '.join(said)}"


def _reasons(
    folder: Path, document: Document, variants: Sequence[Document], report: Reporter
) -> Iterator[Reason]:
    for fault in _faults(folder, document, variants, report):
        yield Reason(None, fault)
    yield from parity_reasons(document, variants)
    yield from licence_reasons(folder, document)


def _faults(
    folder: Path, document: Document, variants: Sequence[Document], report: Reporter
) -> Iterator[str]:
    """Yield what is not as it was built; weights of other variants may be absent."""
    try:
        sums = read_sums(folder)
    except MedllmError as error:
        yield str(error)
        return
    others = {v["file"] for v in document["variants"]} - {v["file"] for v in variants}
    yield from integrity.listing_faults(folder, sums, spared=others)
    yield from integrity.agreement_faults(document, sums)
    wanted = {name: digest for name, digest in sums.items() if name not in others}
    sizes = {variant["file"]: variant["size"] for variant in variants}
    yield from integrity.digest_faults(folder, wanted, report=report, sizes=sizes)
    yield from integrity.header_faults(folder, document, variants)


def _identities(folder: Path) -> dict[str, Identity]:
    return {path.name: Identity.settled(path) for path in folder.iterdir() if path.is_file()}


def _text(path: Path) -> str | None:
    try:
        return files.read_small(path, limit=4 << 20).decode("utf-8")
    except (MedllmError, UnicodeDecodeError):
        return None


def _sentence(reason: Reason) -> str:
    if reason.name is None:
        return reason.text
    return f"{reason.text} (or --accept {reason.name})"
