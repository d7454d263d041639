"""llama.cpp in a process of its own: it may abort, and a test must survive that.

``python -m tests.llama_worker COMMAND …`` prints one JSON object on its last line of output.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
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
        [sys.executable, "-m", "tests.llama_worker", command, json.dumps(arguments)],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def quantize(
    source: Path,
    target: Path,
    *,
    file_type: int = 0,
    only_copy: bool = False,
    imatrix: dict[str, list[float]] | None = None,
    threads: int = 2,
) -> None:
    """Run llama_model_quantize."""
    result = call(
        "quantize", source=str(source), target=str(target), file_type=file_type,
        only_copy=only_copy, imatrix=imatrix or {}, threads=threads,
    )  # fmt: skip
    if result["rc"] != 0:
        raise RuntimeError(f"llama_model_quantize returned {result['rc']}")


def _quantize(arguments: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = arguments["threads"]
    params.ftype = arguments["file_type"]
    params.only_copy = arguments["only_copy"]
    keep: list[Any] = []
    if arguments["imatrix"]:
        entries = (llama_cpp.llama_model_imatrix_data * (len(arguments["imatrix"]) + 1))()
        for entry, (name, values) in zip(entries, arguments["imatrix"].items(), strict=False):
            data = (ctypes.c_float * len(values))(*values)
            keep.append(data)
            entry.name, entry.data, entry.size = name.encode(), data, len(values)
        keep.append(entries)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    rc = llama_cpp.llama_model_quantize(
        arguments["source"].encode(), arguments["target"].encode(), ctypes.byref(params)
    )
    return {"rc": int(rc)}


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

    with Model(Path(arguments["model"])) as model:
        scores = model.logits(arguments["ids"])
    np.save(arguments["target"], scores)
    return {"shape": list(scores.shape)}


if __name__ == "__main__":
    commands = {
        "quantize": _quantize, "generate": _generate, "tokenize": _tokenize, "logits": _logits,
    }  # fmt: skip
    print("\n" + json.dumps(commands[sys.argv[1]](json.loads(sys.argv[2]))))
