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


class _ImatrixEntry(ctypes.Structure):
    # struct llama_model_imatrix_data of llama.h
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


def _quantize(arguments: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = arguments["threads"]
    params.ftype = arguments["file_type"]
    params.only_copy = arguments["only_copy"]
    keep: list[Any] = []
    if arguments["imatrix"]:
        entries = (_ImatrixEntry * (len(arguments["imatrix"]) + 1))()
        for entry, (name, values) in zip(entries, arguments["imatrix"].items(), strict=False):
            data = (ctypes.c_float * len(values))(*values)
            keep.append(data)
            entry.name, entry.data, entry.size = name.encode(), data, len(values)
        keep.append(entries)
        params.imatrix = ctypes.cast(entries, ctypes.c_void_p)
    rc = llama_cpp.llama_model_quantize(
        arguments["source"].encode(), arguments["target"].encode(), ctypes.byref(params)
    )
    return {"rc": int(rc)}


def _generate(arguments: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import Llama

    model = Llama(arguments["model"], n_ctx=256, n_threads=2, verbose=False, seed=1)
    texts = []
    for prompt in arguments["prompts"]:
        model.reset()
        result: Any = model.create_completion(
            prompt, max_tokens=arguments["tokens"], temperature=0.0
        )
        texts.append(result["choices"][0]["text"])
    return {"texts": texts, "metadata": model.metadata}


def _tokenize(arguments: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import Llama

    model = Llama(arguments["model"], vocab_only=True, verbose=False)
    return {
        "ids": [model.tokenize(t.encode(), add_bos=True, special=False) for t in arguments["texts"]]
    }


def _logits(arguments: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from llama_cpp import Llama

    model = Llama(arguments["model"], n_ctx=256, n_threads=2, verbose=False, logits_all=True)
    model.eval(arguments["ids"])
    scores = np.array(model.scores[: len(arguments["ids"])], dtype=np.float32)
    np.save(arguments["target"], scores)
    return {"shape": list(scores.shape)}


if __name__ == "__main__":
    commands = {
        "quantize": _quantize, "generate": _generate, "tokenize": _tokenize, "logits": _logits,
    }  # fmt: skip
    print("\n" + json.dumps(commands[sys.argv[1]](json.loads(sys.argv[2]))))
