"""llama.cpp in a process of its own: it may abort, and a test must survive that.

``python -m tests.llama_worker COMMAND`` reads its arguments, in JSON, from its input and prints one
JSON object on its last line of output.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medllm_pack.parity.llamacpp import Model

ROOT = Path(__file__).resolve().parent.parent


def call(command: str, **arguments: Any) -> dict[str, Any]:
    """Run a command in a worker; return its result, or raise with what it said."""
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "GGML_NO_BACKTRACE": "1",
        "HOME": os.environ.get("HOME", "/"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.llama_worker", command],
        input=json.dumps(arguments), capture_output=True, text=True, env=environment,
        timeout=600, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@dataclass(frozen=True)
class Job:
    """A file that llama_model_quantize shall make of another."""

    source: Path
    target: Path
    file_type: int = 0
    only_copy: bool = False
    imatrix: dict[str, list[float]] = field(default_factory=dict)


def quantize(jobs: Iterable[Job], *, packs: Sequence[dict[str, Any]] = ()) -> None:
    """Run llama_model_quantize for every job in one process, after building packs of ours in it."""
    wanted = [asdict(job) | {"source": str(job.source), "target": str(job.target)} for job in jobs]
    result = call("quantize", jobs=wanted, packs=packs)
    if any(result["rc"]):
        raise RuntimeError(f"llama_model_quantize returned {result['rc']}")


def _quantize(arguments: dict[str, Any]) -> dict[str, Any]:
    if arguments["packs"]:
        from tests.test_build import run

        for pack in arguments["packs"]:
            merged, imatrix = Path(pack["merged"]), Path(pack["imatrix"])
            run(Path(pack["out"]), quants=pack["quants"], merged=merged, imatrix=imatrix)
    return {"rc": [_quantize_one(job) for job in arguments["jobs"]]}


def _quantize_one(job: dict[str, Any]) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 2
    params.ftype = job["file_type"]
    params.only_copy = job["only_copy"]
    keep: list[Any] = []
    if job["imatrix"]:
        entries = (llama_cpp.llama_model_imatrix_data * (len(job["imatrix"]) + 1))()
        for entry, (name, values) in zip(entries, job["imatrix"].items(), strict=False):
            data = (ctypes.c_float * len(values))(*values)
            keep.append(data)
            entry.name, entry.data, entry.size = name.encode(), data, len(values)
        keep.append(entries)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return int(
        llama_cpp.llama_model_quantize(
            job["source"].encode(), job["target"].encode(), ctypes.byref(params)
        )
    )


def _generate(arguments: dict[str, Any]) -> dict[str, Any]:
    texts = {}
    for path in arguments["models"]:
        with Model(Path(path), threads=1) as model:  # two wait for each other beside other work
            texts[path] = [model.write(p, tokens=arguments["tokens"]) for p in arguments["prompts"]]
    return texts


def _tokenize(arguments: dict[str, Any]) -> dict[str, Any]:
    with Model(Path(arguments["model"])) as model:
        return {"ids": [model.tokenize(text) for text in arguments["texts"]]}


def _logits(arguments: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    with Model(Path(arguments["model"]), threads=1) as model:
        for ids, target in zip(arguments["texts"], arguments["targets"], strict=True):
            np.save(target, model.logits(ids))
    return {}


if __name__ == "__main__":
    commands = {
        "quantize": _quantize, "generate": _generate, "tokenize": _tokenize, "logits": _logits,
    }  # fmt: skip
    print("\n" + json.dumps(commands[sys.argv[1]](json.load(sys.stdin))))
