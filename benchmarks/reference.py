r"""What the reference of parity needs at full size, and whether it is transformers' own answer.

    python benchmarks/make_checkpoint.py --shape 7b --out WORK \
        --tokenizer examples/tiny/base/tokenizer.model
    python -m benchmarks.reference WORK --tokens 512

The model of WORK goes through the reference layer by layer, with its adapter, and where torch has a
GPU that works, there, too: in one piece if it fits. Then models of the shapes' widths with a few
layers go through all ways, and through transformers and PEFT as everyone loads them, float32 all,
and the logits are compared. Each is a process of its own: wall time and peak memory are what the
kernel counted for it, mapped pages of the weights included; memory of the GPU is what torch had
allocated there at most.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.build import Cost, machine, measured
from benchmarks.make_checkpoint import SHAPES, make
from medllm_pack import gpu
from medllm_pack.parity.original import Original
from medllm_pack.parity.ways import ON_CPU, Reference, Way
from medllm_pack.progress import Silent

_FEW = 2  # layers of the models that fit in one piece
_PEAK = "peak-of-the-gpu"


@dataclass(frozen=True)
class Ours:
    """The reference: writes reference-N.npy into ``out``, and what it took of the GPU's memory."""

    work: Path
    out: Path
    sequences: tuple[tuple[int, ...], ...]
    threads: int
    way: Way = ON_CPU

    def __call__(self) -> None:
        import torch

        from medllm_pack.parity import reference, whole
        from medllm_pack.parity.nameless import Nameless
        from medllm_pack.parity.ways import full_precision

        torch.set_num_threads(self.threads)
        compute = whole.compute_logits if self.way.whole else reference.compute_logits
        with Nameless() as place, full_precision():
            paths = compute(
                _original(self.work), self.sequences, place=place, device=self.way.device,
                report=Silent(),
            )  # fmt: skip
            for i, path in enumerate(paths):
                shutil.copyfile(path, self.out / f"reference-{i}.npy")
        if self.way.device == "cuda":
            (self.out / _PEAK).write_text(str(torch.cuda.max_memory_allocated()))


@dataclass(frozen=True)
class OnePiece:
    """transformers and PEFT as everyone loads them: writes whole-N.npy into ``out``."""

    work: Path
    out: Path
    sequences: tuple[tuple[int, ...], ...]
    threads: int

    def __call__(self) -> None:
        import warnings

        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # transformers about itself
        torch.set_num_threads(self.threads)
        model = AutoModelForCausalLM.from_pretrained(self.work / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(self.work / "adapter")).eval()
        for i, ids in enumerate(self.sequences):
            with torch.no_grad():
                np.save(self.out / f"whole-{i}.npy", model(torch.tensor([ids])).logits[0].numpy())


def main() -> None:
    """Measure what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="?", help="without it only the small models run")
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    print(f"{'step':46}{'wall s':>8}{'peak MiB':>10}{'read GB':>9}{'GPU MiB':>9}")
    with TemporaryDirectory(prefix="reference-") as temporary:
        out = Path(temporary)
        if arguments.work:
            sequences = _sequences(arguments.texts, arguments.tokens)
            for way in _ways(arguments.work, sequences):
                step = Ours(arguments.work.resolve(), out, sequences, arguments.threads, way)
                _show(f"{way}, {arguments.work.name}", measured(step), out)
        for name in ("7b", "mistral-7b"):
            _compare(name, out / name, _sequences(1, arguments.tokens), arguments.threads)
    print(f"{arguments.texts} x {arguments.tokens} tokens, float32; {machine()}")


def _original(work: Path) -> Original:
    base, adapter = (
        {path.name: path for path in (work / role).iterdir()} for role in ("base", "adapter")
    )
    return Original(base, adapter)


def _ways(work: Path, sequences: tuple[tuple[int, ...], ...]) -> list[Way]:
    """Return the CPU's way, and the one that parity would take on a GPU if there is one."""
    if gpu.missing():
        return [ON_CPU]
    planned = Reference(_original(work), "cuda", report=Silent())
    planned.plan(sequences)
    return [ON_CPU, planned.way]


def _sequences(texts: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    draw = np.random.default_rng(2)
    return tuple((1, *map(int, draw.integers(3, 32000, tokens - 1))) for _ in range(texts))


def _compare(name: str, folder: Path, sequences: tuple[tuple[int, ...], ...], threads: int) -> None:
    """Print the cost of all ways through the first layers of a shape, and how far they part."""
    make(replace(SHAPES[name], layers=_FEW), folder)
    label = f"{name}, {_FEW} layers"
    _show(f"transformers and PEFT, {label}", measured(OnePiece(folder, folder, sequences, threads)))
    whole = np.load(folder / "whole-0.npy")
    ways = [ON_CPU, replace(ON_CPU, whole=True)]
    if gpu.missing() is None:
        ways += [replace(way, device="cuda", title="GPU") for way in ways]
    for way in ways:
        step = Ours(folder, folder, sequences, threads, way)
        _show(f"{way}, {label}", measured(step), folder)
        ours = np.load(folder / "reference-0.npy")
        print(f"    largest difference of a logit {np.abs(ours - whole).max():.3g}, "
              f"their spread {whole.std():.3g}")  # fmt: skip


def _show(step: str, cost: Cost, out: Path | None = None) -> None:
    peak = out / _PEAK if out else None
    taken = int(peak.read_text()) / 2**20 if peak and peak.exists() else 0
    print(f"{step:46}{cost.wall:8.1f}{cost.memory / 2**20:10.0f}{cost.read / 1e9:9.2f}{taken:9.0f}")
    sys.stdout.flush()
    if peak:
        peak.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
