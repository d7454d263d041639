"""The commands: options to a value, one library call, one result.

Heavy imports happen inside the command that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medllm_pack.cli import hub, show
from medllm_pack.cli import options as o
from medllm_pack.cli import registry as r
from medllm_pack.cli.console import Output
from medllm_pack.cli.install import install
from medllm_pack.cli.parity import parity
from medllm_pack.cli.publish import publish
from medllm_pack.cli.pull import pull
from medllm_pack.cli.verify import sign, verify

if TYPE_CHECKING:
    from medllm_pack.pack.plan import Request
    from medllm_pack.quant.device import DeviceName

app = typer.Typer(
    name="medllm-pack",
    help="Pack fine-tuned clinical language models: LoRA merge, GGUF variants and Ollama "
    "Modelfiles in one pass.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes = typer.Typer(
    help="List, show, copy and check recipes. A recipe's table `parity` sets limits of the command "
    "of that name; `recipes limits` prints the shipped ones.",
    no_args_is_help=True,
)
app.add_typer(recipes, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        import medllm_pack

        print(f"medllm-pack {medllm_pack.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Hold the options of the program itself."""


@app.command()
def build(
    recipe: o.RecipeArg,
    quant: o.QuantOpt = None,
    base: o.BaseOpt = None,
    adapter: o.AdapterOpt = None,
    merged: o.MergedOpt = None,
    out: o.OutOpt = None,
    imatrix: o.ImatrixOpt = None,
    template: o.TemplateOpt = None,
    threads: o.ThreadsOpt = None,
    device: o.DeviceOpt = "cpu",
    force: o.ForceOpt = False,
    json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
    verbose: o.VerboseOpt = False,
) -> None:
    """Merge, convert and quantize in one pass; write a pack."""
    from medllm_pack.allocator import keep_freed_memory
    from medllm_pack.pack.build import build as run_build
    from medllm_pack.pack.plan import make_plan

    output = Output(json=json, quiet=quiet or json, verbose=verbose)
    request = _request(recipe, quant, base, adapter, merged, out, imatrix, template, force)
    _require(device)
    keep_freed_memory()
    with output.reporter() as report:
        plan = make_plan(request, report=report)
        for notice in (*plan.notices, *plan.deviations):
            report.notice(notice)
        if verbose:
            show.inputs(output, plan)
        built = run_build(plan, threads=threads, device=device, report=report)
    output.result(
        {"folder": str(built.folder), "pack": built.manifest},
        lambda: show.built(output, plan, built),
    )


@app.command()
def plan(
    recipe: o.RecipeArg,
    quant: o.QuantOpt = None,
    base: o.BaseOpt = None,
    adapter: o.AdapterOpt = None,
    merged: o.MergedOpt = None,
    out: o.OutOpt = None,
    imatrix: o.ImatrixOpt = None,
    template: o.TemplateOpt = None,
    threads: o.ThreadsOpt = None,
    device: o.DeviceOpt = "cpu",
    force: o.ForceOpt = False,
    json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
    verbose: o.VerboseOpt = False,
) -> None:
    """Show what build would do, need and refuse; read no weights."""
    from medllm_pack.pack.plan import make_plan

    output = Output(json=json, quiet=quiet or json, verbose=verbose)
    request = _request(recipe, quant, base, adapter, merged, out, imatrix, template, force)
    _require(device)
    with output.reporter() as report:
        planned = make_plan(request, report=report, weights=False)
    output.result(
        show.plan_document(planned, threads=threads),
        lambda: show.planned(output, planned, threads=threads),
    )


@app.command()
def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="FILE.gguf|PACK|REF",
            help="a GGUF file, a pack, or either on a registry or the Hub",
        ),
    ],
    insecure: r.InsecureOpt = False,
    ca: r.CaOpt = None,
    json: o.JsonOpt = False,
    verbose: o.VerboseOpt = False,
) -> None:
    """Show what is in a GGUF file or a pack, the way a model page does."""
    from medllm_pack.publish.targets import is_target

    output, path = Output(json=json, verbose=verbose), Path(what)
    if what.startswith("hf://"):
        hub.inspect(what, output)
    elif is_target(what):
        show.remote(output, what, r.access(insecure, ca, None, None))
    elif path.is_dir():
        from medllm_pack.pack.manifest import read_manifest

        document = read_manifest(path)
        output.result(document, lambda: show.pack(output, path, document))
    else:
        from medllm_pack.gguf.reader import read_gguf

        header = read_gguf(path)
        output.result(show.gguf_document(header), lambda: show.gguf_file(output, header))


