"""``medllm-pack parity``: is it still the same model?"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Annotated

import typer

from medllm_pack.cli import options as o
from medllm_pack.cli.console import Output
from medllm_pack.gpu import Choice

if TYPE_CHECKING:
    from medllm_pack.parity.checks import Check, Verdict
    from medllm_pack.parity.run import Result

TextsOpt = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='your own texts: .txt with blank lines between notes, or .jsonl with "text"; '
        "they are never copied or recorded. Synthetic notes if absent",
    ),
]

GpuOpt = Annotated[
    str | None,
    typer.Option(metavar="N|all", help="layers that llama.cpp computes on the GPU; none if absent"),
]
DeviceOpt = Annotated[
    Choice,
    typer.Option(
        help="where the reference is computed; auto: on an NVIDIA GPU if torch has one that works, "
        "in one piece if it fits there"
    ),
]
CtxOpt = Annotated[
    int | None,
    typer.Option(
        min=64, max=1 << 16, metavar="N", help="tokens of each text that are used; 256 if absent"
    ),
]
OllamaOpt = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="also ask this model of the Ollama server that OLLAMA_HOST names; it must hold a "
        "variant of the pack, and gets to read synthetic notes only",
    ),
]


def parity(
    pack: o.PackArg,
    base: o.BaseOpt = None,
    adapter: o.AdapterOpt = None,
    merged: o.MergedOpt = None,
    texts: TextsOpt = None,
    ollama: OllamaOpt = None,
    gpu_layers: GpuOpt = None,
    device: DeviceOpt = "auto",
    ctx: CtxOpt = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, metavar="N", help="threads of llama.cpp; all processors if absent"
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="compute the reference anew and keep nothing of it")
    ] = False,
    json: o.JsonOpt = False,
    quiet: o.QuietOpt = False,
    verbose: o.VerboseOpt = False,
) -> None:
    """Check that every variant is still the fine-tuned model; exit code 3 if one is not."""
    from medllm_pack.parity.original import Sources, require_extra

    require_extra()
    # torch makes a folder for what it compiles, which is nothing here, on being imported.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", gettempdir())
    from medllm_pack.parity import cache
    from medllm_pack.parity.process import forbid_dumps
    from medllm_pack.parity.run import NOTES, check_pack
    from medllm_pack.parity.runtime import Runtime, layers
    from medllm_pack.parity.texts import read_texts

    output = Output(json=json, quiet=quiet or json, verbose=verbose)
    if texts:
        forbid_dumps()  # of a memory that holds them
    own = read_texts(texts, count=NOTES) if texts else None
    given = {"threads": threads, "gpu_layers": layers(gpu_layers), "ctx": ctx}
    runtime = Runtime(**{name: value for name, value in given.items() if value is not None})
    sources = Sources(base, adapter, merged)
    with output.reporter() as report:
        result = check_pack(
            pack,
            texts=own,
            sources=sources,
            runtime=runtime,
            device=device,
            ollama=ollama,
            cache=None if no_cache else cache.folder(),
            report=report,
        )
    output.result(result.document, lambda: _show(output, result))
    result.raise_if_failed()


def _show(output: Output, result: Result) -> None:
    """Show the verdicts, and with -v or after a failure every check."""
    from medllm_pack.limits import described

    rows = [_row(verdict) for verdict in result.verdicts]
    heads = ("variant", ">mean KLD", ">99 %", ">same top token", ">perplexity", ">ratio", "verdict")
    output.table(heads, rows)
    for verdict in result.verdicts:
        checks = [c for c in verdict.checks if output.verbose or c.passed is False]
        if checks:
            output.line(f"\n{verdict.quant}:")
            output.table(("check", ">measured", "limit", "", "found"), [_line(c) for c in checks])
    for variant in result.document["variants"]:
        for departure in variant["limits"]:
            output.line(f"{variant['quant']}: limit of the recipe: {described(departure)}")
    if output.verbose:
        output.line(f"\nreference: {result.way}")
    texts = result.texts
    name = "your texts" if texts.sha256 is None else f"held-out synthetic notes ({texts.name})"
    output.line(f"\n{len(texts.notes)} {name}; the verdict is in {result.folder / 'parity.json'}")
    output.line(f"for people, in Portuguese and English: {result.folder / 'parity.html'}")


def _row(verdict: Verdict) -> tuple[str, ...]:
    figures = verdict.figures
    said = "passed" if verdict.failed is None else f"failed at {verdict.failed.name}"
    if not figures:
        return (verdict.quant, "", "", "", "", "", said)
    return (
        verdict.quant, f"{figures['kld_mean']:.2e}", f"{figures['kld_p99']:.2e}",
        f"{figures['top1']:.2%}", f"{figures['ppl']:.4g}", f"{figures['ppl_ratio']:.4f}", said,
    )  # fmt: skip


def _line(check: Check) -> tuple[str, ...]:
    from medllm_pack.parity.checks import form

    measured = "" if check.measured is None else f"{check.measured:{form(check.measured)}}"
    verdict = {True: "ok", False: "NO", None: "-"}[check.passed]
    return (check.name, measured, check.limit, verdict, check.detail)
