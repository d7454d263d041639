"""The model that ships inside: it builds offline, llama.cpp runs it, and the adapter shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medllm_pack import resources
from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.progress import Silent
from medllm_pack.recipe import load_recipe, recipe_path
from tests import llama_worker

VARIANTS = ["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "iq4_xs"]


def pack(out: Path, quants: list[str], *, merged: str | None = None) -> Path:
    path = recipe_path("tiny")
    request = Request(
        recipe=load_recipe(path), folder=path.parent, out=out, variants=quants, merged=merged
    )
    return build(make_plan(request, report=Silent())).folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("tiny") / "pack", VARIANTS)


def test_pack_is_that_of_the_recipe_without_departures(tiny: Path) -> None:
    document = json.loads((tiny / "pack.json").read_text(encoding="utf-8"))
    assert document["name"] == "medllm-tiny"
    assert document["deviations"] == []
    assert document["adapter"] | {"r": 8, "alpha": 16.0, "tensors": 64} == document["adapter"]
    assert document["license"] | {"files": ["LICENSE"], "missing": []} == document["license"]


def test_every_branch_of_q3_k_m_is_reached(tiny: Path) -> None:
    """Its finest rule is for the first sixteenth of the blocks."""
    document = json.loads((tiny / "pack.json").read_text(encoding="utf-8"))
    types = next(v["types"] for v in document["variants"] if v["quant"] == "q3_k_m")
    assert set(types) == {"F32", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


def test_llama_cpp_writes_with_every_variant(tiny: Path) -> None:
    files = sorted(str(path) for path in tiny.glob("*.gguf"))
    assert len(files) == len(VARIANTS)
    prompts = ["Paciente", "Exame físico:"]
    for texts in llama_worker.call("generate", models=files, prompts=prompts, tokens=24).values():
        assert all(len(text.split()) > 3 for text in texts)


def loss(model: Path, folder: Path) -> float:
    """Return nats a token on held-out clinical notes, by llama.cpp's logits."""
    held_out = resources.folder("examples/tiny/texts") / "clinico_teste.txt"
    notes = held_out.read_text(encoding="utf-8").split("\n\n")[:6]
    ids = llama_worker.call("tokenize", model=str(model), texts=notes)["ids"]
    ids = [note[:256] for note in ids]
    targets = [str(folder / f"{number}.npy") for number in range(len(ids))]
    llama_worker.call("logits", model=str(model), texts=ids, targets=targets)
    losses = []
    for note, target in zip(ids, targets, strict=True):
        scores = np.load(target).astype(np.float64)[:-1]
        top = scores.max(axis=1)
        normal = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        losses += list(normal - scores[np.arange(len(note) - 1), note[1:]])
    return float(np.mean(losses))


def test_the_adapters_effect_shows(tiny: Path, tmp_path: Path) -> None:
    base = pack(tmp_path / "base", ["f16"], merged="builtin:tiny/base")
    plain = loss(base / "medllm-tiny-F16.gguf", tmp_path)
    merged = loss(tiny / "medllm-tiny-F16.gguf", tmp_path)
    assert merged < plain - 1  # nats; 1.8 against 3.5 when it was trained
    prompts = ["Paciente", "Sumário de alta", "Exame físico:"]
    files = [base / "medllm-tiny-F16.gguf", tiny / "medllm-tiny-F16.gguf"]
    texts = llama_worker.call(
        "generate", models=[str(f) for f in files], prompts=prompts, tokens=60
    )
    before, after = ("\n".join(texts[str(file)]) for file in files)
    for unit in ("mmHg", "mg"):
        assert unit in after
        assert unit not in before
