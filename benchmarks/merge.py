"""The merge alone beside PEFT's: one matrix, one core, the same run.

    python -m benchmarks.merge [--ranks 8,64] [--rounds 5]

PEFT's layer merges in place: its product in float32 with a BLAS, then a sum in F16, which is the
second rounding. Ours adds the same terms in float64 in a fixed order and rounds once. What differs
is counted against the sum in float64 of all terms, rounded to F16. Ours has the same bits on every
machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.build import machine
from medllm_pack.weights.merging import add_low_rank, round_to_half

SIDE = 4096  # q_proj and v_proj of a 7B
SCALE = 2.0

Halves = NDArray[np.float16]
Doubles = NDArray[np.float64]


def main() -> None:
    """Measure what the command line asks for and print one line a rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--rounds", type=int, default=5, help="the best of each counts")
    arguments = parser.parse_args()
    print(f"{SIDE} x {SIDE}, one of {machine()}")
    print(
        f"{'rank':>4}{'ours M/s':>10}{'PEFT M/s':>10}{'ratio':>7}{'ours off':>10}{'PEFT off':>10}"
    )
    for rank in map(int, arguments.ranks.split(",")):
        print(measured(rank, rounds=arguments.rounds), flush=True)


def measured(rank: int, *, rounds: int) -> str:
    """Return a line: million weights a second, and how many values are not the nearest."""
    random = np.random.default_rng(rank)
    weight = (random.standard_normal((SIDE, SIDE)) * 0.02).astype(np.float16)
    a, b = (random.standard_normal(size) * 0.02 for size in ((rank, SIDE), (SIDE, rank)))
    a, b = a.astype(np.float32).astype(np.float64), b.astype(np.float32).astype(np.float64)
    peft, times = Peft(weight, a, b), {"ours": float("inf"), "peft": float("inf")}
    for _ in range(rounds):  # in turns: what disturbs one disturbs the other
        times["ours"] = min(times["ours"], seconds(lambda: ours(weight, a, b)))
        peft.reset()
        times["peft"] = min(times["peft"], seconds(peft.merge))
    exact = (weight + SCALE * (b @ a)).astype(np.float16)
    one, other = (weight.size / value / 1e6 for value in times.values())
    off = [int((found != exact).sum()) for found in (ours(weight, a, b), peft.result())]
    return f"{rank:4}{one:10.0f}{other:10.0f}{one / other:7.2f}{off[0]:10}{off[1]:10}"


def seconds(do: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def ours(weight: Halves, a: Doubles, b: Doubles) -> Halves:
    """Merge in blocks of rows, as a build does."""
    blocks = (slice(start, start + 512) for start in range(0, SIDE, 512))
    return np.concatenate(
        [round_to_half(add_low_rank(weight[rows], a, b[rows], SCALE)) for rows in blocks]
    )


class Peft:
    """A linear layer with an adapter, as PEFT makes it."""

    def __init__(self, weight: Halves, a: Doubles, b: Doubles) -> None:
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        torch.set_num_threads(1)
        self.weight = torch.from_numpy(weight)
        linear = torch.nn.Linear(SIDE, SIDE, bias=False, dtype=torch.float16)
        config = LoraConfig(
            r=len(a), lora_alpha=int(SCALE * len(a)), target_modules=["0"], lora_dropout=0.1
        )
        self.layer = inject_adapter_in_model(config, torch.nn.Sequential(linear))[0]
        with torch.no_grad():
            self.layer.lora_A["default"].weight.copy_(torch.from_numpy(a))
            self.layer.lora_B["default"].weight.copy_(torch.from_numpy(b))

    def reset(self) -> None:
        """Put the base's weights back."""
        self.layer.base_layer.weight.data.copy_(self.weight)
        self.layer.merged_adapters.clear()

    def merge(self) -> None:
        """Merge in place."""
        self.layer.merge()

    def result(self) -> Halves:
        """Return the merged weights."""
        merged: Halves = self.layer.base_layer.weight.data.numpy()
        return merged


if __name__ == "__main__":
    main()
