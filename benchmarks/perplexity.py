r"""Our KL divergence and perplexity beside those of llama.cpp's own tool, llama-perplexity.

    cmake -S LLAMA_CPP -B B -DLLAMA_CURL=OFF && cmake --build B --target llama-perplexity
    python -m benchmarks.perplexity --llama-perplexity B/bin/llama-perplexity [--write FILE]

Both look at the same positions: the text is cut into chunks of ``CONTEXT`` ids, the first of each
is BOS, and every id of the second half is predicted from what comes before it (perplexity() and
kl_divergence() in tools/perplexity/perplexity.cpp). The base is the F16 variant. llama-perplexity
keeps the base's log-probabilities in 16 bits: steps of at most 16/65535 nats, so that one position
is off by half a step at most and a mean by much less (:func:`tolerance`). Exit code 1 if a figure
differs by more. ``--write FILE``: the figures of llama-perplexity as tests/golden/perplexity.json
has them, with which the tests compare ours without the tool.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from medllm_pack import resources
from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.parity.jobs import Jobs
from medllm_pack.parity.measures import Distance, compare, summarize
from medllm_pack.parity.nameless import Nameless
from medllm_pack.parity.runtime import Runtime
from medllm_pack.progress import Silent
from medllm_pack.quant import ggml
from medllm_pack.recipe import load_recipe, recipe_path

VARIANTS = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
CONTEXT, CHUNKS = 256, 16
# Line of llama-perplexity's output -> key of our figures.
LINES = {
    "Mean PPL(base)": "ppl_reference", "Mean PPL(Q)": "ppl", "Mean PPL(Q)/PPL(base)": "ppl_ratio",
    "Mean    KLD": "kld_mean", "Median  KLD": "kld_median", "99.0%   KLD": "kld_p99",
    "99.9%   KLD": "kld_p999", "Maximum KLD": "kld_max", "Same top p": "top1",
}  # fmt: skip
_STEP = 16 / 65535  # nats: log-probabilities lie within 16 of the largest, in 16 bits
_PRINTED = 1e-6
# Part of a figure that other kernels may change: three times what repacked weights and flash
# attention changed on one machine (docs/log.md).
_OTHER_KERNELS = {
    "ppl_reference": 1e-4, "ppl": 0.005, "ppl_ratio": 0.005, "kld_mean": 0.1, "kld_median": 0.15,
    "kld_p99": 0.5, "kld_p999": 1.2, "kld_max": 2.0, "top1": 0.012,
}  # fmt: skip

Figures = dict[str, float]


def main() -> None:
    """Run both, print a table, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-perplexity", type=Path, required=True, metavar="PATH")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repack", action="store_true", help="and flash attention, as by itself")
    given = parser.parse_args()
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        files = build_tiny(place / "pack")
        tool = _Tool(given.llama_perplexity, place, given.threads, plain=not given.repack)
        theirs, tokens = tool.run(files)
        if given.write:
            given.write.write_text(json.dumps(_golden(theirs, tokens), indent=1) + "\n")
        sequences = chunks(tokens)
        rows, far = _table(theirs, our_figures(files, sequences, threads=given.threads))
    print(*rows, sep="\n")
    raise SystemExit(far > 0)


def text() -> str:
    """Return the text: held-out synthetic notes, whole."""
    path = resources.folder("examples/tiny/texts") / "clinico_teste.txt"
    return path.read_text(encoding="utf-8").rstrip("\n")  # the tool drops a last line break


def build_tiny(out: Path) -> dict[str, Path]:
    """Build the variants of the tiny model; return their files."""
    path = recipe_path("tiny")
    request = Request(load_recipe(path), path.parent, out, VARIANTS)
    built = build(make_plan(request, report=Silent()))
    return {entry["quant"]: built.folder / entry["file"] for entry in built.manifest["variants"]}


def chunks(tokens: Sequence[int]) -> list[list[int]]:
    """Cut the ids of the text, BOS at their head, as llama-perplexity does."""
    bos = tokens[0]
    return [[bos, *tokens[i * CONTEXT + 1 : (i + 1) * CONTEXT]] for i in range(CHUNKS)]


def our_figures(
    files: Mapping[str, Path], sequences: Sequence[Sequence[int]], *, threads: int
) -> dict[str, Figures]:
    """Return our figures of each variant against F16, over the second half of each sequence."""
    with Nameless() as place:
        base = _logits(files["f16"], sequences, place, threads)
        return {
            quant: summarize(
                [
                    _second_half(np.load(p), np.load(q), ids)
                    for p, q, ids in zip(
                        base,
                        _logits(path, sequences, place, threads),
                        sequences,
                        strict=True,
                    )  # fmt: skip
                ]
            )
            for quant, path in files.items()
        }


