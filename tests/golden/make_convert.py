"""Record what llama.cpp's convert_hf_to_gguf.py makes of two pico checkpoints, as digests.

    python -m tests.golden.make_convert LLAMA_CPP_FOLDER

LLAMA_CPP_FOLDER is ``vendor/llama.cpp`` of the source distribution of the pinned llama-cpp-python
(``pip download --no-deps --no-binary :all: llama-cpp-python``); the script needs torch and
transformers. Writes convert.json beside this file; ``tests/test_convert.py`` compares with it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf

from tests import pico

HERE = Path(__file__).resolve().parent
RECORD = HERE / "convert.json"
ARRAYS = ("tokens", "scores", "token_type")


def write_models(folder: Path) -> dict[str, Path]:
    """Write the checkpoints: LLaMA-2's form; Mistral's, grouped heads and an added token."""
    tokenizer = (HERE / "tokenizer.model").read_bytes()
    llama = pico.write_model(folder / "llama", pico.LLAMA, tokenizer=tokenizer)
    shape = pico.with_rows(pico.MISTRAL, 321)
    mistral = pico.write_model(
        folder / "mistral", shape, dtype="BF16", shards=2, tokenizer=tokenizer,
        config=shape.config(),
    )  # fmt: skip
    _add_pad_token(mistral)
    return {"llama": llama, "mistral": mistral}


def _add_pad_token(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 320}))
    path = folder / "tokenizer_config.json"
    decoder = {
        str(i): {"content": text, "special": True}
        for i, text in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (320, "[PAD]"))
    }
    config = json.loads(path.read_text()) | {"pad_token": "[PAD]", "added_tokens_decoder": decoder}
    path.write_text(json.dumps(config))


def describe(path: Path) -> dict[str, Any]:
    """Return digests of all tensors and of the tokenizer's arrays of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return {
        "tensors": {
            tensor.name: [
                tensor.tensor_type.name,
                [int(size) for size in tensor.shape],
                hashlib.sha256(tensor.data.tobytes()).hexdigest(),
            ]
            for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name)
        },
        "arrays": {
            name: hashlib.sha256(
                json.dumps(fields[f"tokenizer.ggml.{name}"], ensure_ascii=False).encode()
            ).hexdigest()
            for name in ARRAYS
        },
        "keys": {
            key: value
            for key, value in sorted(fields.items())
            if key.startswith(("llama.", "tokenizer.")) and not isinstance(value, list)
        },
    }


def main() -> None:
    """Write the record."""
    script = Path(sys.argv[1]) / "convert_hf_to_gguf.py"
    record = {}
    with tempfile.TemporaryDirectory() as name:
        for model, folder in write_models(Path(name)).items():
            out = Path(name) / f"{model}.gguf"
            options = ["--outtype", "f16", "--outfile", str(out)]
            subprocess.run([sys.executable, str(script), str(folder), *options], check=True)
            record[model] = describe(out)
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
