"""Freed memory is used again instead of being zeroed by the kernel."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from medllm_pack import allocator
from medllm_pack.pack.build import BLOCK_WEIGHTS

_COUNT = """
import ctypes, resource, sys
import numpy as np
from medllm_pack.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
else:  # what of it an old glibc took when the other value was 1 GiB
    ctypes.CDLL(None).mallopt(-1, 1 << 30)
def touch():
    for _ in range(32):
        np.empty(24 << 20, dtype=np.uint8)[::4096] = 1
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Return the page faults of 32 arrays of 24 MiB, after as many before."""
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, way], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_arrays_of_every_block_cost_page_faults_once() -> None:
    assert faults("keep") * 10 < faults("trim alone")


def test_old_glibc_takes_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It forbids thresholds above half of a thread's heap, HEAP_MAX_SIZE / 2, in malloc.c."""
    taken: list[tuple[int, int]] = []

    class OldGlibc:
        def mallopt(self, parameter: int, value: int) -> int:
            accepted = parameter != -3 or value <= 32 << 20
            if accepted:
                taken.append((parameter, value))
            return int(accepted)

    monkeypatch.setattr("ctypes.CDLL", lambda name: OldGlibc())
    allocator.keep_freed_memory()
    assert [parameter for parameter, _ in taken] == [-3, -1]
    assert taken[0][1] >= BLOCK_WEIGHTS * 8  # the largest array of a block: float64 while merging
