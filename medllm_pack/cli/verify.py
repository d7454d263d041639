"""``medllm-pack verify`` and ``medllm-pack sign``: is it what it says it is, and who says so?"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medllm_pack.cli import options as o
from medllm_pack.cli import registry as r
from medllm_pack.cli.console import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from medllm_pack.progress import Reporter
    from medllm_pack.publish.transport import Access
    from medllm_pack.publish.verify import Verified

SubjectArg = Annotated[
    str,
    typer.Argument(
        metavar="PACK|FILE|REF",
        help="a pack, a GGUF file, a bundle (.tar), or oci://…, ollama://…, hf://…",
    ),
]
QuantOpt = Annotated[
    str | None,
    typer.Option(
        "--quant", metavar="LIST", help="only these variants; weights of others may be missing"
    ),
]
PublicOpt = Annotated[
    Path | None, typer.Option("--key", metavar="PUB", help="the signer's public key, PEM")
]
PrivateOpt = Annotated[
    Path, typer.Option("--key", metavar="KEY", help="private elliptic curve key, PEM")
]
PasswordOpt = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="environment variable that holds the key's password"),
]

DownloadOpt = Annotated[
    bool,
    typer.Option("--download", help="read every byte of what was published; nothing is kept"),
]
RebuildOpt = Annotated[
    bool, typer.Option("--rebuild", help="build again from the same inputs and compare digests")
]
RecipeOpt = Annotated[
    str | None,
    typer.Option(metavar="RECIPE", help="with --rebuild: instead of the recipe in pack.json"),
]


def sign(
    pack: o.PackArg,
    key: PrivateOpt,
    password_env: PasswordOpt = None,
    force: o.ForceOpt = False,
    json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> None:
    """Sign a pack with a key, offline; needs the extra `sign`."""
    from medllm_pack.errors import UsageError
    from medllm_pack.publish.signing import sign as run_sign

    output = Output(json=json, quiet=quiet or json)
    password = None
    if password_env is not None:
        password = os.environ.get(password_env)
        if password is None:
            raise UsageError(f"the environment has no variable {password_env!r}")
    with output.reporter() as report:
        path = run_sign(pack, key=key, password=password, replace=force, report=report)
    output.result(
        {"signature": str(path)},
        lambda: output.line(f"{path} written; check with: medllm-pack verify {pack} --key PUB"),
    )


def verify(
    subject: SubjectArg,
    key: PublicOpt = None,
    quant: QuantOpt = None,
    download: DownloadOpt = False,
    rebuild: RebuildOpt = False,
    base: o.BaseOpt = None,
    adapter: o.AdapterOpt = None,
    merged: o.MergedOpt = None,
    imatrix: o.ImatrixOpt = None,
    template: o.TemplateOpt = None,
    recipe: RecipeOpt = None,
    threads: o.ThreadsOpt = None,
    insecure: r.InsecureOpt = False,
    ca: r.CaOpt = None,
    allow_host: r.AllowHostOpt = None,
    auth_host: r.AuthHostOpt = None,
    json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
) -> None:
    """Check digests, papers, licence duties, parity and signature; exit code 3 if one says no."""
    from medllm_pack.publish.targets import is_target

    if not rebuild and any((base, adapter, merged, imatrix, template, recipe, threads)):
        raise typer.BadParameter("inputs, recipe and threads are those of --rebuild; add it")
    if rebuild and not Path(subject).is_dir():
        raise typer.BadParameter("--rebuild needs the folder of a pack")
    if download and not is_target(subject):
        raise typer.BadParameter("--download is for what was published; files here are read anyway")
    if quant and not Path(subject).is_dir():
        raise typer.BadParameter("--quant is for the folder of a pack")
    output = Output(json=json, quiet=quiet or json)
    with output.reporter() as report:
        if "://" in subject:
            verified = _published(
                subject, key, lambda: r.access(insecure, ca, allow_host, auth_host), report,
                download=download,
            )  # fmt: skip
        else:
            verified = _verified(Path(subject), key, o.listed(quant), report)
        if rebuild and not verified.failed:
            from medllm_pack.publish import rebuild as again
            from medllm_pack.recipe import load_recipe, recipe_path

            given = again.Given(
                base, adapter, merged, imatrix,
                load_recipe(recipe_path(recipe)) if recipe else None, template,
            )  # fmt: skip
            check = again.rebuild(Path(subject), given, threads=threads, report=report)
            verified = replace(verified, checks=(*verified.checks, check))
    output.result(verified.document(), lambda: _show(output, verified))
    verified.raise_if_failed()


def _verified(subject: Path, key: Path | None, quants: Sequence[str], report: Reporter) -> Verified:
    from medllm_pack.errors import SourceError, UsageError, shown
    from medllm_pack.publish import verify as checks

    if subject.is_dir():
        return checks.verify_pack(subject, key=key, report=report, quants=quants)
    if not subject.exists():
        raise SourceError(f"{shown(subject)} does not exist")
    if key is not None:
        raise UsageError("--key checks the signature of a pack; a single file has none")
    if subject.suffix.lower() == ".gguf":
        return checks.verify_gguf(subject, report=report)
    from medllm_pack.publish.verify_published import verify_bundle

    return verify_bundle(subject, report=report)


def _published(
    text: str, key: Path | None, access: Callable[[], Access], report: Reporter, *, download: bool
) -> Verified:
    from medllm_pack.errors import UsageError
    from medllm_pack.publish.targets import BundleTarget, RegistryTarget, parse_target

    target = parse_target(text)
    if isinstance(target, BundleTarget):
        return _verified(target.path, key, (), report)
    if key is not None:
        raise UsageError("a signature covers the whole pack: pull it, then verify the folder")
    if isinstance(target, RegistryTarget):
        entry = access()  # says which extra is missing, before the next line fails on it
        from medllm_pack.publish.verify_published import verify_registry

        return verify_registry(target, access=entry, report=report, download=download)
    from medllm_pack.publish.verify_hub import verify_hub

    return verify_hub(target, report=report, download=download)


def _show(output: Output, verified: Verified) -> None:
    words = {True: "yes", False: "NO", None: "-"}
    rows = [(c.name, words[c.passed], c.detail) for c in verified.checks]
    output.table(("check", "", "found"), rows)
    if not verified.failed:
        part = [c.detail for c in verified.checks if c.name == "variants" and c.passed is None]
        what = f" of what is here ({part[0].partition(' and ')[0]})" if part else ""
        output.line(f"\n{verified.subject} verified: no check{what} says no")