def tolerance(name: str, value: float, positions: int, *, same: bool = True) -> float:
    """Return how far a figure of ours may be from llama-perplexity's.

    A rounded log-probability is off by up to half a step. A position's divergence is off by a mean
    of such errors, a mean over positions by five standard errors at most, each of a uniform
    distribution. llama.cpp's kernels on another processor have noise of their own, which is larger.

    Args:
        name: of the figure.
        value: llama-perplexity's.
        positions: over how many.
        same: whether both compute with the same kernels.
    """
    half = _STEP / 2
    mean = 5 * half / math.sqrt(3 * positions)
    other = 0.0 if same else _OTHER_KERNELS[name] * value
    if name == "top1":  # what is nearly a tie may be one after rounding
        return 3 / positions + other
    if name in ("ppl", "ppl_reference", "ppl_ratio"):
        return value * mean + _PRINTED + other
    return (mean if name == "kld_mean" else half) + _PRINTED + other


def kernels() -> str:
    """Return which instructions llama.cpp's kernels use here."""
    import llama_cpp

    return str(llama_cpp.llama_print_system_info().decode())


def _logits(
    path: Path, sequences: Sequence[Sequence[int]], place: Nameless, threads: int
) -> list[Path]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resources.folder("examples/tiny/base"))
    return Jobs(path, config, Runtime(threads=threads)).logits(sequences, place)


def _second_half(base: Any, variant: Any, ids: Sequence[int]) -> Distance:
    first = CONTEXT // 2
    distance = compare(base[first:], variant[first:], ids[first:])
    # Nothing follows the last id; the tool leaves that position out.
    return replace(
        distance, kld=distance.kld[:-1], agrees=distance.agrees[:-1], clear=distance.clear[:-1]
    )


class _Tool:
    """llama-perplexity.

    Args:
        program: its path.
        place: folder for the text and the base's log-probabilities.
        threads: of llama.cpp.
        plain: whether it takes the way through its kernels that our worker takes.
    """

    def __init__(self, program: Path, place: Path, threads: int, *, plain: bool) -> None:
        self.base, self.text = place / "base.kld", place / "text.txt"
        self.text.write_text(text(), encoding="utf-8")
        self.command = [
            str(program), "-c", str(CONTEXT), "-b", str(CONTEXT), "--chunks", str(CHUNKS),
            "-t", str(threads), "--kl-divergence-base", str(self.base),
            *(("--no-repack", "-fa", "off") if plain else ()),
        ]  # fmt: skip

    def run(self, files: Mapping[str, Path]) -> tuple[dict[str, Figures], list[int]]:
        """Return its figures of each variant, and the ids of the text."""
        self._call("-m", str(files["f16"]), "-f", str(self.text))
        return {quant: self._compare(path) for quant, path in files.items()}, self._tokens()

    def _compare(self, path: Path) -> Figures:
        """Return its figures of a variant; its log may end before its last lines are written."""
        for _ in range(20):
            if found := _read(self._call("-m", str(path), "--kl-divergence")):
                return found
        raise SystemExit(f"{self.command[0]} writes no figures of {path.name}")

    def _call(self, *more: str) -> str:
        done = subprocess.run([*self.command, *more], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def _tokens(self) -> list[int]:
        """Read the ids from the head of its file: magic, context, vocabulary, chunks."""
        with self.base.open("rb") as file:
            magic, context, _, count = struct.unpack("<8s3i", file.read(20))
            assert (magic, context, count) == (b"_logits_", CONTEXT, CHUNKS)
            return list(struct.unpack(f"<{CONTEXT * CHUNKS}i", file.read(4 * CONTEXT * CHUNKS)))


def _read(output: str) -> Figures | None:
    """Return the figures of an output; None if one is missing."""
    found = {}
    for line, name in LINES.items():
        match = re.search(rf"^{re.escape(line)}\s*:\s*(-?[0-9.]+)", output, re.MULTILINE)
        if match is None:
            return None
        found[name] = round(float(match[1]) / (100 if name == "top1" else 1), 7)
    return found


def _golden(theirs: Mapping[str, Figures], tokens: Sequence[int]) -> dict[str, Any]:
    return {
        "tool": "llama-perplexity --kl-divergence",
        "llama-cpp-python": ggml.package_version(),
        "kernels": kernels(),
        "text_sha256": hashlib.sha256(text().encode()).hexdigest(),
        "tokens_sha256": hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest(),
        "context": CONTEXT,
        "chunks": CHUNKS,
        "variants": theirs,
    }


def _table(theirs: Mapping[str, Figures], ours: Mapping[str, Figures]) -> tuple[list[str], int]:
    """Return a line a figure, and how many differ by more than they may."""
    rows, far = [f"{'':8}{'figure':15}{'theirs':>12}{'ours':>14}{'off by':>10}{'may be':>10}"], 0
    for quant, figures in theirs.items():
        for name, value in figures.items():
            off = abs(ours[quant][name] - value)
            may = tolerance(name, value, int(ours[quant]["tokens"]))
            far += off > may
            rows.append(
                f"{quant:8}{name:15}{value:12.6f}{ours[quant][name]:14.8f}{off:10.1e}{may:10.1e}"
                + ("  TOO FAR" if off > may else "")
            )
    return rows, far


if __name__ == "__main__":
    main()
