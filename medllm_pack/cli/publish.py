"""``medllm-pack publish``: the gate, then the release, then wherever it goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medllm_pack.cli import hub
from medllm_pack.cli import options as o
from medllm_pack.cli import registry as r
from medllm_pack.cli.console import Output

if TYPE_CHECKING:
    from medllm_pack.progress import Reporter
    from medllm_pack.publish.release import Release
    from medllm_pack.publish.targets import BundleTarget, RegistryTarget

TargetArg = Annotated[
    str, typer.Argument(metavar="TARGET", help="oci://host[:port]/ns/model, ollama://ns/model, "
                        "hf://org/repo or file://bundle.tar")
]  # fmt: skip
QuantOpt = Annotated[
    str | None, typer.Option("--quant", metavar="LIST", help="variants; all of them if absent")
]
TagOpt = Annotated[
    str | None,
    typer.Option("--tag", metavar="TAG", help="first part of the tags; the recipe's own if absent"),
]
DryOpt = Annotated[bool, typer.Option("--dry-run", help="say what would be sent; send nothing")]
AcceptOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--accept",
        metavar="NAME",
        help="publish in spite of this reason; it is published too; may be repeated",
    ),
]
MountOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--mount-from",
        metavar="NS/MODEL",
        help="repository that may have the blobs; may be repeated",
    ),
]
ChunkOpt = Annotated[
    int, typer.Option("--chunk-mib", min=1, max=4096, metavar="N", help="MiB of one request")
]

PublicOpt = Annotated[
    bool, typer.Option("--public", help="a repository that is made on the Hub is public")
]


def publish(
    pack: o.PackArg,
    target: TargetArg,
    quant: QuantOpt = None,
    tag: TagOpt = None,
    dry_run: DryOpt = False,
    accept: AcceptOpt = None,
    mount_from: MountOpt = None,
    chunk_mib: ChunkOpt = 64,
    public: PublicOpt = False,
    insecure: r.InsecureOpt = False,
    ca: r.CaOpt = None,
    allow_host: r.AllowHostOpt = None,
    auth_host: r.AuthHostOpt = None,
    force: o.ForceOpt = False,
    json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> None:
    """Check a pack and publish it: blobs first, tags last."""
    from medllm_pack.errors import UsageError, shown
    from medllm_pack.publish.targets import (
        BundleTarget,
        HubTarget,
        RegistryTarget,
        parse_target,
    )

    output, place = Output(json=json, quiet=quiet or json), parse_target(target)
    if isinstance(place, RegistryTarget) and place.digest:
        raise UsageError(f"{shown(target)} names a digest; a target has a tag or none")
    with output.reporter() as report:
        match place:
            case RegistryTarget():
                access = r.access(insecure, ca, allow_host, auth_host)
                tag = tag or place.tag
                release = _release(pack, quant, tag, accept, report)
                document = _to_registry(
                    release, place, access, dry_run, chunk_mib, mount_from, report
                )
            case BundleTarget():
                release = _release(pack, quant, tag, accept, report)
                document = _to_bundle(release, place, dry_run, force, report)
            case HubTarget():
                release = _release(pack, quant, tag, accept, report)
                document = hub.publish(
                    release, place, public=public, dry_run=dry_run, report=report
                )
    show = hub.show_published if isinstance(place, HubTarget) else _show
    output.result(document, lambda: show(output, document))


def _release(
    pack: Path, quant: str | None, tag: str | None, accept: list[str] | None, report: Reporter
) -> Release:
    """Pass the gate and return the release, with a record of what was accepted."""
    from medllm_pack.publish.gate import check
    from medllm_pack.publish.make import make_release
    from medllm_pack.publish.publication import recorded

    quants = o.listed(quant)
    permit = check(pack, quants, accept or (), report=report)
    release = make_release(
        pack, quants=quants, tag=tag, proven=permit.unchanged, report=report
    )  # fmt: skip
    return recorded(release, permit)


def _to_registry(
    release: Release,
    target: RegistryTarget,
    access: Any,
    dry_run: bool,
    chunk_mib: int,
    mount_from: list[str] | None,
    report: Reporter,
) -> dict[str, Any]:
    from medllm_pack.publish.push import Options, missing, push

    if dry_run:
        blobs = missing(release, target, access=access)
        return _planned(str(target), release, sum(blob.size for blob in blobs), len(blobs))
    options = Options(chunk=chunk_mib << 20, mount_from=tuple(mount_from or ()))
    pushed = push(release, target, access=access, options=options, report=report)
    for notice in pushed.notices:
        report.notice(notice)
    return pushed.document()


def _to_bundle(
    release: Release, target: BundleTarget, dry_run: bool, force: bool, report: Reporter
) -> dict[str, Any]:
    from medllm_pack.publish.bundle import write_bundle

    if dry_run:
        blobs = list(release.blobs)
        return _planned(str(target), release, sum(blob.size for blob in blobs), len(blobs))
    digest = write_bundle(release, target.path, replace=force, report=report)
    return {"target": str(target), "images": _images(release), "index": str(digest)}


def _planned(target: str, release: Release, n_bytes: int, n_blobs: int) -> dict[str, Any]:
    would = {"bytes": n_bytes, "blobs": n_blobs}
    return {"target": target, "dry_run": True, "images": _images(release), "would_send": would}


def _images(release: Release) -> list[dict[str, Any]]:
    return [{"digest": str(t.image.digest), "tags": list(t.tags)} for t in release.images]


def _show(output: Output, document: dict[str, Any]) -> None:
    from medllm_pack.pack.card import human_bytes

    for image in document["images"]:
        output.line(f"{', '.join(image['tags'])}  {image['digest']}")
    if would := document.get("would_send"):
        output.line(f"would send {would['blobs']} blobs, {human_bytes(would['bytes'])}")
    elif blobs := document.get("blobs"):
        output.line(
            f"{human_bytes(document['transferred_bytes'])} sent in {blobs['sent']} blobs, "
            f"{blobs['skipped']} were there, {blobs['mounted']} mounted"
        )
    if verdict := document.get("ollama_can_pull"):
        output.line(f"ollama pull: {'yes' if verdict['pulls'] else 'no'}: {verdict['why']}")
