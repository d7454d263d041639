"""``medllm-pack install``: a pack or a bundle into Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medllm_pack.cli import options as o
from medllm_pack.cli.console import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medllm_pack.ollama.names import ModelName
    from medllm_pack.progress import Reporter
    from medllm_pack.publish.install import Installed
    from medllm_pack.publish.release import Release, Tagged

PackArg = Annotated[
    Path | None, typer.Argument(metavar="PACK", help="folder of a pack; not with --from")
]
QuantOpt = Annotated[
    str | None,
    typer.Option(
        "--quant", metavar="LIST",
        help="variants, such as f16,q4_k_m; the default variant if absent",
    ),
]  # fmt: skip
NameOpt = Annotated[
    str | None,
    typer.Option(metavar="NS/MODEL:TAG", help="name in Ollama; the recipe's own if absent"),
]
StoreOpt = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Ollama's store; found if absent")
]
FromOpt = Annotated[
    Path | None, typer.Option("--from", metavar="BUNDLE", help="a bundle instead of a pack")
]


def install(
    pack: PackArg = None,
    quant: QuantOpt = None,
    name: NameOpt = None,
    store: StoreOpt = None,
    from_: FromOpt = None,
    force: o.ForceOpt = False,
    json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> None:
    """Bring variants into Ollama, without copying where the file system allows it."""
    if (pack is None) == (from_ is None):
        raise typer.BadParameter("name a PACK, or a bundle with --from")
    from medllm_pack.publish.install import install as run_install
    from medllm_pack.publish.publication import overrides_of

    output = Output(json=json, quiet=quiet or json)
    with output.reporter() as report:
        release = _release(pack, from_, quant, report)
        chosen = _chosen(release, quant)
        installed = run_install(
            list(zip(chosen, _names(release, chosen, name, quant), strict=True)),
            store=store, replace=force, report=report,
        )  # fmt: skip
    attached = [image for tagged in chosen for image in tagged.attached]
    overrides = list(overrides_of(attached))
    document = {"installed": [one.document() for one in installed], "overrides": overrides}
    output.result(document, lambda: _show(output, installed, overrides))


def _release(
    pack: Path | None, bundle: Path | None, quant: str | None, report: Reporter
) -> Release:
    if pack is not None:
        from medllm_pack.publish.make import make_release

        return make_release(pack, quants=o.listed(quant) or _default(pack), report=report)
    from medllm_pack.publish.bundle import read_bundle

    assert bundle is not None
    return read_bundle(bundle, report=report)


def _default(pack: Path) -> list[str]:
    """Return the default variant of a pack, among those whose weights are there."""
    from medllm_pack.pack.manifest import read_manifest
    from medllm_pack.publish.make import default_quant

    entries = read_manifest(pack)["variants"]
    here = [entry["quant"] for entry in entries if (pack / str(entry["file"])).exists()]
    return [default_quant(here)] if here else []


def _chosen(release: Release, quant: str | None) -> Sequence[Tagged]:
    """Return the variants that are meant: those named, else the default one."""
    from medllm_pack.errors import UsageError, shown
    from medllm_pack.publish.make import default_quant

    images = {tagged.quant: tagged for tagged in release.images}
    wanted = o.listed(quant) or [default_quant(list(images))]
    for one in wanted:
        if one not in images:
            raise UsageError(f"there is no variant {shown(one)}; there is {', '.join(images)}")
    return [images[one] for one in wanted]


def _names(
    release: Release, chosen: Sequence[Tagged], name: str | None, quant: str | None
) -> list[ModelName]:
    """Return a name for each variant.

    One variant takes the name as it was given. Without a name, or for several, the tag is followed
    by the variant's, unless the variant was not named at all.
    """
    from dataclasses import replace

    from medllm_pack.ollama.names import ModelName
    from medllm_pack.publish.restore import recipe_name

    base = ModelName.parse(name if name is not None else recipe_name(release))
    if len(chosen) == 1 and (name is not None or quant is None):
        return [base]
    return [
        replace(base, tag=f"{base.tag}-{tagged.quant}" if base.tag else tagged.quant)
        for tagged in chosen
    ]


def _show(output: Output, installed: Sequence[Installed], overrides: Sequence[str]) -> None:
    from medllm_pack.pack.card import human_bytes
    from medllm_pack.publish.publication import sentence

    rows = []
    for one in installed:
        moved = f"{human_bytes(one.copied)} copied" if one.copied else "0 bytes copied"
        rows.append(
            (one.name, one.quant, one.digest[:19], one.where, moved if one.changed else "was there")
        )
    output.table(("model", "variant", "digest", "where", ""), rows)
    if overrides:
        output.line(sentence(overrides))
    output.line(f"\nNext:\n  ollama run {installed[0].name}")
