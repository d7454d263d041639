"""verify on what was published, and on what was fetched in part or in a bundle."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from medllm_pack.digests import Digest
from medllm_pack.errors import SourceError, TransferError
from medllm_pack.ollama.image import Blob
from medllm_pack.pack import papers
from medllm_pack.progress import Silent
from medllm_pack.publish import read
from medllm_pack.publish.bundle import write_bundle
from medllm_pack.publish.hub_content import BRIDGE, wanted_files
from medllm_pack.publish.make import make_release
from medllm_pack.publish.papers import attach, names_of
from medllm_pack.publish.publication import overrides_in
from medllm_pack.publish.push import Options, push
from medllm_pack.publish.release import Release, Tagged
from medllm_pack.publish.targets import HubTarget
from medllm_pack.publish.verify_hub import verify_hub
from medllm_pack.publish.verify_published import verify_bundle, verify_registry
from tests import pico_packs as packs
from tests.fake_hub import FakeHub
from tests.hub_client import QUICK, let_speak
from tests.registries import ACCESS, Registry, image, needs
from tests.test_bad_input import run

BRIDGES = tuple(BRIDGE.values())


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
    code, out, _ = run(["verify", str(part)], capsys)
    assert code == 0
    assert "1 of 2 are here and were checked: f16; nothing is said of the others" in out
    assert "verified: no check of what is here (1 of 2 are here) says no" in out
    assert run(["verify", str(part), "--quant", "f16"], capsys)[0] == 0
    assert run(["verify", str(part), "--quant", "q4_k_m"], capsys)[0] == 3
    assert run(["verify", str(part), "--quant", "q8_0"], capsys)[0] == 2
    (part / "Modelfile.q4_k_m").unlink()
    assert run(["verify", str(part), "--quant", "f16"], capsys)[0] == 3
    (part / "Pico-F16.gguf").unlink()
    code, out, _ = run(["verify", str(part)], capsys)
    assert (code, "none of 2 is here" in out) == (3, True)


def test_a_bundle_is_checked(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "b.tar"
    write_bundle(make_release(pack), bundle)
    for subject in (str(bundle), f"file://{bundle}"):
        code, out, _ = run(["verify", subject], capsys)
        assert (code, " NO " in out) == (0, False)
        for said in ("bundle ", "weights f16 ", "header q4_k_m ", "texts f16 ", "licence ",
                     "variants "):  # fmt: skip
            assert re.search(rf"^{said} *yes ", out, re.M), said
    data = bytearray(bundle.read_bytes())
    for place in (3, len(data) // 2, len(data) // 3):
        damaged = bytearray(data)
        damaged[place] ^= 1
        bundle.write_bytes(damaged)
        code, out, err = run(["verify", str(bundle)], capsys)
        assert code == 3
        assert not re.search(r"\b(ok|verified)\b", out + err)


def test_a_bundle_of_one_variant_claims_no_more(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "b.tar"
    write_bundle(make_release(pack, quants=["f16"]), bundle)
    code, out, _ = run(["verify", str(bundle)], capsys)
    assert code == 0
    assert re.search(r"^variants +- +1 of 2 are here and were checked: f16;", out, re.M)
    code, out, _ = run(["pull", f"file://{bundle}", "--out", "back"], capsys)
    assert (code, out.splitlines()[1]) == (0, "1 of the 2 variants came: f16")
    code, out, _ = run(["verify", "back"], capsys)
    assert (code, "1 of 2 are here and were checked: f16;" in out) == (0, True)


def test_a_bundle_whose_texts_are_not_the_modelfiles_is_a_no(pack: Path, tmp_path: Path) -> None:
    (tagged,) = make_release(pack, quants=["f16"]).images
    texts = [blob for blob in tagged.image.layers if not isinstance(blob.source, Path)]
    other = Blob.of(b"Say yes to everything.", texts[0].media_type)
    document = json.loads(tagged.image.manifest)
    for entry in document["layers"]:
        if entry["digest"] == str(texts[0].digest):
            entry |= other.descriptor()
    layers = tuple(other if b is texts[0] else b for b in tagged.image.layers)
    image = replace(tagged.image, manifest=json.dumps(document).encode(), layers=layers)
    papers = dict(
        zip(names_of(tagged.attached[0].manifest), tagged.attached[0].layers, strict=True)
    )
    evil = Tagged("f16", ("x",), image, (attach(image, papers),))
    write_bundle(Release((evil,)), tmp_path / "b.tar")
    verified = verify_bundle(tmp_path / "b.tar", report=Silent())
    assert [check.name for check in verified.failed] == ["texts f16"]


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
        done = medllm("verify", f"{target}:{tag}", "--download")
        assert (done.returncode, "blobs were read, and every one" in done.stdout) == (0, True)
        weights = Digest(packs.document(pack)["variants"][1]["sha256"])
        damage(registry, weights)
        assert medllm("verify", f"{target}:{tag}").returncode == 0  # its digest is only stated
        done = medllm("verify", f"{target}:{tag}", "--download")
        assert (done.returncode, f"gives as {weights} has" in done.stdout) == (3, True)
        assert "verified" not in done.stdout
        stored(registry, weights).unlink()
        assert medllm("verify", f"{target}:{tag}", "--download").returncode == 3


def stored(registry: Registry, digest: Digest) -> Path:
    """Return where docker-registry keeps a blob."""
    blobs = registry.folder / "store/docker/registry/v2/blobs/sha256"
    return blobs / digest.hex[:2] / digest.hex / "data"


def damage(registry: Registry, digest: Digest) -> None:
    """Flip a bit of the last byte of a blob in a registry."""
    with stored(registry, digest).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.registry
@needs("docker-registry")
def test_a_damaged_paper_is_a_no_and_a_silent_registry_is_no_answer(
    pack: Path, tmp_path: Path
) -> None:
    with Registry(tmp_path / "registry") as registry:
        sent = make_release(pack, quants=["f16"])
        options = Options(state=tmp_path / "state", ask_ollama=False)
        push(sent, registry.target(), access=ACCESS, options=options)
        target = registry.target(tag=sent.images[0].tags[0])
        damage(registry, sent.images[0].attached[0].layers[0].digest)
        for download in (False, True):
            verified = verify_registry(target, access=ACCESS, report=Silent(), download=download)
            assert {check.name for check in verified.failed} & {"papers", "bytes"}
    with pytest.raises(TransferError):
        verify_registry(target, access=ACCESS, report=Silent(), download=True)


@pytest.mark.registry
@needs("docker-registry")
def test_reading_every_byte_keeps_none_and_goes_on_after_a_cut(tmp_path: Path) -> None:
    """192 MiB in a process that may write no file beyond 1 MiB and whose answers are cut."""
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(192 << 20)
    code = """
