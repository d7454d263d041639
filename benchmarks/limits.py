r"""What sound variants show, to set limits by: quant_recipes/limits.toml.

    llama-imatrix -m F16.gguf -f examples/tiny/texts/clinico_treino.txt -o tiny.imatrix.gguf -c 256
    python -m benchmarks.limits --imatrix tiny.imatrix.gguf --work DIR [--noise 64]

Builds every shipped mix, with and without an importance matrix where both exist, of the tiny model
and of two with random weights (LLaMA-like and Mistral-like), and measures each against the
reference over four segments of the held-out texts. For every variant and ggml type it prints the
worst that was seen, the limit, and how many times the worst the limit is. ``--noise N``: blocks are
also made of N million random weights a type, because the largest error of a block or a row grows
with their number, and these models have few.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from medllm_pack import resources
from medllm_pack.gguf.reader import read_gguf
from medllm_pack.limit_tables import OTHER, shipped
from medllm_pack.limits import Limits
from medllm_pack.pack.build import build
from medllm_pack.pack.manifest import read_manifest
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.parity.jobs import Jobs
from medllm_pack.parity.nameless import Nameless
from medllm_pack.parity.original import Sources, find_original
from medllm_pack.parity.predictions import measure
from medllm_pack.parity.reference import compute_logits
from medllm_pack.parity.runtime import Runtime
from medllm_pack.parity.seen import EXACT, Stored
from medllm_pack.parity.tensors import check_tensors
from medllm_pack.parity.texts import read_texts
from medllm_pack.parity.tokens import Tokenizer
from medllm_pack.progress import Silent
from medllm_pack.quant import ggml, kernels
from medllm_pack.quant.mixes import mix_names
from medllm_pack.recipe import load_recipe, recipe_path
from tests import pico
from tests.test_build import NEEDS_IMPORTANCE, importance, write_importance

SHAPES = {"llama": pico.LLAMA, "mistral": pico.MISTRAL}
CONTEXT, NOTES, PARAGRAPHS = 256, 8, 6
LEAST_CLEAR = 200
KINDS = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K",
    "Q2_K", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0",
)  # fmt: skip


@dataclass
class Worst:
    """The worst value of a figure so far, and where it was seen."""

    value: float = 0.0
    where: str = ""

    def see(self, value: float, where: str) -> None:
        """Keep the larger one."""
        if value >= self.value:
            self.value, self.where = value, where


Table = dict[tuple[str, str], Worst]


@dataclass(frozen=True)
class Model:
    """A model of which all mixes are built."""

    name: str
    request: Request
    imatrix: Path
    sources: Sources


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imatrix", type=Path, required=True, help="of the tiny model")
    parser.add_argument("--noise", type=int, default=16, metavar="N", help="million weights a type")
    parser.add_argument("--mixes", default=",".join(mix_names()))
    parser.add_argument("--models", default="tiny,llama,mistral")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="folder of packs, kept and reused")
    given = parser.parse_args()
    variants: Table = {}
    tensors: Table = {}
    for model in _models(given.work.resolve(), given.imatrix.resolve()):
        if model.name not in given.models.split(","):
            continue
        for matrix in (False, True):
            chosen = given.mixes.split(",")
            names = [n for n in chosen if matrix or n.upper() not in NEEDS_IMPORTANCE]
            _look_at(model, names, matrix, given.threads, variants, tensors)
    for kind in KINDS if given.noise else ():
        _make_noise(kind, given.noise, tensors)
    print(*_rows(variants, tensors), sep="\n")


def _models(folder: Path, imatrix: Path) -> Iterator[Model]:
    """Yield the tiny model and the random ones."""
    path = recipe_path("tiny")
    recipe = load_recipe(path)
    yield Model("tiny", Request(recipe, path.parent, folder / "tiny"), imatrix, Sources())
    tokenizer = pico.train_tokenizer(folder / "tokenizer")
    for number, (name, shape) in enumerate(SHAPES.items()):
        place = folder / str(number)
        base = pico.write_model(place / "base", shape, tokenizer=tokenizer)
        adapter = pico.write_adapter(place / "adapter", shape)
        written = pico.write_recipe(place, {"base": base, "adapter": adapter})
        request = Request(load_recipe(written), place, place / "pack")
        weights = write_importance(place / "imatrix.gguf", importance(shape))
        yield Model(name, request, weights, Sources(str(base), str(adapter)))


def _look_at(
    model: Model, names: Sequence[str], matrix: bool, threads: int, variants: Table, tensors: Table
) -> None:
    """Build a pack and keep the worst of what its variants show."""
    out = model.request.out.with_name(f"{model.request.out.name}-{matrix}")
    request = replace(
        model.request, out=out, variants=tuple(names), imatrix=model.imatrix if matrix else None
    )
    if not out.exists():
        build(make_plan(request, report=Silent()), threads=threads)
    manifest = read_manifest(out)
    original = find_original(manifest, model.sources, report=Silent())
    label = f"{model.name}{', matrix' if matrix else ''}"
    with Nameless() as place:
        runtime = Runtime(threads=threads)
        segments = dict(_segments(Tokenizer(original)))
        ids = [one for segment in segments.values() for one in segment]
        reference = compute_logits(original, ids, place=place, report=Silent())
        for entry in manifest["variants"]:
            path = out / entry["file"]
            stored = [Stored(path, read_gguf(path))]
            [(_, errors)] = check_tensors(
                stored, original, Limits(), threads=threads, report=Silent()
            )
            for error in errors:
                seen = {"rmse": error.rmse, _block(matrix): error.worst}
                _see(tensors, error.type, seen, label)
            jobs, at = Jobs(path, original.transformers_config(), runtime), 0
            with Nameless() as for_variant:
                ours = jobs.logits(ids, for_variant)
                for name, segment in segments.items():
                    part = slice(at, at := at + len(segment))
                    figures = _figures(reference[part], ours[part], segment)
                    _see(variants, entry["quant"], figures, f"{label}, {name}")
            print(f"{label}: {entry['quant']}", flush=True)


def _figures(
    reference: Sequence[Path], ours: Sequence[Path], ids: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return the figures that have limits, each as a distance from what is perfect."""
    figures, _ = measure(reference, ours, ids)
    # Random weights are clear about next to nothing, and a share of a few tokens says nothing.
    clear = figures["top1_clear"] if figures["tokens_clear"] >= LEAST_CLEAR else 1.0
    return {
        "kld_mean": figures["kld_mean"], "kld_p99": figures["kld_p99"], "top1_clear": 1 - clear,
        "ppl_ratio": abs(figures["ppl_ratio"] - 1),
    }  # fmt: skip


