"""Packs of pico models for the tests of what is done with a pack: built once, copied, changed.

``reseal`` writes SHA256SUMS anew, as somebody would who changes a pack on purpose.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.progress import Silent
from medllm_pack.recipe import load_recipe

# Not the agreement, which is not ours to ship: texts with its heading.
LLAMA2_TEXTS = {
    "LICENSE.txt": "LLAMA 2 COMMUNITY LICENSE AGREEMENT\t\n\nHeading only, for a test.\n",
    "USE_POLICY.md": "# Llama 2 Acceptable Use Policy\n\nHeading only, for a test.\n",
}
LLAMA2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, "
    "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)
RECIPE = """name = "{name}"
summary = "a pico model"
variants = ["f16", "q4_k_m"]
template = "continuacao"
ollama = "pico"

[{role}]
source = "{source}"

[license]
id = "{license}"
name = "A licence"
{notice}

[license.texts]
{texts}

[card]
title = "Pico"
summary = "A pico model."
languages = ["pt"]
{base_model}
"""


def write_recipe(
    folder: Path,
    model: Path,
    *,
    name: str = "Pico",
    role: str = "merged",
    license: str = "apache-2.0",
    notice: str = "",
    texts: Mapping[str, list[str]] = {},
    base_model: str = "",
) -> Path:
    """Write a recipe and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pico.toml"
    path.write_text(
        RECIPE.format(
            name=name, role=role, source=model, license=license,
            notice=f"notice = {json.dumps(notice)}" if notice else "",
            texts="\n".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in texts.items()),
            base_model=f'base_model = "{base_model}"' if base_model else "",
        ),
        encoding="utf-8",
    )  # fmt: skip
    return path


def make(out: Path, recipe: Path, *, quants: tuple[str, ...] = ()) -> Path:
    """Build a pack from a recipe's path."""
    request = Request(recipe=load_recipe(recipe), folder=recipe.parent, out=out, variants=quants)
    return build(make_plan(request, report=Silent()), threads=2).folder


def copy(pack: Path, to: Path) -> Path:
    """Copy a pack."""
    return Path(shutil.copytree(pack, to))


def reseal(pack: Path) -> None:
    """Write SHA256SUMS for whatever is there."""
    named = {p.name: p for p in pack.iterdir() if p.name not in ("SHA256SUMS", "model.sig")}
    lines = (
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {n}\n" for n, p in sorted(named.items())
    )
    (pack / "SHA256SUMS").write_text("".join(lines))


def document(pack: Path) -> dict[str, Any]:
    """Return the content of pack.json."""
    content: dict[str, Any] = json.loads((pack / "pack.json").read_text(encoding="utf-8"))
    return content


def change(pack: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change pack.json and seal the pack again."""
    content = document(pack)
    edit(content)
    text = json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    (pack / "pack.json").write_text(text, encoding="utf-8")
    reseal(pack)


def give_parity(
    pack: Path, limits: Mapping[str, list[dict[str, Any]]] = {}, **verdicts: bool
) -> None:
    """Write a verdict of parity; every variant passed unless it is named.

    ``limits`` are a variant's limits that are not the shipped ones.
    """

    def edit(content: dict[str, Any]) -> None:
        entries = [
            {
                "quant": v["quant"], "passed": verdicts.get(v["quant"], True),
                "kld_mean": 0.001, "kld_p99": 0.01, "top1": 0.99, "ppl": 6.2, "ppl_ratio": 1.001,
                "limits": limits.get(v["quant"], []),
            }
            for v in content["variants"]
        ]  # fmt: skip
        content["parity"] = {
            "passed": all(e["passed"] for e in entries),
            "texts": {"name": "clinico_teste", "count": 16, "sha256": "0" * 64},
            "variants": entries,
        }

    change(pack, edit)