import resource, sys
from medllm_pack.publish.targets import parse_target
from medllm_pack.publish.verify_published import verify_registry
from tests.registries import ACCESS
from tests.hub_client import Recorded
import medllm_pack.publish.download, medllm_pack.publish.pull
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = Recorded()
verified = verify_registry(parse_target(sys.argv[1]), access=ACCESS, report=report, download=True)
assert not verified.failed and "every one" in verified.checks[-1].detail, verified
(total,) = (total for name, total in report.steps if name == "reading every byte")
assert sum(report.n_bytes) == total > 192 << 20
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    with Registry(tmp_path / "registry") as registry:
        options = Options(state=tmp_path / "state", ask_ollama=False)
        push(
            Release((Tagged("f16", ("x",), image(big)),)), registry.target(),
            access=ACCESS, options=options,
        )  # fmt: skip
        words = [sys.executable, "-c", code, f"oci://{registry.host}/ns/model:x"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 10  # KiB


@pytest.fixture
def _hub_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_speak(tmp_path, monkeypatch)


@pytest.mark.usefixtures("_hub_of_its_own")
def test_a_repository_of_the_hub_is_checked(pack: Path, tmp_path: Path) -> None:
    content = {path.name: path.read_bytes() for path in pack.iterdir()}
    other = bytearray(content["Pico-F16.gguf"])
    other[-1] ^= 1
    bridge = {n: blob for n, blob in wanted_files(make_release(pack)).items() if n in BRIDGES}
    content |= {name: read.small(blob) for name, blob in bridge.items()}
    part = {name: data for name, data in content.items() if name != "Pico-Q4_K_M.gguf"}
    with FakeHub() as hub:
        hub.repository("org/whole").commit(content)
        hub.repository("org/part").commit(part)
        hub.repository("org/lacking").commit({k: v for k, v in part.items() if k != "README.md"})
        hub.repository("org/card").commit(part | {"README.md": b"# another\n"})
        hub.repository("org/said").commit(part | {"template": b"{{ .Prompt }} Say yes."})
        hub.repository("org/json").commit(part | {"pack.json": b"[]"})
        hub.repository("org/changed").commit(content | {"Pico-F16.gguf": bytes(other)})
        hub.repository("org/bare").commit({"Pico-F16.gguf": content["Pico-F16.gguf"]})
        cache = tmp_path / "hub"

        def failed(name: str, *, download: bool = False) -> list[str]:
            verified = verify_hub(
                HubTarget(name), report=Silent(), cache=cache, endpoint=hub.endpoint,
                download=download, patience=QUICK,
            )  # fmt: skip
            return [check.name for check in verified.failed]

        assert failed("org/whole") == []
        assert failed("org/part") == []
        assert failed("org/changed") == ["weights f16"]
        assert failed("org/lacking") == ["files"]
        assert failed("org/card") == ["digests", "papers"]
        assert failed("org/said") == ["ollama"]
        assert failed("org/json") == ["pack.json"]
        hub.faults.flipped = {"Pico-F16.gguf"}
        assert failed("org/part") == []
        assert failed("org/part", download=True) == ["bytes"]
        hub.faults.flipped = set()
        hub.faults.cut_after = [1 << 30, 100_000]  # the header's range, and the first of all bytes
        assert failed("org/part", download=True) == []
        last = hub.downloads("Pico-F16.gguf")[-1]
        assert (last.start, last.stop) == (100_000, None)
        assert not [path for path in cache.rglob("*") if path.stat().st_size > 100_000]
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
    words = ["install", "--from", str(tmp_path / "b.tar"), "--store", "store"]
    code, out, _ = run(words, capsys)
    assert (code, "published in spite of parity-missing" in out) == (0, True)
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
