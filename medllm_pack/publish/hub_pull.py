"""A pack from the Hugging Face Hub: pinned to a commit, and checked before and after the way.

What `SHA256SUMS` says decides. The Hub's own digests of the weights are compared with it before a
byte of them comes over; papers are small and compared after. Files come through the Hub's cache,
where an interrupted download is continued by any later process, and are shared with it where the
file system can. Knows nothing of how a pack was published.

Memory: the small files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medllm_pack import files
from medllm_pack.errors import SourceError, UsageError
from medllm_pack.known import Known
from medllm_pack.ollama.placing import place
from medllm_pack.pack.manifest import Document, chosen
from medllm_pack.pack.sums import BESIDE, SUMS
from medllm_pack.patience import Patience
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish.hub_files import HubFiles, checked
from medllm_pack.publish.targets import HubTarget
from medllm_pack.weights.answers import HUB


@dataclass(frozen=True)
class HubPulled:
    """A pack that was brought.

    Attributes:
        folder: where it is.
        commit: the commit that it is from.
        quants: the variants that came along.
        document: its pack.json.
        overrides: what was accepted by name when it was published.
    """

    folder: Path
    commit: str
    quants: tuple[str, ...]
    document: Document
    overrides: tuple[str, ...]


def pull_from_hub(
    target: HubTarget,
    out: Path,
    *,
    quants: Sequence[str] = (),
    replace: bool = False,
    report: Reporter = SILENT,
    patience: Patience | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> HubPulled:
    """Bring a pack into a new folder.

    Args:
        target: the repository, and a branch, tag or commit; ``main`` by default.
        out: the new folder.
        quants: the variants to bring; all that are there if empty.
        replace: whether the folder may replace what is there.
        report: listener.
        patience: how often and how long to try.
        cache: the Hub cache; by default the one of all Hub tools.
        endpoint: address of the Hub; by default HF_ENDPOINT, or huggingface.co.

    Raises:
        UsageError: if the pack has no such variant.
        SourceError: if the repository is no pack, a file of it is missing or is not what its sums
            say, or it cannot be brought.
        WriteError: if the folder exists or cannot be written.
    """
    if out.exists() and not replace:
        raise _exists(out)
    hub = HubFiles(target, report, patience or HUB, cache, endpoint)
    document, sums = hub.manifest()
    variants = _present(chosen(document, quants), hub, asked=bool(quants))
    everywhere = {variant["file"] for variant in document["variants"]}
    papers = [n for n in (*sums, *BESIDE) if n not in everywhere and (n in sums or hub.has(n))]
    hub.require([*papers, *(variant["file"] for variant in variants)])
    for variant in variants:
        hub.check_stated(variant, sums)
    overrides = hub.overrides(sums)
    found = {name: checked(name, path, sums.get(name)) for name, path in hub.bring(papers).items()}
    weights = {v["file"]: hub.weights(v["file"], sums[v["file"]]) for v in variants}
    with files.new_folder(out, replace=replace) as folder, files.translated(out):
        hub.report.step("unpacking", total_bytes=sum(blob.size for blob in weights.values()))
        for name, blob in weights.items():
            place(blob, folder / name, advance=hub.report.advance)
        for name in sorted(found, key=lambda name: name == SUMS):  # SHA256SUMS last
            place(found[name], folder / name, share=False)
    for name, blob in weights.items():
        Known().made(out / name, blob.digest.hex)
    return HubPulled(out, hub.commit, tuple(v["quant"] for v in variants), document, overrides)


def _exists(out: Path) -> UsageError:
    return UsageError(f"{out} exists; --force replaces it, --out writes elsewhere")


def _present(variants: Sequence[Document], hub: HubFiles, *, asked: bool) -> list[Document]:
    present = [variant for variant in variants if hub.has(variant["file"])]
    if missing := [v["quant"] for v in variants if asked and v not in present]:
        raise UsageError(f"{hub.address.name} does not hold the variants {', '.join(missing)}")
    if not present:
        raise SourceError(f"{hub.address.name} holds no variant of its pack; ask its author")
    return present
