"""Freed memory is used again instead of being zeroed by the kernel."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_COUNT = """
import resource, sys
import numpy as np
from medllm_pack.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def touch():
    for _ in range(32):
        np.empty(48 << 20, dtype=np.uint8)[::4096] = 1
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Return the page faults of 32 arrays of 48 MiB, after as many before."""
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, way], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_arrays_of_every_block_cost_page_faults_once() -> None:
    assert faults("keep") * 10 < faults("give back")
