"""Our kernels beside ``ggml_quantize_chunk``: one core, the same weights, the same run.

    python benchmarks/kernels.py                     speed, as one table
    python benchmarks/kernels.py --kinds Q4_K,Q6_K   of these types only
    python benchmarks/kernels.py --identity 10       10 million random blocks a kernel, compared
    python benchmarks/kernels.py --importance yes    only the kernels that take a matrix

The bytes of both are compared in every round, so a figure without identity cannot appear.
Exit code 1 if a block differs or, without --identity, a ratio is below what was asked for.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from medllm_pack.quant import ggml, kernels

COLUMNS = 4096
ROWS = 256
# What is wanted at least, as a multiple of ggml's speed; 1 where it says "none slower".
TARGETS = {
    ("Q4_K", False): 6, ("Q5_K", False): 5, ("Q2_K", False): 4, ("Q6_K", False): 4,
    ("Q3_K", False): 2, ("IQ4_XS", False): 5, ("Q4_K", True): 5, ("Q5_K", True): 5,
}  # fmt: skip

Floats = NDArray[np.float32]


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(kernels.kinds()), metavar="LIST")
    parser.add_argument("--rounds", type=int, default=5, help="the best of each counts")
    parser.add_argument("--identity", type=float, metavar="N", help="compare N million blocks")
    parser.add_argument("--importance", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    matrices = {"yes": (True,), "no": (False,), "both": (False, True)}[args.importance]
    cases = [(kind, weighted) for weighted in matrices for kind in args.kinds.split(",")]
    print(f"{processor()}, one core, numpy {np.__version__}, numba {version('numba')}, "
          f"llama-cpp-python {ggml.package_version()}")  # fmt: skip
    if args.identity is not None:
        return compare(cases, round(args.identity * 1e6), args.seed)
    return measure(cases, args.rounds, args.seed)


def measure(cases: list[tuple[str, bool]], rounds: int, seed: int) -> int:
    """Print one line a kernel; million weights per second, the best of some rounds."""
    random = np.random.default_rng(seed)
    rows = (random.standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float16).astype(np.float32)
    importance = random.random(COLUMNS).astype(np.float32) ** 4
    failed = False
    print(f"{'type':8} {'importance':10} {'ggml M/s':>9} {'ours M/s':>9} {'ratio':>6} {'asked':>5}"
          f" {'compiled in':>12}")  # fmt: skip
    for kind, weighted in cases:
        weights = importance if weighted else None
        start = time.perf_counter()
        kernels.warm_up([(kind, weighted)])
        prepared = time.perf_counter() - start
        ours = theirs = float("inf")
        for _ in range(rounds):  # in turns: what disturbs one disturbs the other
            seconds, our_bytes = timed(kernels.quantize, rows, kind, weights)
            ours = min(ours, seconds)
            seconds, their_bytes = timed(ggml.quantize, rows, kind, weights)
            theirs = min(theirs, seconds)
            assert np.array_equal(our_bytes, their_bytes), f"{kind}: the bytes differ"
        target = TARGETS.get((kind, weighted), 1)
        failed |= theirs / ours < target
        print(f"{kind:8} {'yes' if weighted else 'no':10} {rows.size / theirs / 1e6:9.1f} "
              f"{rows.size / ours / 1e6:9.1f} {theirs / ours:5.1f}x {target:4}x "
              f"{prepared:10.2f} s", flush=True)  # fmt: skip
    return int(failed)


def timed(
    quantize: Callable[..., NDArray[np.uint8]], rows: Floats, kind: str, weights: Floats | None
) -> tuple[float, NDArray[np.uint8]]:
    """Return the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    data = quantize(rows, kind, importance=weights)
    return time.perf_counter() - start, data


def compare(cases: list[tuple[str, bool]], wanted: int, seed: int) -> int:
    """Compare random blocks of many sizes and shapes; print one line a kernel."""
    failed = False
    for kind, weighted in cases:
        random = np.random.default_rng(seed)
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        start, done, different = time.perf_counter(), 0, 0
        while done < wanted:
            for rows in samples(random):
                weights = random_importance(random) if weighted else None
                ours = kernels.quantize(rows, kind, importance=weights)
                theirs = ggml.quantize(rows, kind, importance=weights)
                different += int((ours != theirs).reshape(-1, size).any(axis=1).sum())
                done += rows.size // block
        failed |= different > 0
        print(f"{kind:8} {'importance' if weighted else 'plain':10} {done:12,} blocks, "
              f"{different} differ, {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    return int(failed)


def samples(random: np.random.Generator) -> Iterator[Floats]:
    """Yield random rows: noise as in weights, of every size, sparse, with outliers, shifted."""
    shape = (ROWS, COLUMNS)
    noise = random.standard_normal(shape, dtype=np.float32)
    yield as_half(noise * np.float32(0.02))
    yield as_half(noise * (10.0 ** random.uniform(-8, 3, (ROWS, 1))).astype(np.float32))
    yield as_half(
        noise * np.repeat(10.0 ** random.uniform(-8, 3, (ROWS, COLUMNS // 16)), 16, axis=1)
    )
    yield as_half(noise * (random.random(shape, dtype=np.float32) < 0.1))
    yield as_half(noise**5)
    yield as_half(noise * np.float32(0.1) + random.uniform(-3, 3, (ROWS, 1)))
    yield as_half(np.abs(noise) * np.float32(-1))
    yield as_half(np.rint(noise * 8) / 16)
    bits = random.integers(0, 1 << 16, shape, dtype=np.uint16).view(np.float16)
    yield np.nan_to_num(bits.astype(np.float32), nan=0, posinf=65504, neginf=-65504)


def as_half(values: NDArray[np.floating]) -> Floats:
    """Return values that an F16 holds."""
    wide: Floats = np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)
    return wide


def random_importance(random: np.random.Generator) -> Floats:
    """Return an importance matrix of random steepness and size, sometimes with zeros."""
    weights = random.random(COLUMNS, dtype=np.float32) ** np.float32(random.integers(1, 9))
    if random.random() < 0.3:
        weights[random.random(COLUMNS) < random.random()] = 0
    return weights * np.float32(10.0 ** random.uniform(-6, 3))


def processor() -> str:
    """Return what the system calls the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} processors"


if __name__ == "__main__":
    raise SystemExit(main())