app.command()(parity)
app.command()(install)
app.command()(sign)
app.command()(verify)
app.command()(publish)
app.command()(pull)


@recipes.command("list")
def recipes_list(json: o.JsonOpt = False) -> None:
    """List the shipped recipes."""
    from medllm_pack.recipe import load_recipe, recipe_names, recipe_path

    output = Output(json=json)
    found = {name: load_recipe(recipe_path(name)) for name in recipe_names()}
    output.result(
        {name: recipe.model_dump(mode="json") for name, recipe in found.items()},
        lambda: output.table(
            ("recipe", "variants", "what it packs"),
            [(n, ",".join(r.variants), r.summary) for n, r in found.items()],
        ),
    )


@recipes.command("show")
def recipes_show(recipe: o.RecipeArg, json: o.JsonOpt = False) -> None:
    """Print a recipe as it is written, or as it is read under --json."""
    from medllm_pack.recipe import load_recipe, recipe_path

    output, path = Output(json=json), recipe_path(recipe)
    parsed = load_recipe(path)
    output.result(
        parsed.model_dump(mode="json"),
        lambda: output.line(path.read_text(encoding="utf-8").rstrip()),
    )


@recipes.command("copy")
def recipes_copy(
    recipe: o.RecipeArg,
    target: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="new file; RECIPE.toml here if absent")
    ] = None,
    force: o.ForceOpt = False,
    json: o.JsonOpt = False,
) -> None:
    """Copy a recipe, to be edited and built from its path."""
    from medllm_pack.recipe import copy_recipe

    path = copy_recipe(recipe, target, replace=force)
    output = Output(json=json)
    output.result(
        {"recipe": str(path)},
        lambda: output.line(f"{path} written; edit it, then: medllm-pack build {path}"),
    )


@recipes.command("check")
def recipes_check(recipe: o.RecipeArg, json: o.JsonOpt = False) -> None:
    """Report every problem of a recipe; exit code 3 if there is one."""
    from medllm_pack.errors import RecipeError
    from medllm_pack.recipe import check_recipe

    output = Output(json=json)
    problems = check_recipe(recipe)
    output.result(
        {"recipe": recipe, "problems": list(problems)},
        lambda: output.line("no problems") if not problems else None,
    )
    if problems:
        if not json:
            for line in RecipeError(recipe, problems).lines():
                output.line(line)
        raise typer.Exit(3)


@recipes.command("limits")
def recipes_limits(json: o.JsonOpt = False) -> None:
    """Print the shipped limits of `parity`, as a recipe's table of that name has them."""
    from medllm_pack import limit_tables as limits

    output = Output(json=json)
    output.result(
        limits.shipped().model_dump(mode="json"),
        lambda: output.line(limits.path().read_text(encoding="utf-8").rstrip()),
    )


def _request(
    recipe: str,
    quant: str | None,
    base: str | None,
    adapter: str | None,
    merged: str | None,
    out: Path | None,
    imatrix: Path | None,
    template: str | None,
    force: bool,
) -> Request:
    """Turn options into a request; what contradicts itself is refused further down."""
    from medllm_pack.pack.plan import Request
    from medllm_pack.recipe import load_recipe, recipe_path

    path = recipe_path(recipe)
    return Request(
        recipe=load_recipe(path),
        folder=path.parent,
        out=out or Path("dist") / path.stem,
        variants=tuple(o.listed(quant)),
        base=_from_here(base),
        adapter=_from_here(adapter),
        merged=_from_here(merged),
        imatrix=imatrix,
        template=template,
        replace=force,
    )


def _require(device: DeviceName) -> None:
    """Refuse a device that is not there before anything is fetched; torch only if it is asked for.

    The build asks again: it may be called without a command line.
    """
    if device != "cpu":
        from medllm_pack.quant.device import door

        door.require(device)


def _from_here(source: str | None) -> str | None:
    """Make a folder given on the command line absolute; a recipe's start at its own file."""
    from medllm_pack.home import expanded

    if source is not None and expanded(source).is_dir():
        return str(expanded(source).resolve())
    return source
