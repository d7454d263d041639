"""``medllm-pack pull``: the way back, digests checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medllm_pack.cli import hub
from medllm_pack.cli import options as o
from medllm_pack.cli import registry as r
from medllm_pack.cli.console import Output

RefArg = Annotated[
    str, typer.Argument(metavar="REF", help="oci://host/ns/model:tag, ollama://ns/model:tag, "
                        "hf://org/repo[@revision] or file://bundle.tar")
]  # fmt: skip
PullQuantOpt = Annotated[
    str | None,
    typer.Option("--quant", metavar="LIST", help="variants of a pack on the Hub; all if absent"),
]
PullOutOpt = Annotated[Path, typer.Option("--out", metavar="DIR", help="the new folder")]


def pull(
    ref: RefArg,
    out: PullOutOpt,
    quant: PullQuantOpt = None,
    insecure: r.InsecureOpt = False,
    ca: r.CaOpt = None,
    allow_host: r.AllowHostOpt = None,
    auth_host: r.AuthHostOpt = None,
    force: o.ForceOpt = False,
    json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> None:
    """Fetch a published model; a run that was cut off goes on where it stood."""
    from medllm_pack.errors import UsageError
    from medllm_pack.publish.targets import (
        BundleTarget,
        HubTarget,
        RegistryTarget,
        parse_target,
    )

    output, target = Output(json=json, quiet=quiet or json), parse_target(ref)
    if quant and not isinstance(target, HubTarget):
        raise UsageError("--quant is for hf:// references; the tag says which variant is meant")
    document: dict[str, Any] = {"reference": str(target), "folder": str(out)}
    with output.reporter() as report:
        match target:
            case RegistryTarget():
                access = r.access(insecure, ca, allow_host, auth_host)
                from medllm_pack.publish.pull import pull as run_pull

                pulled = run_pull(target, out, access=access, replace=force, report=report)
                document |= {"digest": str(pulled.digest), "overrides": list(pulled.overrides)}
            case BundleTarget():
                from medllm_pack.publish.bundle import read_bundle
                from medllm_pack.publish.publication import overrides_of
                from medllm_pack.publish.restore import restore

                release = read_bundle(target.path, report=report)
                attached = [image for tagged in release.images for image in tagged.attached]
                document["overrides"] = list(overrides_of(attached))
                restore(release, out, replace=force, report=report)
            case HubTarget():
                quants = o.listed(quant)
                document |= hub.pull(target, out, quants=quants, replace=force, report=report)
    document |= _variants(out)
    output.result(document, lambda: _show(output, document))


def _variants(folder: Path) -> dict[str, Any]:
    """Return which variants came, of how many; nothing of weights that others made."""
    from medllm_pack.pack import manifest

    if not (folder / manifest.NAME).exists():
        return {"variants": [], "of": 0}
    pack = manifest.read_manifest(folder)
    came = [variant["quant"] for variant in manifest.here(folder, pack)]
    return {"variants": came, "of": len(pack["variants"])}


def _show(output: Output, document: dict[str, Any]) -> None:
    from medllm_pack.publish.publication import sentence

    output.line(f"{document['folder']} is ready")
    if len(document["variants"]) < document["of"]:
        named = ", ".join(document["variants"])
        output.line(f"{len(document['variants'])} of the {document['of']} variants came: {named}")
    if overrides := document["overrides"]:
        output.line(sentence(overrides))
