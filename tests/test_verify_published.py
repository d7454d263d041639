"""verify on what was published, and on what was fetched in part or in a bundle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medllm_pack.errors import SourceError
from medllm_pack.pack import papers
from medllm_pack.progress import Silent
from medllm_pack.publish.bundle import write_bundle
from medllm_pack.publish.make import make_release
from medllm_pack.publish.targets import HubTarget
from medllm_pack.publish.verify_published import verify_hub
from tests import pico_packs as packs
from tests.fake_hub import FakeHub
from tests.registries import Registry, needs
from tests.test_bad_input import run


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("published")
    built = packs.make(root / "pack", packs.write_recipe(root / "recipe", llama_folder))
    packs.give_parity(built)
    papers.update(built, packs.document(built), {})
    return built


def test_a_pack_in_part_is_checked_by_naming_the_part(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = packs.copy(pack, tmp_path / "part")
    (part / "Pico-Q4_K_M.gguf").unlink()
    assert run(["verify", str(part)], capsys)[0] == 3
    assert run(["verify", str(part), "--quant", "f16"], capsys)[0] == 0
    assert run(["verify", str(part), "--quant", "q4_k_m"], capsys)[0] == 3
    assert run(["verify", str(part), "--quant", "q8_0"], capsys)[0] == 2
    (part / "Modelfile.q4_k_m").unlink()
    assert run(["verify", str(part), "--quant", "f16"], capsys)[0] == 3


def test_a_bundle_is_checked(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "b.tar"
    write_bundle(make_release(pack), bundle)
    for subject in (str(bundle), f"file://{bundle}"):
        code, out, _ = run(["verify", subject], capsys)
        assert (code, out.count(" yes ")) == (0, 3)
    data = bytearray(bundle.read_bytes())
    for place in (3, len(data) // 2, len(data) // 3):
        damaged = bytearray(data)
        damaged[place] ^= 1
        bundle.write_bytes(damaged)
        code, out, err = run(["verify", str(bundle)], capsys)
        assert code == 3
        assert not re.search(r"\b(ok|verified)\b", out + err)


@pytest.mark.registry
@needs("docker-registry")
def test_a_reference_is_checked_without_its_weights(pack: Path, tmp_path: Path) -> None:
    def medllm(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "medllm_pack", *words], capture_output=True, text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, check=False,
        )  # fmt: skip

    with Registry(tmp_path / "registry") as registry:
        target = f"oci://{registry.host}/ns/pico"
        assert medllm("publish", str(pack), target).returncode == 0
        tags = registry.get("ns/pico/tags/list").json()["tags"]
        tag = next(tag for tag in tags if tag.endswith("q4_k_m"))
        done = medllm("verify", f"{target}:{tag}")
        assert done.returncode == 0, done.stderr
        for said in ("weights q4_k_m  yes", "header q4_k_m   yes", "licence", "bytes"):
            assert said in done.stdout
        assert medllm("verify", f"{target}:absent").returncode == 1


@pytest.fixture
def _hub_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.mark.usefixtures("_hub_of_its_own")
def test_a_repository_of_the_hub_is_checked(pack: Path, tmp_path: Path) -> None:
    content = {path.name: path.read_bytes() for path in pack.iterdir()}
    other = bytearray(content["Pico-F16.gguf"])
    other[-1] ^= 1
    with FakeHub() as hub:
        hub.repository("org/whole").commit(content)
        hub.repository("org/changed").commit(content | {"Pico-F16.gguf": bytes(other)})
        hub.repository("org/bare").commit({"Pico-F16.gguf": content["Pico-F16.gguf"]})
        cache = tmp_path / "hub"

        def failed(name: str) -> list[str]:
            verified = verify_hub(
                HubTarget(name), report=Silent(), cache=cache, endpoint=hub.endpoint
            )
            return [check.name for check in verified.failed]

        assert failed("org/whole") == []
        assert failed("org/changed") == ["weights f16"]
        with pytest.raises(SourceError, match=r"no pack\.json"):
            failed("org/bare")
