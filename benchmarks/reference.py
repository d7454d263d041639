r"""What the reference of parity needs at full size, and whether it is transformers' own answer.

    python benchmarks/make_checkpoint.py --shape 7b --out WORK \
        --tokenizer examples/tiny/base/tokenizer.model
    python -m benchmarks.reference WORK --tokens 512

The model of WORK goes through the reference layer by layer, with its adapter. Then models of the
shapes' widths with a few layers go through it and through transformers and PEFT in one piece,
float32 both, and the logits are compared. Each is a process of its own: wall time and peak memory
are what the kernel counted for it, mapped pages of the weights included.
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

_FEW = 2  # layers of the models that fit in one piece


@dataclass(frozen=True)
class LayerByLayer:
    """The reference: writes reference-N.npy into ``out``."""

    work: Path
    out: Path
    sequences: tuple[tuple[int, ...], ...]
    threads: int

    def __call__(self) -> None:
        import torch

        from medllm_pack.parity.nameless import Nameless
        from medllm_pack.parity.original import Original
        from medllm_pack.parity.reference import compute_logits
        from medllm_pack.progress import Silent

        torch.set_num_threads(self.threads)
        base, adapter = (
            {path.name: path for path in (self.work / role).iterdir()}
            for role in ("base", "adapter")
        )
        original = Original(base, adapter)
        with Nameless() as place:
            paths = compute_logits(original, self.sequences, place=place, report=Silent())
            for i, path in enumerate(paths):
                shutil.copyfile(path, self.out / f"reference-{i}.npy")


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
    print(f"{'step':42}{'wall s':>8}{'peak MiB':>10}{'read GB':>9}")
    with TemporaryDirectory(prefix="reference-") as temporary:
        out = Path(temporary)
        if arguments.work:
            sequences = _sequences(arguments.texts, arguments.tokens)
            step = LayerByLayer(arguments.work.resolve(), out, sequences, arguments.threads)
            _show(f"layer by layer, {arguments.work.name}", measured(step))
        for name in ("7b", "mistral-7b"):
            _compare(name, out / name, _sequences(1, arguments.tokens), arguments.threads)
    print(f"{arguments.texts} x {arguments.tokens} tokens, float32; {machine()}")


def _sequences(texts: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    draw = np.random.default_rng(2)
    return tuple((1, *map(int, draw.integers(3, 32000, tokens - 1))) for _ in range(texts))


def _compare(name: str, folder: Path, sequences: tuple[tuple[int, ...], ...], threads: int) -> None:
    """Print the cost of both ways through the first layers of a shape, and how far they part."""
    make(replace(SHAPES[name], layers=_FEW), folder)
    label = f"{name}, {_FEW} layers"
    _show(f"layer by layer, {label}", measured(LayerByLayer(folder, folder, sequences, threads)))
    _show(f"in one piece, {label}", measured(OnePiece(folder, folder, sequences, threads)))
    ours, whole = (np.load(folder / f"{kind}-0.npy") for kind in ("reference", "whole"))
    print(f"    largest difference of a logit {np.abs(ours - whole).max():.3g}, "
          f"their spread {whole.std():.3g}")  # fmt: skip


def _show(step: str, cost: Cost) -> None:
    print(f"{step:42}{cost.wall:8.1f}{cost.memory / 2**20:10.0f}{cost.read / 1e9:9.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
