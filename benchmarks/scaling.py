r"""How a build scales: with threads, with the number of variants, and with the size of the model.

    python benchmarks/make_checkpoint.py --shape 1b --out WORK \
        --tokenizer examples/tiny/base/tokenizer.model
    python -m benchmarks.scaling WORK [MORE_WORK …]

For each checkpoint: the variants one by one, then all of them at once, each build a process of its
own, measured as in build.py. Before that the quantizing part alone, from memory to memory, with one
thread and with two. Peaks of several checkpoints side by side show what memory depends on.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.build import Cost, Ours, compile_kernels, machine, measured
from medllm_pack.quant import kernels

VARIANTS = "f16,q8_0,q6_k,q5_k_m,q4_k_m"
ROWS, COLUMNS, BLOCKS = 256, 4096, 64


def main() -> None:
    """Measure what the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", type=Path, nargs="*", metavar="WORK")
    parser.add_argument("--quant", default=VARIANTS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(machine())
    for line in _threads(("Q4_K", "Q6_K", "Q8_0")):
        print(line, flush=True)
    compile_kernels(arguments.quant)
    for work in arguments.works:
        for line in _variants(work.resolve(), arguments.quant.split(","), arguments.threads):
            print(line, flush=True)


def _threads(kinds: tuple[str, ...]) -> Iterator[str]:
    """Yield a line a type: million weights a second with one thread and with two."""
    noise = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    kernels.warm_up([(kind, False) for kind in kinds])
    yield f"\n{'quantizing':12}{'1 thread M/s':>14}{'2 threads M/s':>15}{'ratio':>8}"
    for kind in kinds:
        best = {1: float("inf"), 2: float("inf")}
        for _ in range(5):  # in turns: what disturbs one disturbs the other
            for threads in best:
                best[threads] = min(best[threads], _seconds(noise, kind, threads))
        one, two = (noise.size * BLOCKS / best[n] / 1e6 for n in (1, 2))
        yield f"{kind:12}{one:14.0f}{two:15.0f}{two / one:8.2f}"


def _seconds(rows: NDArray[np.float32], kind: str, threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(lambda _: kernels.quantize(rows, kind), range(BLOCKS)))
        return time.perf_counter() - start


def _variants(work: Path, names: list[str], threads: int) -> Iterator[str]:
    """Yield a line a build, and what all at once cost against the sum of the single ones."""
    yield f"\n{work.name:24}{'wall s':>8}{'peak MiB':>10}{'read GB':>9}{'written GB':>12}"
    single = []
    for name in names:
        single.append(_build(work, name, threads))
        yield _row(name, single[-1])
    total = sum(single[1:], start=single[0])
    yield _row(f"{len(names)} builds, sum", total)
    together = _build(work, ",".join(names), threads)
    yield _row("all at once", together)
    yield f"all at once / sum: {together.wall / total.wall:.2f}"


def _build(work: Path, quant: str, threads: int) -> Cost:
    cost = measured(Ours(work, quant, threads))
    shutil.rmtree(work / "pack")
    return cost


def _row(name: str, cost: Cost) -> str:
    return (
        f"{name:24}{cost.wall:8.1f}{cost.memory / 2**20:10.0f}"
        f"{cost.read / 1e9:9.2f}{cost.written / 1e9:12.2f}"
    )


if __name__ == "__main__":
    main()
