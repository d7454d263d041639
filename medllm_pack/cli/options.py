"""Options and arguments that several commands share, with one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medllm_pack.quant.device import DeviceName

RecipeArg = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="a shipped recipe's name, or the path of a .toml file"),
]
PackArg = Annotated[Path, typer.Argument(metavar="PACK", help="folder of a pack")]
QuantOpt = Annotated[
    str | None,
    typer.Option(
        "--quant", metavar="LIST",
        help="variants, separated by commas, such as f16,q4_k_m; the recipe's own if absent",
    ),
]  # fmt: skip
BaseOpt = Annotated[
    str | None,
    typer.Option(metavar="SRC", help="base model: a folder, or org/name[@revision] on the Hub"),
]
AdapterOpt = Annotated[
    str | None,
    typer.Option(
        metavar="SRC",
        help="PEFT LoRA adapter to merge into the base: a folder, or org/name on the Hub",
    ),
]
MergedOpt = Annotated[
    str | None,
    typer.Option(metavar="SRC", help="finished weights; not with --base or --adapter"),
]
OutOpt = Annotated[
    Path | None, typer.Option(metavar="DIR", help="folder of the pack; dist/RECIPE if absent")
]
ImatrixOpt = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="importance matrix in GGUF form, as llama-imatrix writes it"),
]
TemplateOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Modelfile style: a shipped name or a folder; the recipe's own if absent",
    ),
]
ThreadsOpt = Annotated[
    int | None,
    typer.Option(
        min=1, max=256, metavar="N", help="processors to keep busy; all it may use if absent"
    ),
]
DeviceOpt = Annotated[
    DeviceName,
    typer.Option(
        help="where to quantize; cuda needs an NVIDIA GPU and the extra 'cuda', and proves "
        "llama.cpp's bytes first"
    ),
]
ForceOpt = Annotated[bool, typer.Option("--force", help="replace what is there")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes")]
VerboseOpt = Annotated[bool, typer.Option("--verbose", "-v", help="more detail")]


def listed(quants: str | None) -> list[str]:
    """Return the variants of a ``--quant``; none if it was not given."""
    return [one.strip().lower() for one in quants.split(",")] if quants else []
