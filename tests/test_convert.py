"""Without an adapter: the tensors and the tokenizer that llama.cpp's own converter writes.

The converter is not part of any package, so its output is kept as digests;
``tests/golden/make_convert.py`` records them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.make_convert import RECORD, describe, write_models
from tests.test_build import run, variant


@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_f16_file_holds_what_convert_hf_to_gguf_writes(tmp_path: Path, model: str) -> None:
    theirs = json.loads(RECORD.read_text(encoding="utf-8"))[model]
    folder = write_models(tmp_path)[model]
    run(tmp_path / "pack", quants=["f16"], merged=folder)
    ours = describe(variant(tmp_path / "pack", "F16"))
    assert ours["tensors"] == theirs["tensors"]
    assert ours["arrays"] == theirs["arrays"]
    # The converter leaves out ids that it finds in no JSON file; whatever it says, we say too.
    assert theirs["keys"].items() <= ours["keys"].items()
