"""verify on what was published, and on what was fetched in part or in a bundle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError
from medllm_pack.pack import papers
from medllm_pack.progress import Silent
from medllm_pack.publish.bundle import write_bundle
from medllm_pack.publish.make import make_release
from medllm_pack.publish.publication import overrides_in
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


def test_what_was_accepted_crosses_the_gap_and_is_told(
    pack: Path, built_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"file://{tmp_path / 'b.tar'}"
    assert run(["publish", str(built_pack), target, "--accept", "parity-missing"], capsys)[0] == 0
    code, out, _ = run(["pull", target, "--out", "back"], capsys)
    assert (code, out.splitlines()) == (
        0, ["back is ready", "published in spite of parity-missing"],
    )  # fmt: skip
    names = {path.name for path in Path("back").iterdir()}
    assert names == {path.name for path in built_pack.iterdir()}
    code, out, _ = run(["verify", target], capsys)
    assert code == 0
    assert "published in spite of parity-missing" in out
    other = f"file://{tmp_path / 'proven.tar'}"
    assert run(["publish", str(pack), other, "--accept", "parity-missing"], capsys)[0] == 0
    assert run(["pull", other, "--out", "proven"], capsys)[1] == "proven is ready\n"
    assert "nothing was accepted by name" in run(["verify", other], capsys)[1]


@pytest.mark.registry
@needs("docker-registry")
def test_what_was_accepted_is_told_by_a_registry(
    built_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with Registry(tmp_path / "registry") as registry:
        target = f"oci://{registry.host}/ns/m"
        words = ["publish", str(built_pack), target, "--accept", "parity-missing"]
        assert run(words, capsys)[0] == 0
        code, out, _ = run(["pull", f"{target}:7b", "--out", "back"], capsys)
        assert (code, out.splitlines()[-1]) == (0, "published in spite of parity-missing")
        assert not Path("back/publication.json").exists()
        assert "in spite of parity-missing" in run(["verify", f"{target}:7b"], capsys)[1]


@pytest.mark.parametrize(
    "record",
    [b"", b"[" * 10_000, b"7", b"{}", b'{"overrides": [{"name": "\\u001b[31m"}]}',
     b'{"overrides": [{"name": 7}], "pack": {"sha256": "' + b"0" * 64 + b'"}}',
     b'{"overrides": [{"name": "a\\u001b"}], "pack": {"sha256": "' + b"0" * 64 + b'"}}',
     b'{"overrides": [], "pack": {"sha256": "0"}}', b'{"overrides": [], "pack": {"sha256": 0}}'],
)  # fmt: skip
def test_a_record_that_is_none_is_refused_and_not_shown(record: bytes) -> None:
    with pytest.raises(SourceError, match=r"^publication\.json cannot be understood") as caught:
        overrides_in(record, pack=Digest("0" * 64))
    assert "\x1b" not in str(caught.value)


def test_a_record_of_another_pack_says_nothing() -> None:
    said = b'{"overrides": [{"name": "licence-duty:NOTICE"}], "pack": {"sha256": "%s"}}'
    record = said % (b"0" * 64)
    assert overrides_in(record, pack=Digest("0" * 64)) == ("licence-duty:NOTICE",)
    assert overrides_in(record, pack=Digest("1" * 64)) == ()
