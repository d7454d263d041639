r"""The whole build against the peers' way and against the floor, in one run, as one table.

    python benchmarks/make_checkpoint.py --shape 7b --out WORK \
        --tokenizer examples/tiny/base/tokenizer.model
    python benchmarks/build.py WORK --llama-cpp FOLDER

The peers' way is PEFT's merge_and_unload and save_pretrained, llama.cpp's convert_hf_to_gguf.py,
llama_model_quantize, and the copy with SHA-256 that a blob store makes. FOLDER is
``vendor/llama.cpp`` of the source distribution of the pinned llama-cpp-python. The floor reads the
inputs and writes as many bytes as the outputs have, with fsync and SHA-256, and nothing else: once
through the page cache, as the peers do, and once past it, as the build does.

Each step is a process of its own: wall time, peak memory and bytes that reached the disk are what
the kernel counted for it. What the machine has not compiled yet is compiled before. WORK needs
about three times the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

CHUNK = 4 << 20


@dataclass(frozen=True)
class Cost:
    """What a step cost.

    Attributes:
        wall: seconds.
        memory: peak resident bytes of the process.
        read, written: bytes that passed through the block layer.
    """

    wall: float
    memory: int
    read: int
    written: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.wall + other.wall, max(self.memory, other.memory),
            self.read + other.read, self.written + other.written,
        )  # fmt: skip


def measured(step: Callable[[], None]) -> Cost:
    """Run a step in a fresh process and return its cost."""
    process = get_context("spawn").Process(target=step)
    start = time.perf_counter()
    process.start()
    assert process.pid is not None
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"a step ended with {status}")
    block = 512
    return Cost(wall, usage.ru_maxrss * 1024, usage.ru_inblock * block, usage.ru_oublock * block)


@dataclass(frozen=True)
class PeftMerge:
    """PEFT's merge of the whole model in memory."""

    work: Path

    def __call__(self) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.work / "base", dtype=torch.float16)
        model = PeftModel.from_pretrained(base, str(self.work / "adapter")).merge_and_unload()
        model.save_pretrained(self.work / "merged")
        shutil.copy(self.work / "base" / "tokenizer.model", self.work / "merged")


@dataclass(frozen=True)
class Convert:
    """llama.cpp's converter, F16."""

    work: Path
    llama_cpp: Path

    def __call__(self) -> None:
        script = self.llama_cpp / "convert_hf_to_gguf.py"
        os.execv(
            sys.executable,
            [sys.executable, str(script), str(self.work / "merged"), "--outtype", "f16",
             "--outfile", str(self.work / "peers-f16.gguf")],
        )  # fmt: skip


@dataclass(frozen=True)
class Quantize:
    """llama.cpp's quantizer."""

    work: Path
    file_type: int
    threads: int

    def __call__(self) -> None:
        import ctypes

        import llama_cpp

        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype = self.threads, self.file_type
        out = self.work / f"peers-{self.file_type}.gguf"
        code = llama_cpp.llama_model_quantize(
            str(self.work / "peers-f16.gguf").encode(), str(out).encode(), ctypes.byref(params)
        )
        sys.exit(code)


@dataclass(frozen=True)
class Store:
    """Copy a file into a blob store under its digest."""

    source: Path

    def __call__(self) -> None:
        digest = hashlib.sha256()
        with self.source.open("rb") as file, self.source.with_suffix(".blob").open("wb") as out:
            while data := file.read(CHUNK):
                digest.update(data)
                out.write(data)
            out.flush()
            os.fsync(out.fileno())