def _segments(tokenizer: Tokenizer) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield groups of notes as ids: clinical ones as parity takes them, and general sentences."""
    texts = resources.folder("examples/tiny/texts")
    notes = read_texts(texts / "clinico_teste.txt", count=1 << 20).notes
    for at in (0, NOTES, 2 * NOTES):
        yield f"clinical {at // NOTES}", [_ids(tokenizer, n) for n in notes[at : at + NOTES]]
    short = read_texts(texts / "geral_teste.txt", count=1 << 20).notes
    joined = ["\n".join(short[i : i + PARAGRAPHS]) for i in range(0, len(short), PARAGRAPHS)]
    yield "general", [_ids(tokenizer, n) for n in joined[:NOTES]]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)[:CONTEXT]


def _make_noise(kind: str, millions: int, tensors: Table) -> None:
    """Quantize random weights, plain and with outliers, and keep the worst error of a block."""
    generator = np.random.default_rng(0)
    rows = (1 << 20) // 4096
    # Squares of activations differ by orders of magnitude.
    weights = np.exp(2 * generator.standard_normal(4096)).astype(np.float32)
    for number in range(millions):
        values = generator.standard_normal((rows, 4096), dtype=np.float32) * np.float32(0.02)
        if number % 2:  # as heavy as the tails of trained weights get
            values *= np.abs(generator.standard_t(4, values.shape)).astype(np.float32)
        halves = values.astype(np.float16).astype(np.float32)
        for matrix in (None, weights):
            if matrix is None and ggml.requires_importance(kind):
                continue
            _see_blocks(kind, halves, matrix, tensors)


def _see_blocks(
    kind: str, values: NDArray[np.float32], weights: NDArray[np.float32] | None, tensors: Table
) -> None:
    data = kernels.quantize(values, kind, importance=weights)
    stored = gguf.quants.dequantize(
        np.asarray(data, np.uint8).reshape(len(values), -1), gguf.GGMLQuantizationType[kind]
    )
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    errors = (stored.astype(np.float64) - values).reshape(-1, block)
    blocks = values.astype(np.float64).reshape(-1, block)
    usual = np.sqrt((blocks**2).mean())
    largest = np.maximum(np.abs(blocks).max(axis=1), usual)
    rows = (stored.astype(np.float64) - values, values.astype(np.float64))
    off, held = (np.sqrt((row**2).mean(axis=1)) for row in rows)
    seen = {
        "rmse": float(np.sqrt((errors**2).mean()) / usual),
        _block(weights is not None): float((np.abs(errors).max(axis=1) / largest).max()),
        "worst_row": float((off / held).max()),
    }
    _see(tensors, kind, seen, "noise" + (", matrix" if weights is not None else ""))


def _block(matrix: bool) -> str:
    return "worst_block_matrix" if matrix else "worst_block"


def _see(table: Table, row: str, figures: Mapping[str, float], where: str) -> None:
    for name, value in figures.items():
        table.setdefault((row, name), Worst()).see(value, where)


def _rows(variants: Table, tensors: Table) -> Iterator[str]:
    """Yield the worst of each figure, its limit, and how many times the worst the limit is."""
    yield f"\n{'':10}{'figure':20}{'worst':>10}{'limit':>10}{'times':>8}  seen in"
    for table, rows in ((variants, shipped().variants), (tensors, shipped().tensors)):
        for (name, figure), worst in table.items():
            if table is tensors and name in EXACT:
                continue
            limit = getattr(rows[name if name in rows else OTHER], figure)
            room = 1 - limit if figure == "top1_clear" else limit
            times = f"{room / worst.value:8.1f}" if worst.value else f"{'∞':>8}"
            yield f"{name:10}{figure:20}{worst.value:10.3g}{room:10.3g}{times}  {worst.where}"


if __name__ == "__main__":
    main()
