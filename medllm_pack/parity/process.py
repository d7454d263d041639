"""One question to a process with limits, one answer: whatever it does, whoever asked survives it.

The kernel limits address space, processor time, open files, the size of written files, and core
dumps; here the clock and the length of the answer are watched. What it says on standard error is
read for known words only, of which none can be a text of a user. Knows nothing of llama.cpp.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, cast

from medllm_pack.errors import WorkerError
from medllm_pack.parity.allowance import Allowance

_FILES = 512  # open at once
_CHUNK = 1 << 16
_TAIL = 1 << 14  # bytes of standard error that are kept
_PR_SET_DUMPABLE = 4  # linux/prctl.h
# What ggml and the C++ runtime say before they abort; an assertion is a line of their source.
_ASSERTION = re.compile(rb"GGML_ASSERT\(([\x20-\x7e]{1,160}?)\) failed")
# ggml-cuda.cu: ggml_cuda_error; what follows is cudaGetErrorString's, or cuBLAS's.
_GPU_FAILED = re.compile(rb"(?:\A|\n)(?:CUDA|ROCm) error: ([\x20-\x7e]{1,120}?)\s*\n")
_GPU_FULL = (b"out of memory", b"CUBLAS_STATUS_ALLOC_FAILED")
_NO_MEMORY = (b"std::bad_alloc", b"MemoryError", b"GGML_ASSERT(ctx->mem_buffer != NULL)")
_EXCEPTION = re.compile(rb"(?:\A|\n)([A-Za-z_][\w.]{0,60}(?:Error|Exception))(?::[^\n]*)?\s*\Z")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        answer: what it wrote to standard output.
        code: as subprocess has it; negative: a signal.
        tail: the end of what it wrote to standard error.
    """

    answer: bytes
    code: int
    tail: bytes


def ask(
    command: Sequence[str],
    question: bytes,
    *,
    environment: Mapping[str, str],
    allowance: Allowance,
    files: Sequence[int] = (),
) -> Ended:
    """Run a command, write the question to it and read its answer.

    The process and all that it started are gone when this returns or raises. It gets the
    descriptors ``files`` under their numbers.

    Raises:
        WorkerError: if it takes more time than it may, or answers more.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, start_new_session=True, pass_fds=files,
    )  # fmt: skip
    try:
        # From here, since code between fork and exec is not safe beside threads. The process waits
        # for its question until then.
        _limit(process.pid, allowance)
        return _Talk(process, question, allowance).finish()
    finally:
        _kill(process)


def forbid_dumps() -> None:
    """Let the kernel write no dump of this process's memory, whatever ends it; for good.

    A limit of zero is not enough where dumps go to a program (core(5)): that one may keep them.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def why(ended: Ended, allowance: Allowance) -> str:
    """Return how a process ended that did not end well, with the reason if it is known."""
    hint = _hint(ended.tail, allowance)
    if ended.code > 0:
        return f"llama.cpp's worker ended with exit code {ended.code}{hint}"
    name = signal.Signals(-ended.code).name
    if name == "SIGXCPU":
        hint = f": it may use {allowance.processor_seconds:.0f} s of processor time"
    if name == "SIGKILL":
        hint = ", as the kernel does when memory runs out"
    return f"llama.cpp was ended by {name}{hint}"


def _hint(tail: bytes, allowance: Allowance) -> str:
    if failure := _GPU_FAILED.search(tail):
        advice = "; ask for fewer --gpu-layers" if failure[1] in _GPU_FULL else ""
        return f": the GPU failed: {failure[1].decode('ascii')}{advice}"
    if any(words in tail for words in _NO_MEMORY):
        limit = allowance.memory
        return ": no memory" + (f" beyond the {limit / 2**30:.1f} GiB it may use" if limit else "")
    if assertion := _ASSERTION.search(tail):
        return f": {assertion[1].decode('ascii')} does not hold"
    if exception := _EXCEPTION.search(tail):
        return f" ({exception[1].decode('ascii')})"
    return ""


def _limit(pid: int, allowance: Allowance) -> None:
    seconds = max(int(allowance.processor_seconds), 1)
    limits = {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (_FILES, _FILES),
        resource.RLIMIT_FSIZE: (allowance.file, allowance.file),
        resource.RLIMIT_CPU: (seconds, seconds + 5),  # SIGXCPU first, which says what it is
    }
    if allowance.memory is not None:
        limits[resource.RLIMIT_AS] = (allowance.memory, allowance.memory)
    for kind, (soft, hard) in limits.items():
        _, most = resource.prlimit(pid, kind)
        if most != resource.RLIM_INFINITY:  # an administrator may allow less
            soft, hard = min(soft, most), min(hard, most)
        resource.prlimit(pid, kind, (soft, hard))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started."""
    # It may have ended by itself, with nothing of its session left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        stream.close()


class _Talk:
    """Writes and reads at the same time, so that neither side waits for the other for ever."""

    def __init__(
        self, process: subprocess.Popen[bytes], question: bytes, allowance: Allowance
    ) -> None:
        self.process, self.allowance = process, allowance
        self.rest = memoryview(question)
        self.until = time.monotonic() + allowance.seconds
        self.answer, self.tail = bytearray(), bytearray()

    def finish(self) -> Ended:
        stdin, *said = self.process.stdin, self.process.stdout, self.process.stderr
        assert stdin is not None
        os.set_blocking(stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            for stream in said:
                assert stream is not None
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(self._left()):
                    stream = cast("IO[bytes]", key.fileobj)
                    goes_on = self._write(stream) if stream is stdin else self._read(stream)
                    if not goes_on:
                        selector.unregister(stream)
                        stream.close()  # for the question, that is its end
        try:
            code = self.process.wait(self._left())
        except subprocess.TimeoutExpired:
            raise self._late() from None
        return Ended(bytes(self.answer), code, bytes(self.tail))

    def _left(self) -> float:
        left = self.until - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> WorkerError:
        return WorkerError(f"llama.cpp did not finish within {self.allowance.seconds:.0f} s")

    def _write(self, stream: IO[bytes]) -> bool:
        """Write a part of the question; return whether there is more."""
        try:
            self.rest = self.rest[os.write(stream.fileno(), self.rest[:_CHUNK]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:  # it ended, and how will be seen
            return False
        return bool(self.rest)

    def _read(self, stream: IO[bytes]) -> bool:
        data = os.read(stream.fileno(), _CHUNK)
        if stream is self.process.stderr:
            self.tail = (self.tail + data)[-_TAIL:]
            return bool(data)
        self.answer += data
        if len(self.answer) > self.allowance.answer:
            raise WorkerError(
                f"llama.cpp's worker answered more than {self.allowance.answer} bytes"
            )
        return bool(data)