@dataclass(frozen=True)
class Ours:
    """medllm-pack build."""

    work: Path
    quant: str
    threads: int

    def __call__(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # its table would stand between ours
        os.execv(
            sys.executable,
            [sys.executable, "-m", "medllm_pack", "build", "7b", "--quant", self.quant,
             "--base", str(self.work / "base"), "--adapter", str(self.work / "adapter"),
             "--threads", str(self.threads), "--out", str(self.work / "pack"), "--quiet",
             "--force"],
        )  # fmt: skip


def compile_kernels(quant: str) -> None:
    """Build the small model, so that no measured build is the first on this machine."""
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "medllm_pack", "build", "tiny", "--quant", quant,
             "--out", f"{folder}/tiny", "--quiet"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    print(f"  build of tiny, compiling: {time.perf_counter() - start:.1f} s", file=sys.stderr)


@dataclass(frozen=True)
class Floor:
    """Read the inputs, write as much as the outputs hold, digest both."""

    work: Path
    sizes: tuple[int, ...]
    flags: int = 0  # of open, such as O_DIRECT

    def __call__(self) -> None:
        # Anonymous memory begins at a page, as O_DIRECT wants it.
        block = mmap.mmap(-1, CHUNK)
        for path in sorted((self.work / "base").glob("*.safetensors")):
            self._read(path, block)
        block[:] = os.urandom(CHUNK)
        for number, size in enumerate(self.sizes):
            self._write(self.work / f"floor-{number}", size, block)

    def _read(self, path: Path, block: mmap.mmap) -> None:
        digest, fd = hashlib.sha256(), os.open(path, os.O_RDONLY | self.flags)
        while n := os.readv(fd, [block]):
            digest.update(memoryview(block)[:n])
        os.close(fd)

    def _write(self, path: Path, size: int, block: mmap.mmap) -> None:
        digest = hashlib.sha256()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | self.flags)
        for left in range(size, 0, -CHUNK):
            data = memoryview(block)[: min(left, CHUNK)]
            digest.update(data)
            os.write(fd, data if len(data) == CHUNK else block)  # whole pages; cut below
        os.ftruncate(fd, size)
        os.fsync(fd)
        os.close(fd)


def main() -> None:
    """Measure what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-cpp", type=Path, help="without it the peers are left out")
    parser.add_argument("--quant", default="f16,q4_k_m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    rows: list[tuple[str, Cost]] = []

    def run(name: str, step: Callable[[], None]) -> Cost:
        cost = measured(step)
        rows.append((name, cost))
        print(f"  {name}: {cost.wall:.1f} s", file=sys.stderr, flush=True)
        return cost

    compile_kernels(arguments.quant)
    ours = run("medllm-pack build", Ours(work, arguments.quant, arguments.threads))
    sizes = tuple(path.stat().st_size for path in sorted((work / "pack").glob("*.gguf")))
    shutil.rmtree(work / "pack")
    for name, flags in (("floor, through the page cache", 0), ("floor, past it", os.O_DIRECT)):
        run(name, Floor(work, sizes, flags))
        for number in range(len(sizes)):
            (work / f"floor-{number}").unlink()
    if arguments.llama_cpp:
        peers = _run_peers(run, work, arguments)
        rows.append(("peers, sum", peers))
    print(table(rows, ours=ours, outputs=sum(sizes)))


def _run_peers(
    run: Callable[[str, Callable[[], None]], Cost], work: Path, arguments: argparse.Namespace
) -> Cost:
    """Run the peers' steps; what no later step reads is removed, to spare the disk."""
    from medllm_pack.quant.mixes import load_mix

    total = run("PEFT merge", PeftMerge(work))
    total += run("convert_hf_to_gguf", Convert(work, arguments.llama_cpp.resolve()))
    shutil.rmtree(work / "merged")
    outputs = [work / "peers-f16.gguf"]
    for name in arguments.quant.split(","):
        if name.lower() != "f16":
            kind = load_mix(name).file_type
            total += run(f"llama_model_quantize {name}", Quantize(work, kind, arguments.threads))
            outputs.append(work / f"peers-{kind}.gguf")
    for path in outputs:
        if path.name != "peers-f16.gguf" or "f16" in arguments.quant.lower().split(","):
            total += run(f"store {path.name}", Store(path))
            path.with_suffix(".blob").unlink()
        path.unlink()
    return total


def table(rows: list[tuple[str, Cost]], *, ours: Cost, outputs: int) -> str:
    """Return the measurements with ratios to ours."""
    lines = [
        f"{'step':34}{'wall s':>8}{'ratio':>7}{'peak MiB':>10}{'read GB':>9}{'written GB':>12}"
    ]
    for name, cost in rows:
        lines.append(
            f"{name:34}{cost.wall:8.1f}{cost.wall / ours.wall:7.2f}{cost.memory / 2**20:10.0f}"
            f"{cost.read / 1e9:9.2f}{cost.written / 1e9:12.2f}"
        )
    lines.append(f"outputs: {outputs / 1e9:.2f} GB; threads as given; {machine()}")
    return "\n".join(lines)


def machine() -> str:
    """Return what the system calls the processor, and how many may be used."""
    done = subprocess.run(["lscpu"], capture_output=True, text=True, check=False)
    names = [
        line.split(":")[1].strip() for line in done.stdout.splitlines() if "Model name" in line
    ]
    return (
        f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'an unknown processor'}"
    )


if __name__ == "__main__":
    main()
