"""What a job of llama.cpp may take: time, memory, disk, and room for its answer.

Sizes follow from the model that a file should hold, not from what the file says of itself: one that
wants more meets a limit, and that is a finding. The limits are for hangs and lies, not for thrift;
docs/log.md has what jobs really take. Knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from medllm_pack.quant import ggml

_MINUTES: Final = 600.0  # seconds for what needs no weights, on a machine that is busy
_SPEED: Final = 2e9  # operations a second that even the slowest machine reaches
_DISK: Final = 50e6  # bytes a second, if the weights must be read again for every batch
_BASE: Final = 1 << 30  # Python, numpy and llama.cpp take a sixth of it
# A build for a GPU maps the vendor's libraries, too, even where none is seen: cuBLAS alone is
# 0.7 GiB in CUDA 13, 0.8 in CUDA 12.
_GPU_LIBRARIES: Final = 4 << 30
_STACK: Final = 16 << 20  # of a thread
BATCH: Final = 512  # tokens that llama.cpp computes together: what they need is bounded
TOGETHER: Final = 8  # texts that llama.cpp has in hand at a time
_ROOM: Final = 2  # times what the arithmetic below gives
_ANSWER: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Allowance:
    """Limits of a job.

    Attributes:
        seconds: on the clock.
        processor_seconds: of all its threads together.
        memory: bytes of address space; None: any.
        file: bytes of the largest file that it may write.
        answer: bytes of its answer.
        gpu: whether it gets to see one.
    """

    seconds: float = _MINUTES
    processor_seconds: float = _MINUTES
    memory: int | None = _BASE
    file: int = 0
    answer: int = _ANSWER
    gpu: bool = False


# To say whether there is a GPU. CUDA reserves more addresses than any machine has memory for all
# that it may ever share with its devices, so no limit is right; and it writes a cache of kernels.
LOOK_AT_GPU: Final = Allowance(memory=None, file=1 << 30, gpu=True)


def to_read(file: Path) -> Allowance:
    """Return what a job may take that needs the vocabulary of a file only."""
    return Allowance(memory=_to_load() + file.stat().st_size)


def to_compute(
    file: Path,
    config: Any,
    prompts: Sequence[int],
    *,
    tokens: int,
    threads: int,
    gpu: bool,
    writes: bool = False,
    together: int = 1,
) -> Allowance:
    """Return what a job may take that computes.

    Args:
        file: the weights.
        config: of the model that they should be, as transformers reads it.
        prompts: length of each.
        tokens: that follow on each, one after the other.
        threads: of llama.cpp.
        gpu: whether layers are computed there.
        writes: whether the job writes the logits of every prompt to a file.
        together: prompts whose keys and values are held at a time.
    """
    size, context = file.stat().st_size, max(prompts, default=0) + tokens + 1
    passes = sum(-(-length // BATCH) + tokens for length in prompts)
    operations = 2 * _parameters(config) * (sum(prompts) + tokens * len(prompts))
    seconds = _MINUTES + passes * size / _DISK + operations / _SPEED
    if gpu:
        memory, written = LOOK_AT_GPU.memory, LOOK_AT_GPU.file
    else:
        working = _working_memory(config, context, together)
        memory = _to_load() + size + threads * _STACK + _ROOM * working
        written = 0
    if writes:
        written = max(written, context * config.vocab_size * 4 + 4096)
    return Allowance(seconds, seconds * threads, memory, written, gpu=gpu)


def in_batches(lengths: Sequence[int]) -> list[range]:
    """Return which texts are computed together: neighbours that fit into one batch."""
    batches, start, room = [], 0, BATCH
    for i, length in enumerate(lengths):
        if i > start and (length > room or i - start == TOGETHER):
            batches.append(range(start, i))
            start, room = i, BATCH
        room -= length
    return [*batches, range(start, len(lengths))]


def _to_load() -> int:
    """Return the addresses that a worker may take before it opens a file."""
    libraries = ggml.gpu_libraries().values()
    return _BASE + (sum(libraries) + _GPU_LIBRARIES if libraries else 0)


def _parameters(config: Any) -> int:
    width, q, kv = config.hidden_size, *_widths(config)
    layer = width * (2 * q + 2 * kv) + 3 * width * config.intermediate_size
    total: int = config.num_hidden_layers * layer + config.vocab_size * width
    return total


def _working_memory(config: Any, context: int, together: int) -> int:
    """Return the bytes of keys and values, of one batch on its way, and of the logits."""
    _, kv = _widths(config)
    context = -(-context // 256) * 256  # llama.cpp rounds up
    kept = 2 * config.num_hidden_layers * kv * 2 * context * together  # F16
    wide = 8 * config.hidden_size + 4 * config.intermediate_size + 2 * config.vocab_size
    batch = 4 * BATCH * (wide + 2 * config.num_attention_heads * context)
    # In parts, as a whole, and on their way to disk.
    logits = 3 * 4 * config.vocab_size * max(context, BATCH)
    total: int = kept + batch + logits
    return total


def _widths(config: Any) -> tuple[int, int]:
    """Return the widths of queries and of keys."""
    heads: int = config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim, config.num_key_value_heads * head_dim
