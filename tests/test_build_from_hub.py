"""The recipe 7b as a user runs it: from a Hub, here one on the loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pico
from tests.fake_hub import FakeHub

MERGED = "pucpr-br/Clinical-BR-LlaMA-2-7B"
BASE = "meta-llama/Llama-2-7b-hf"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, tokenizer: bytes) -> Iterator[FakeHub]:
    with FakeHub() as server:
        model = pico.write_model(tmp_path / "model", tokenizer=tokenizer)
        server.repository(MERGED).commit(content(model))
        texts = {
            "LICENSE.txt": b"LLAMA 2 COMMUNITY LICENSE AGREEMENT\n",
            "USE_POLICY.md": b"# Acceptable Use Policy\n",
        }
        base = pico.write_model(tmp_path / "base", shards=2, tokenizer=tokenizer)
        server.repository(BASE).commit(content(base) | texts)
        yield server


def run(hub: FakeHub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "medllm_pack", *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_published_weights_are_packed_with_the_licence_of_the_base(
    hub: FakeHub, tmp_path: Path
) -> None:
    done = run(hub, tmp_path, "build", "7b", "--quant", "f16")
    assert done.returncode == 0, done.stderr
    assert f"note: packing finished weights of {MERGED}" in done.stderr
    document = json.loads((tmp_path / "dist/7b/pack.json").read_text(encoding="utf-8"))
    [entry] = document["inputs"]
    assert (entry["role"], entry["source"]) == ("merged", MERGED)
    assert entry["revision"] == hub.repositories[MERGED].refs["main"]
    assert document["license"]["missing"] == []
    assert (tmp_path / "dist/7b/LICENSE").read_bytes() == b"LLAMA 2 COMMUNITY LICENSE AGREEMENT\n"
    weights = [r for r in hub.requests if r.name.endswith(".safetensors") and r.body_bytes]
    assert {request.name for request in weights} == {"model.safetensors"}  # none of the base's


def test_adapter_is_merged_into_the_base_of_the_recipe(hub: FakeHub, tmp_path: Path) -> None:
    pico.write_adapter(tmp_path / "lora")
    done = run(hub, tmp_path, "build", "7b", "--quant", "f16", "--adapter", "lora")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "dist/7b/pack.json").read_text(encoding="utf-8"))
    roles = {entry["role"]: entry for entry in document["inputs"]}
    assert roles["base"]["source"] == BASE
    assert roles["adapter"]["source"] == "folder"
    assert document["adapter"]["tensors"] == 8


def test_plan_downloads_no_weights_and_says_how_much_it_would(hub: FakeHub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "plan", "7b", "--json")
    assert done.returncode == 0, done.stderr
    size = len(
        hub.repositories[MERGED].commits[hub.repositories[MERGED].refs["main"]]["model.safetensors"]
    )
    assert json.loads(done.stdout)["download_bytes"] == size
    assert not [r for r in hub.requests if r.name.endswith(".safetensors") and r.body_bytes]


def test_gated_base_names_its_page_and_the_login(hub: FakeHub, tmp_path: Path) -> None:
    pico.write_adapter(tmp_path / "lora")
    hub.faults.gated = True
    done = run(hub, tmp_path, "build", "7b", "--adapter", "lora")
    assert done.returncode == 1
    assert f"huggingface.co/{BASE}" in done.stderr or f"/{BASE}" in done.stderr
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "dist").exists() or not list((tmp_path / "dist").iterdir())


def test_second_build_works_with_the_hub_gone(hub: FakeHub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "build", "7b", "--quant", "f16", "--out", "a").returncode == 0
    hub.repositories.clear()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "medllm_pack", "build", "7b", "--quant", "f16", "--out", "b"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_pack_is_rebuilt_from_its_pinned_commits_on_a_machine_that_never_saw_them(
    hub: FakeHub, tmp_path: Path, tokenizer: bytes
) -> None:
    """The branches have moved on meanwhile; nothing but the pack says what it was made from."""
    lora = pico.write_adapter(tmp_path / "lora")
    hub.repository("org/lora").commit(content(lora))
    words = ("--quant", "f16", "--adapter", "org/lora")
    assert run(hub, tmp_path, "build", "7b", *words).returncode == 0
    pinned = {
        entry["role"]: (entry["source"], entry["revision"])
        for entry in json.loads((tmp_path / "dist/7b/pack.json").read_text())["inputs"]
    }
    assert pinned == {
        "base": (BASE, hub.repositories[BASE].refs["main"]),
        "adapter": ("org/lora", hub.repositories["org/lora"].refs["main"]),
    }
    tensors = {k: v * 2 for k, v in pico.adapter_tensors(pico.LLAMA).items()}
    hub.repository("org/lora").commit(content(pico.write_adapter(tmp_path / "m", tensors=tensors)))
    other = pico.write_model(tmp_path / "other", pico.MISTRAL, tokenizer=tokenizer)
    hub.repository(BASE).commit(content(other))
    before = content(tmp_path / "dist/7b")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tmp_path / "dist/7b", elsewhere / "pack")
    done = run(hub, elsewhere, "verify", "pack", "--rebuild")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^rebuild +yes .* the same digests$", done.stdout, re.MULTILINE)
    assert [path.name for path in elsewhere.iterdir() if path.name.startswith(".")] == []
    assert content(elsewhere / "pack") == before

    done = run(hub, elsewhere, "verify", "pack", "--rebuild", "--adapter", "org/lora@main")
    assert done.returncode == 3
    assert "'adapter_model.safetensors' (adapter) is not the file" in done.stdout


def test_a_rebuild_whose_commit_is_gone_says_so(hub: FakeHub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "build", "7b", "--quant", "f16").returncode == 0
    hub.repositories[MERGED].commits.clear()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(hub, elsewhere, "verify", "../dist/7b", "--rebuild")
    assert done.returncode == 1
    assert MERGED in done.stderr
    assert "rebuild    yes" not in done.stdout
    assert {path.name for path in (tmp_path / "dist").iterdir()} == {"7b"}
