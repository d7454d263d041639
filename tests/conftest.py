"""Fixtures: pico models, their tokenizer, and the means to build and to run llama.cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import golang, packs, pico
from tests.chromium import Browser

Renderer = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is remembered between runs out of the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of 320 pieces with LLaMA-2's conventions."""
    return pico.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Path:
    """A LLaMA-2-like checkpoint of two blocks in F16."""
    return pico.write_model(tmp_path_factory.mktemp("llama") / "m", pico.LLAMA, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Path:
    """A Mistral-like checkpoint of two blocks with grouped heads in BF16."""
    folder = tmp_path_factory.mktemp("mistral") / "m"
    return pico.write_model(folder, pico.MISTRAL, dtype="BF16", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def llama_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the LLaMA-2-like checkpoint."""
    return pico.write_adapter(tmp_path_factory.mktemp("lora") / "a", pico.LLAMA)


@pytest.fixture(scope="session")
def mistral_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the Mistral-like checkpoint."""
    return pico.write_adapter(tmp_path_factory.mktemp("lora") / "b", pico.MISTRAL)


@pytest.fixture(scope="session")
def built_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of f16 and q4_k_m named clinica:7b; not to be changed."""
    return packs.build_pack(tmp_path_factory.mktemp("pack") / "p")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return tests/gotemplate, built."""
    return golang.built("gotemplate", tmp_path_factory.mktemp("go"))


@pytest.fixture
def ollama(program: Path) -> Renderer:
    """Return a function that renders a template for a chat, the way Ollama does."""

    def run(template: str, *chat: tuple[str, str], prompt: str = "", suffix: str = "") -> str:
        request = {
            "template": template,
            "messages": [{"role": role, "content": content} for role, content in chat],
            "prompt": prompt,
            "suffix": suffix,
        }
        data = json.dumps(request).encode()
        return subprocess.run(
            [program], input=data, capture_output=True, check=True
        ).stdout.decode()

    return run


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in a folder of its own, without the user's settings and offline."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("MEDLLM_", "HF_", "HUGGINGFACE_", "OLLAMA_")) and name not in (
            "MEDLLM_TEST_LARGE",
            "MEDLLM_LLAMA_CPP",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEDLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Debian's chromium is not installed")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
