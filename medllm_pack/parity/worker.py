"""llama.cpp in a process of its own: it may abort or hang, and whoever asked must survive that.

The child gets one job as JSON on standard input and answers with one JSON object; logits go into
files that the caller has open. It sees a cleared environment, has limits, ends with its parent, and
is killed with all its children. What goes wrong is a :class:`WorkerError` with the reason. Texts
travel through the pipe only, and no dump of memory is made.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import medllm_pack
from medllm_pack.errors import MedllmError, WorkerError, shown
from medllm_pack.parity.allowance import TOGETHER, Allowance, in_batches
from medllm_pack.parity.process import ask, forbid_dumps, why

Command = Sequence[str]

# -P: the current folder, which may be anyone's, is no place to import from.
COMMAND: Command = (sys.executable, "-P", "-m", "medllm_pack.parity.worker")
# What the loader of shared libraries needs, and nothing that could hold a secret.
_KEPT = ("LD_LIBRARY_PATH", "TMPDIR", "HOME")
_KEPT_FOR_GPU = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH",
    "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "GGML_CUDA_ENABLE_UNIFIED_MEMORY",
    # Where the server is that shares a GPU between processes, if not in its usual place.
    "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ROCM_PATH",
)  # fmt: skip
# For speed, ggml lets cuBLAS add up products of F16 weights in F16, and multiply float32 as
# TensorFloat-32, with 10 bits (ggml-cuda.cu: ggml_cuda_mul_mat_cublas; common.cuh). The limits are
# for what is in the file, so here both are float32: by ggml's name for it and the one it had in
# early 2026, and by NVIDIA's for all its libraries.
_SET_FOR_GPU = {
    "GGML_CUDA_CUBLAS_COMPUTE_TYPE": "f32",
    "GGML_CUDA_FORCE_CUBLAS_COMPUTE_32F": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
}
# A build for GPUs computes large batches there even where no layer was given to it.
_HIDDEN_GPU = {
    "CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "GGML_DISABLE_VULKAN": "1",
}  # fmt: skip
_SET = {
    "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", "GGML_NO_BACKTRACE": "1",
    # Addresses that are reserved for threads and never used would count against the limit.
    "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def call(
    job: str,
    *,
    allowance: Allowance | None = None,
    command: Command = COMMAND,
    files: Sequence[int] = (),
    **arguments: Any,
) -> dict[str, Any]:
    """Run a job in a worker and return its answer.

    Args:
        job: one of :data:`JOBS`.
        allowance: what it may take; little if None.
        command: the program; tests put another in its place.
        files: descriptors of open files, which the worker gets and the job writes into.
        arguments: of the job; JSON values.

    Raises:
        WorkerError: if the worker was killed, gave up, took more than it may, or answered nothing
            that can be read.
    """
    allowance = allowance or Allowance()
    if files:
        arguments["files"] = list(files)
    question = json.dumps({"job": job, "arguments": arguments, "asked_by": os.getpid()}).encode()
    environment = _environment(allowance.gpu)
    ended = ask(command, question, environment=environment, allowance=allowance, files=files)
    if ended.code != 0:
        raise WorkerError(why(ended, allowance))
    return _read_answer(ended.answer)


def _environment(gpu: bool) -> dict[str, str]:
    names = (*_KEPT, *_KEPT_FOR_GPU) if gpu else _KEPT
    kept = {name: os.environ[name] for name in names if name in os.environ}
    # Where the package itself lies, so that a source tree works as an installation does.
    root = Path(medllm_pack.__file__).resolve().parent.parent
    return kept | _SET | (_SET_FOR_GPU if gpu else _HIDDEN_GPU) | {"PYTHONPATH": str(root)}


def _read_answer(answer: bytes) -> dict[str, Any]:
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise WorkerError("llama.cpp's worker answered something that is not JSON") from error
    if not isinstance(document, dict):
        raise WorkerError("llama.cpp's worker answered something that is not a JSON object")
    if "error" in document:
        raise WorkerError(str(document["error"]))
    return document


# --- the child


def _facts() -> dict[str, Any]:
    from medllm_pack.parity.llamacpp import look_for_gpu

    found, reason = look_for_gpu()
    return {"gpu": found, "reason": reason}


def _tokenize(model: str, texts: Sequence[str]) -> dict[str, Any]:
    from medllm_pack.parity.llamacpp import Model

    with Model(Path(model), n_ctx=0) as loaded:
        return {"ids": [loaded.tokenize(text) for text in texts]}


def _prompts(model: str, texts: Sequence[str], stops: Sequence[str]) -> dict[str, Any]:
    """Tokenize prompts as Ollama does, and spell stops in the middle of a text."""
    from medllm_pack.parity.llamacpp import Model

    with Model(Path(model), n_ctx=0) as loaded:
        return {
            "ids": [loaded.tokenize(text, special=True) for text in texts],
            "spelled": [loaded.detokenize(loaded.tokenize(f"x\n{s}\nx")) for s in stops],
        }


def _write(
    model: str, prompts: Sequence[str], tokens: int, threads: int, gpu_layers: int
) -> dict[str, Any]:
    from medllm_pack.parity.llamacpp import Model

    with Model(Path(model), n_ctx=0) as loaded:
        ids = [loaded.tokenize(prompt, special=True) for prompt in prompts]
    context = max(map(len, ids)) + tokens + 1
    written = []
    with Model(Path(model), n_ctx=context, threads=threads, gpu_layers=gpu_layers) as loaded:
        for prompt in ids:
            found = loaded.follow(prompt, tokens=tokens)
            new = [id_ for id_, _ in found]
            texts = [loaded.detokenize(new[: i + 1]) for i in range(len(new))]
            written.append({"texts": texts, "margins": [margin for _, margin in found]})
    return {"written": written, "context": context}


def _continue(
    model: str, prompts: Sequence[Sequence[int]], tokens: int, threads: int, gpu_layers: int
) -> dict[str, Any]:
    from medllm_pack.parity.llamacpp import Model

    context = max(map(len, prompts)) + tokens + 1
    groups = [prompts[at : at + TOGETHER] for at in range(0, len(prompts), TOGETHER)]
    with Model(
        Path(model), n_ctx=context, threads=threads, gpu_layers=gpu_layers,
        sequences=len(groups[0]),
    ) as loaded:  # fmt: skip
        written = [one for group in groups for one in loaded.follow_all(group, tokens=tokens)]
    return {"ids": [[id_ for id_, _ in one] for one in written]}


def _logits(
    model: str,
    sequences: Sequence[Sequence[int]],
    files: Sequence[int],
    threads: int,
    gpu_layers: int,
) -> dict[str, Any]:
    import numpy as np

    from medllm_pack.parity.llamacpp import Model

    context = max(map(len, sequences))
    batches = in_batches([len(ids) for ids in sequences])
    with Model(
        Path(model), n_ctx=context, threads=threads, gpu_layers=gpu_layers,
        sequences=max(map(len, batches)),
    ) as loaded:  # fmt: skip
        for batch in batches:
            scores = loaded.logits_of_all([sequences[i] for i in batch])
            for i, rows in zip(batch, scores, strict=True):
                with os.fdopen(files[i], "wb") as file:
                    np.save(file, rows)
    return {}


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "facts": _facts,
    "prompts": _prompts,
    "write": _write,
    "tokenize": _tokenize,
    "continue": _continue,
    "logits": _logits,
}


def main() -> None:
    """Do one job; what libraries print to standard output does not reach the answer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    forbid_dumps()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    if os.getppid() != question["asked_by"]:  # it ended before the signal was asked for
        sys.exit(1)
    job = question["job"]
    try:
        answer = JOBS[job](**question["arguments"])
    except MedllmError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": f"there is not enough memory for {shown(job)}"}
    except OSError as error:  # its own text may name a path; numpy's has no strerror
        reason = error.strerror or "not all of it was taken, by a full disk or a limit"
        answer = {"error": f"{shown(job)} could not be written: {reason}"}
    json.dump(answer, answers)
    answers.close()


if __name__ == "__main__":
    main()
