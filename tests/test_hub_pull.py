"""Pulling packs from the Hub, and looking at them, against a Hub on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medllm_pack.errors import MedllmError, SourceError, UsageError
from medllm_pack.gguf.reader import read_gguf
from medllm_pack.patience import Patience
from medllm_pack.publish.hub import publish_to_hub
from medllm_pack.publish.hub_look import HubLook, look_at_hub
from medllm_pack.publish.hub_pull import HubPulled, pull_from_hub
from medllm_pack.publish.make import make_release
from medllm_pack.publish.targets import HubTarget
from tests.fake_hub import FakeHub
from tests.hub_client import QUICK, let_speak

REPO = "org/clinica"
TOKEN = "hf_canaryReadCanaryReadCanary"


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_speak(tmp_path, monkeypatch)


@pytest.fixture
def server(built_pack: Path) -> Iterator[FakeHub]:
    """A Hub that holds the pack and what the Hub itself adds."""
    with FakeHub() as fake:
        own = {".gitattributes": b"x", "template": b"{{ .Prompt }}", "onnx/model.gguf": b"x"}
        fake.repository(REPO).commit(in_folder(built_pack) | own)
        yield fake


Pull = Callable[..., HubPulled]
Look = Callable[..., HubLook]


@pytest.fixture
def pull(server: FakeHub, tmp_path: Path) -> Pull:
    def pull(out: str = "out", *, revision: str | None = None, **options: Any) -> HubPulled:
        options = {"patience": QUICK, "endpoint": server.endpoint, **options}
        target = HubTarget(REPO, revision)
        return pull_from_hub(target, tmp_path / out, cache=tmp_path / "hub", **options)

    return pull


@pytest.fixture
def look(server: FakeHub, tmp_path: Path) -> Look:
    def look(repository: str = REPO, *, patience: Patience = QUICK) -> HubLook:
        return look_at_hub(
            HubTarget(repository),
            patience=patience,
            endpoint=server.endpoint,
            cache=tmp_path / "hub",
        )

    return look


def in_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in in_folder(folder).items() if name.endswith(".gguf")}


def changed(server: FakeHub, files: dict[str, bytes | None], *, ref: str = "main") -> None:
    """Commit other content; None takes a file away."""
    repository = server.repository(REPO)
    content = dict(repository.commits[repository.refs["main"]])
    for name, data in files.items():
        content.pop(name, None)
        if data is not None:
            content[name] = data
    repository.commit(content, ref=ref)


def nothing_left(tmp_path: Path) -> bool:
    return not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_pack_comes_back_byte_for_byte(server: FakeHub, pull: Pull, built_pack: Path) -> None:
    pulled = pull()
    assert in_folder(pulled.folder) == in_folder(built_pack)
    assert pulled.commit == server.repository(REPO).refs["main"]
    assert pulled.quants == ("f16", "q4_k_m")
    assert pulled.document == json.loads((built_pack / "pack.json").read_bytes())


def test_a_signature_comes_along(server: FakeHub, pull: Pull, built_pack: Path) -> None:
    changed(server, {"model.sig": b"signature"})
    assert in_folder(pull().folder) == in_folder(built_pack) | {"model.sig": b"signature"}


def test_what_was_published_is_what_is_pulled(
    server: FakeHub, pull: Pull, built_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.tokens = {TOKEN}
    target = HubTarget(REPO, "v2")
    done = publish_to_hub(
        make_release(built_pack), target, patience=QUICK, endpoint=server.endpoint
    )
    pulled = pull(revision="v2")
    assert in_folder(pulled.folder) == in_folder(built_pack)
    assert pulled.commit == done.commit


def test_one_variant_can_be_pulled_alone(server: FakeHub, pull: Pull, built_pack: Path) -> None:
    folder = pull(quants=("q4_k_m",)).folder
    [f16] = [name for name in weights_of(built_pack) if name.endswith("F16.gguf")]
    expected = in_folder(built_pack)
    del expected[f16]
    assert in_folder(folder) == expected
    assert not server.downloads(f16)


def test_variants_that_were_not_published_are_not_missed(
    server: FakeHub, pull: Pull, built_pack: Path
) -> None:
    [f16] = [name for name in weights_of(built_pack) if name.endswith("F16.gguf")]
    changed(server, {f16: None})
    assert pull().quants == ("q4_k_m",)
    with pytest.raises(UsageError, match="does not hold the variants f16"):
        pull("other", quants=("f16",))
    with pytest.raises(UsageError, match="no variant 'q8_0'"):
        pull("other", quants=("q8_0",))


def test_a_commit_pins_what_is_pulled(server: FakeHub, pull: Pull) -> None:
    first = server.repository(REPO).refs["main"]
    changed(server, {"README.md": b"later\n"})
    assert pull(revision=first).commit == first


def test_a_folder_that_exists_is_kept_unless_told(
    server: FakeHub, pull: Pull, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists; --force"):
        pull()
    assert not server.requests
    assert pull(replace=True).folder == tmp_path / "out"


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "Modelfile.f16", "pack.json"])
def test_a_changed_paper_is_refused(server: FakeHub, pull: Pull, tmp_path: Path, name: str) -> None:
    repository = server.repository(REPO)
    old = repository.commits[repository.refs["main"]][name]
    changed(server, {name: old.replace(b"a", b"e", 1)})
    with pytest.raises(SourceError, match=f"{name} is not what SHA256SUMS says"):
        pull()
    assert nothing_left(tmp_path)


def test_changed_weights_are_refused_before_they_come_over(
    server: FakeHub, pull: Pull, built_pack: Path, tmp_path: Path
) -> None:
    name = sorted(weights_of(built_pack))[0]
    changed(server, {name: weights_of(built_pack)[name][:-1] + b"?"})
    with pytest.raises(SourceError, match=f"{name} of {REPO} is not the file that its pack.json"):
        pull()
    assert not server.downloads(name)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"pack.json": None}, "has no pack.json: it is not a pack"),
        ({"SHA256SUMS": None, "pack.json": None}, "has no pack.json and no SHA256SUMS"),
        ({"LICENSE": None}, "lacks 'LICENSE', which its SHA256SUMS names"),
        ({"SHA256SUMS": b"0" * 64 + b"  ../../x\n"}, "plain names"),
        ({"SHA256SUMS": b"garbage\n"}, "line 1 of SHA256SUMS of .* is not a digest"),
        ({"pack.json": b"{}"}, "pack.json is not what SHA256SUMS says"),
    ],
)
def test_what_is_no_pack_is_refused(
    server: FakeHub, pull: Pull, tmp_path: Path, files: dict[str, bytes | None], says: str
) -> None:
    changed(server, files)
    with pytest.raises(SourceError, match=says):
        pull()
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("large", [False, True])
def test_damaged_weights_in_the_cache_are_not_believed(
    pull: Pull, built_pack: Path, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull()
    name = sorted(weights_of(built_pack))[0]
    digest = hashlib.sha256(weights_of(built_pack)[name]).hexdigest()
    [blob] = (tmp_path / "hub").rglob(f"blobs/{digest}")
    size = blob.stat().st_size
    blob.unlink()  # not through the link that the pack may share
    blob.write_bytes(bytes(size))
    if not large:  # hashed whenever it is taken, and brought again
        assert in_folder(pull("again").folder) == in_folder(built_pack)
        return
    monkeypatch.setattr("medllm_pack.weights.cache.SMALL_LIMIT", 1 << 16)
    with pytest.raises(SourceError, match=f"{name} in the Hub cache is damaged; remove .* again"):
        pull("again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "faults",
    [
        {"cut_after": [300_000, 200_000]},
        {"storage_errors": [503]},
        {"hub_errors": [500]},
        {"api_errors": [502]},
        {"wrong_ranges": 1},
    ],
)
def test_accidents_on_the_way_are_survived(
    server: FakeHub, pull: Pull, built_pack: Path, faults: dict[str, Any]
) -> None:
    for name, value in faults.items():
        setattr(server.faults, name, value)
    assert in_folder(pull().folder) == in_folder(built_pack)


@pytest.mark.parametrize("token", [None, TOKEN])
def test_gated_says_where_to_ask(
    server: FakeHub, pull: Pull, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
        server.tokens = {token}
    server.faults.gated = True
    with pytest.raises(SourceError, match=f"https://huggingface.co/{REPO}") as raised:
        pull()
    assert TOKEN not in str(raised.value)


def test_a_repository_that_is_not_there_is_named(pull: Pull) -> None:
    with pytest.raises(SourceError, match="no revision 'nothing'"):
        pull(revision="nothing")


def test_offline_nothing_is_asked(
    server: FakeHub, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE=1"):
        pull()
    assert not server.requests


def test_a_killed_pull_is_continued_by_the_next_process(
    server: FakeHub, pull: Pull, built_pack: Path, tmp_path: Path
) -> None:
    [f16] = [name for name in weights_of(built_pack) if name.endswith("F16.gguf")]
    size = (built_pack / f16).stat().st_size
    server.faults.seconds_per_chunk = 0.02
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from medllm_pack.publish.hub_pull import pull_from_hub\n"
        "from medllm_pack.publish.targets import HubTarget\n"
        "pull_from_hub(HubTarget(sys.argv[1]), Path(sys.argv[2]), quants=('f16',))\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    server.tokens = {TOKEN}
    process = subprocess.Popen(
        [sys.executable, "-c", script, REPO, str(tmp_path / "out")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while server.sent(f16) < size // 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    assert TOKEN not in out + err
    assert TOKEN.encode() not in command_line
    assert not (tmp_path / "out").exists()
    server.faults.seconds_per_chunk = 0.0
    pull(quants=("f16",))
    assert server.downloads(f16)[-1].start > 0
    assert server.sent(f16) < 1.5 * size
    assert (tmp_path / "out" / f16).read_bytes() == (built_pack / f16).read_bytes()


# --- looking without bringing


def test_headers_are_read_without_the_weights(
    server: FakeHub, look: Look, built_pack: Path
) -> None:
    found = look()
    assert found.commit == server.repository(REPO).refs["main"]
    assert found.document == json.loads((built_pack / "pack.json").read_bytes())
    assert [file.name for file in found.files] == sorted(weights_of(built_pack))
    for file in found.files:
        data = weights_of(built_pack)[file.name]
        assert file.header == read_gguf(built_pack / file.name)
        assert file.sha256 == hashlib.sha256(data).hexdigest()
        assert file.size == len(data)
        assert file.fetched < len(data)
        assert server.sent(file.name) == file.fetched


def test_a_repository_that_is_no_pack_is_shown(
    server: FakeHub, look: Look, built_pack: Path
) -> None:
    server.repository("org/other").commit(weights_of(built_pack))
    found = look("org/other")
    assert found.document is None
    assert len(found.files) == 2
    server.repository("org/none").commit({"README.md": b"x"})
    with pytest.raises(SourceError, match="org/none holds no GGUF file"):
        look("org/none")


@pytest.mark.parametrize(
    "faults",
    [{"cut_after": [5000]}, {"storage_errors": [503]}, {"ignore_range": True},
     {"hub_errors": [500]}],
)  # fmt: skip
def test_headers_survive_accidents(
    server: FakeHub, look: Look, built_pack: Path, faults: dict[str, Any]
) -> None:
    for name, value in faults.items():
        setattr(server.faults, name, value)
    for file in look().files:
        assert file.header == read_gguf(built_pack / file.name)


def test_a_header_that_does_not_come_is_one_line(server: FakeHub, look: Look) -> None:
    server.faults.storage_errors = [503] * 99
    with pytest.raises(MedllmError, match=r"do not arrive \(127.0.0.1 answers 503\)"):
        look()


def test_a_header_that_trickles_is_one_line(server: FakeHub, look: Look, built_pack: Path) -> None:
    server.repository("org/other").commit(weights_of(built_pack))
    server.faults.storage_errors = [503]
    server.faults.retry_after, server.faults.trickle = "1", 400
    start = time.monotonic()
    with pytest.raises(MedllmError, match=r"do not arrive \(no answer in time\)"):
        look("org/other", patience=replace(QUICK, tries=2, stall_s=0.5))
    assert 1 <= time.monotonic() - start < 15


def test_a_lying_header_is_refused_as_in_a_file(server: FakeHub, look: Look) -> None:
    server.repository("org/bad").commit({"x-F16.gguf": b"GGUF" + b"\xff" * 60})
    with pytest.raises(MedllmError, match="'x-F16.gguf' is not a sound GGUF file"):
        look("org/bad")
