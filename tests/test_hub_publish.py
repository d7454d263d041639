"""Publishing to the Hub: the real Hub client writes to a Hub on the loopback that misbehaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medllm_pack.errors import (
    CheckFailedError,
    MedllmError,
    SourceError,
    TransferError,
    UsageError,
)
from medllm_pack.ollama import create
from medllm_pack.publish import read
from medllm_pack.publish.hub import HubPublished, missing_on_hub, publish_to_hub
from medllm_pack.publish.make import make_release
from medllm_pack.publish.targets import HubTarget
from tests import fake_hub
from tests.fake_hub import FakeHub
from tests.hub_client import QUICK, Recorded, let_speak

REPO = "org/clinica"
TOKEN = "hf_canaryWriteCanaryWriteCanary"


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client speak, with a token of its own, by LFS, and without pauses."""
    let_speak(tmp_path, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sleep = time.sleep
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda seconds: sleep(min(seconds, 0.01))
    )


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.tokens = {TOKEN}
        yield fake


Publish = Callable[..., HubPublished]


@pytest.fixture
def publish(server: FakeHub, built_pack: Path) -> Publish:
    def publish(
        folder: Path = built_pack,
        *,
        quants: tuple[str, ...] = (),
        revision: str | None = None,
        **options: Any,
    ) -> HubPublished:
        options = {"patience": QUICK, "endpoint": server.endpoint, **options}
        release = make_release(folder, quants=quants)
        return publish_to_hub(release, HubTarget(REPO, revision), **options)

    return publish


def on_the_hub(server: FakeHub, ref: str = "main", *, name: str = REPO) -> dict[str, bytes]:
    repository = server.repositories[name]
    return repository.commits[repository.refs[ref]]


def in_the_pack(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what stands there afterwards


@pytest.mark.parametrize("part_size", [0, 1 << 20], ids=["whole", "parts"])
def test_one_commit_holds_the_pack_byte_for_byte(
    server: FakeHub, publish: Publish, built_pack: Path, part_size: int
) -> None:
    server.faults.part_size = part_size
    done = publish()
    there = on_the_hub(server)
    pack = in_the_pack(built_pack)
    assert {name: there[name] for name in pack} == pack
    assert there.keys() - pack.keys() == {".gitattributes", "template", "system", "params"}
    assert done.created
    assert done.commit == server.repositories[REPO].refs["main"]
    assert len(server.repositories[REPO].commits) == 2  # the Hub's own first one, and ours
    assert done.sent == tuple(sorted(done.files))
    for name, digest in done.files.items():
        assert hashlib.sha256(there[name]).hexdigest() == digest
    assert bool(server.calls("PUT", "/1?")) == bool(part_size)


def test_what_ollama_is_handed_is_what_its_own_layers_hold(
    server: FakeHub, publish: Publish, built_pack: Path
) -> None:
    publish()
    there = on_the_hub(server)
    image = make_release(built_pack).images[0].image
    layers = {layer.media_type: read.small(layer) for layer in image.layers[1:]}
    assert there["template"] == layers[create.TEMPLATE]
    assert there["system"] == layers[create.SYSTEM]
    assert there["params"] == layers[create.PARAMS]
    assert b"{{ .Prompt }}" in there["template"]
    parameters = json.loads(there["params"])
    assert isinstance(parameters["stop"], list)
    modelfile = (built_pack / "Modelfile.q4_k_m").read_text(encoding="utf-8")
    for name in parameters:
        assert f"PARAMETER {name} " in modelfile


def test_the_tag_of_hf_co_is_in_the_name_of_the_file(server: FakeHub, publish: Publish) -> None:
    publish()
    names = [name for name in on_the_hub(server) if name.endswith(".gguf")]
    assert sorted(name.rpartition("-")[2] for name in names) == ["F16.gguf", "Q4_K_M.gguf"]


def test_a_second_time_makes_no_commit_and_sends_nothing(server: FakeHub, publish: Publish) -> None:
    first = publish()
    before = len(server.requests)
    second = publish()
    assert second.commit == first.commit
    assert second.sent == ()
    assert not second.created
    assert {request.method for request in server.requests[before:]} == {"GET"}
    assert second.files == first.files


def test_a_variant_can_be_added_later(server: FakeHub, publish: Publish, built_pack: Path) -> None:
    publish(quants=("q4_k_m",))
    assert not any(name.endswith("F16.gguf") for name in on_the_hub(server))
    done = publish(quants=("f16",))
    assert [name.rpartition("-")[2] for name in done.sent] == ["F16.gguf"]
    assert in_the_pack(built_pack).items() <= on_the_hub(server).items()


def test_weights_of_another_build_are_not_left_beside_a_new_pack(
    server: FakeHub, publish: Publish, built_pack: Path
) -> None:
    [f16] = [p.name for p in built_pack.glob("*-F16.gguf")]
    server.repository(REPO).commit({f16: b"GGUF of another build"})
    with pytest.raises(TransferError, match=rf"has '{f16}' of another build; publish f16 as well"):
        publish(quants=("q4_k_m",))
    assert list(on_the_hub(server)) == [f16]
    publish()
    assert in_the_pack(built_pack).items() <= on_the_hub(server).items()


def test_what_others_put_there_stays(server: FakeHub, publish: Publish) -> None:
    server.repository(REPO).commit({"notes.txt": b"mine", "README.md": b"old"})
    publish()
    assert on_the_hub(server)["notes.txt"] == b"mine"
    assert on_the_hub(server)["README.md"] != b"old"


def test_what_would_be_sent_is_told_and_nothing_is_done(
    server: FakeHub, publish: Publish, built_pack: Path
) -> None:
    release = make_release(built_pack)
    target = HubTarget(REPO)
    would = missing_on_hub(release, target, patience=QUICK, endpoint=server.endpoint)
    assert {request.method for request in server.requests} == {"GET"}
    assert REPO not in server.repositories
    assert set(would) == set(publish().sent)
    assert would.items() >= {n: len(d) for n, d in in_the_pack(built_pack).items()}.items()
    assert missing_on_hub(release, target, patience=QUICK, endpoint=server.endpoint) == {}


def test_a_signature_goes_along_and_an_old_one_does_not_stay(
    server: FakeHub, publish: Publish, built_pack: Path, tmp_path: Path
) -> None:
    signed = tmp_path / "signed"
    shutil.copytree(built_pack, signed)
    (signed / "model.sig").write_bytes(b"signature")
    publish(signed)
    assert on_the_hub(server)["model.sig"] == b"signature"
    publish()
    assert "model.sig" not in on_the_hub(server)
    assert len(server.repositories[REPO].commits) == 3


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_unless_told(
    server: FakeHub, publish: Publish, private: bool
) -> None:
    options = {} if private else {"private": False}
    assert publish(**options).private is private
    assert server.repositories[REPO].private is private


def test_a_repository_that_exists_stays_as_visible_as_it_was(
    server: FakeHub, publish: Publish
) -> None:
    server.repository(REPO).commit({"a": b"a"})
    assert publish(private=True).private is False


def test_a_branch_is_made_and_main_is_left_alone(
    server: FakeHub, publish: Publish, built_pack: Path
) -> None:
    server.repository(REPO).commit({"a": b"a"})
    publish(revision="v2")
    assert on_the_hub(server) == {"a": b"a"}
    assert in_the_pack(built_pack).items() <= on_the_hub(server, "v2").items()
    with pytest.raises(UsageError, match="name a branch"):
        publish(revision="0" * 40)


def test_progress_adds_up_to_the_weights(
    server: FakeHub, publish: Publish, built_pack: Path
) -> None:
    report = Recorded()
    publish(report=report)
    size = sum(path.stat().st_size for path in built_pack.glob("*.gguf"))
    assert (f"upload to {REPO}", size) in report.steps
    assert sum(report.n_bytes) == size


def test_progress_moves_while_a_file_is_sent(server: FakeHub, publish: Publish) -> None:
    server.faults.seconds_per_chunk = 0.01
    report = Recorded()
    publish(quants=("f16",), report=report)
    assert len(report.n_bytes) > 3


# --- what goes wrong


def test_who_commits_first_wins_and_nothing_is_mixed(server: FakeHub, publish: Publish) -> None:
    server.repository(REPO).commit({"a": b"a"})
    server.faults.other_commits = 1
    with pytest.raises(TransferError, match=r"someone else committed to org/clinica .* again"):
        publish()
    assert on_the_hub(server) == {"a": b"a", "other.txt": b"other"}
    puts = len(server.calls("PUT", "/up/"))
    publish()
    assert on_the_hub(server)["other.txt"] == b"other"
    assert len(server.calls("PUT", "/up/")) == puts  # the weights were there already


def test_a_lost_answer_to_the_commit_is_looked_up(server: FakeHub, publish: Publish) -> None:
    server.faults.lost_answers = 1
    done = publish()
    assert done.commit == server.repositories[REPO].refs["main"]
    assert len(server.repositories[REPO].commits) == 2


def test_another_content_than_was_sent_is_an_alarm(server: FakeHub, publish: Publish) -> None:
    server.faults.wrong_commits = 1
    with pytest.raises(CheckFailedError, match="holds something else than was sent as '"):
        publish()


@pytest.mark.parametrize("faults", [{"put_errors": [500, 503]}, {"cut_puts": [100_000, 0]}])
def test_accidents_on_the_way_are_survived(
    server: FakeHub, publish: Publish, built_pack: Path, faults: dict[str, Any]
) -> None:
    for name, value in faults.items():
        setattr(server.faults, name, value)
    publish()
    assert in_the_pack(built_pack).items() <= on_the_hub(server).items()


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"put_errors": [500] * 99}, r"broke off \(the storage answers 500\).*not sent twice"),
        ({"put_errors": [403] * 99}, r"broke off \(the storage answers 403\)"),
        ({"cut_puts": [0] * 99}, r"broke off \(network error: "),
        ({"commit_errors": [500]}, "the Hub answers 500 for org/clinica; try again later"),
        ({"commit_errors": [403]}, "may not write to org/clinica: use a token with write access"),
        ({"commit_errors": [402]}, "storage of the account that owns org/clinica is used up"),
        ({"commit_errors": [409]}, "is being changed by someone else"),
        ({"bad_metadata": True}, r"does not accept the metadata at the top of README\.md"),
        ({"api_errors": [500] * 99}, r"127.0.0.1 is not reachable \(it answers 500\)"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_the_branch_alone(
    server: FakeHub, publish: Publish, faults: dict[str, Any], says: str
) -> None:
    server.repository(REPO).commit({"a": b"a"})
    for name, value in faults.items():
        setattr(server.faults, name, value)
    with pytest.raises(MedllmError, match=says) as raised:
        publish()
    assert_discreet(str(raised.value))
    assert on_the_hub(server) == {"a": b"a"}


def assert_discreet(text: str) -> None:
    assert "\n" not in text.strip()
    for secret in (TOKEN, "sig=", "s3cret", "http://"):
        assert secret not in text


def test_without_a_token_nothing_is_asked(
    server: FakeHub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TransferError, match="needs a token with write access: .*hf auth login"):
        publish()
    assert not server.requests


def test_offline_nothing_is_asked(
    server: FakeHub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TransferError, match="HF_HUB_OFFLINE=1"):
        publish()
    assert not server.requests


def test_a_bad_token_is_told_without_being_shown(server: FakeHub, publish: Publish) -> None:
    server.tokens = set()
    with pytest.raises(MedllmError, match="does not accept your token") as raised:
        publish()
    assert_discreet(str(raised.value))


@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_token_is_refused_with_the_page(
    server: FakeHub, publish: Publish, exists: bool
) -> None:
    if exists:
        server.repository(REPO).commit({"a": b"a"})
    server.read_only = {TOKEN}
    with pytest.raises(TransferError, match="may not write to org/clinica.*settings/tokens"):
        publish()


def test_a_token_file_is_a_source(
    server: FakeHub, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert publish().created


def test_the_token_goes_to_the_hub_and_nowhere_else(server: FakeHub, publish: Publish) -> None:
    server.faults.part_size = 1 << 20
    publish()
    storage = [request for request in server.requests if request.server == "storage"]
    assert storage
    assert not [r for r in storage if TOKEN in json.dumps([r.path, r.headers])]


def test_a_file_that_changed_is_not_committed(
    server: FakeHub, built_pack: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "pack"
    shutil.copytree(built_pack, pack)
    release = make_release(pack)
    [f16] = pack.glob("*-F16.gguf")
    data = bytearray(f16.read_bytes())
    data[-1] ^= 1
    before = f16.stat()
    f16.write_bytes(data)
    os.utime(f16, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
    with pytest.raises(SourceError, match="is not what the pack says: its SHA-256 is"):
        publish_to_hub(release, HubTarget(REPO), patience=QUICK, endpoint=server.endpoint)
    assert list(on_the_hub(server)) == [".gitattributes"]


def test_a_file_that_is_known_is_read_once(
    server: FakeHub, built_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # also what the server received

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    taken = []
    for repository, known in (("ns/a", False), ("ns/b", True)):
        release = make_release(built_pack)
        if not known:
            shutil.rmtree(tmp_path / "state/medllm-pack/known")
        server.stored.clear()
        before = read()
        publish_to_hub(release, HubTarget(repository), patience=QUICK, endpoint=server.endpoint)
        taken.append(read() - before)
        assert in_the_pack(built_pack).items() <= on_the_hub(server, name=repository).items()
    weights = sum(path.stat().st_size for path in built_pack.glob("*.gguf"))
    assert 0.9 * weights < taken[0] - taken[1] < 1.1 * weights


def test_a_known_file_that_changes_while_it_is_sent_is_not_committed(
    server: FakeHub, built_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    pack = tmp_path / "pack"
    shutil.copytree(built_pack, pack)
    release = make_release(pack)
    [f16] = pack.glob("*-F16.gguf")
    store = fake_hub._StorageHandler._store

    def change(handler: Any, path: str) -> None:
        store(handler, path)
        with f16.open("r+b") as file:
            file.write(b"x")

    monkeypatch.setattr(fake_hub._StorageHandler, "_store", change)
    with pytest.raises(SourceError, match="is not what the pack says: its SHA-256 is"):
        publish_to_hub(release, HubTarget(REPO), patience=QUICK, endpoint=server.endpoint)
    assert list(on_the_hub(server)) == [".gitattributes"]


def test_an_xet_storage_that_is_not_there_is_left_for_lfs(
    server: FakeHub, publish: Publish, built_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    report = Recorded()
    publish(report=report)
    assert report.notices == ["the Hub's xet storage is out of reach; sending by LFS instead"]
    assert in_the_pack(built_pack).items() <= on_the_hub(server).items()


def test_cut_off_at_any_request_the_branch_is_old_or_whole(
    publish: Publish, server: FakeHub, built_pack: Path
) -> None:
    pack, cut = in_the_pack(built_pack), 0
    for requests in range(100):
        server.repositories.clear()
        server.stored.clear()
        server.repository(REPO).commit({"a": b"a"})
        server.faults.requests_left = requests
        try:
            publish()
        except MedllmError as error:
            assert_discreet(str(error))
            cut += 1
        else:
            break
        there = on_the_hub(server)
        assert there == {"a": b"a"} or pack.items() <= there.items()
        server.faults.requests_left = None
        publish()
        assert pack.items() <= on_the_hub(server).items()
    assert cut > 8


def test_a_refusal_by_the_hub_is_not_taken_for_a_fault_of_xet(
    server: FakeHub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    server.repository(REPO).commit({"a": b"a"})
    server.read_only = {TOKEN}
    report = Recorded()
    with pytest.raises(TransferError, match="may not write"):
        publish(report=report)
    assert report.notices == []


# --- processes


SCRIPT = (
    "from pathlib import Path\n"
    "import sys\n"
    "from medllm_pack.publish.hub import publish_to_hub\n"
    "from medllm_pack.publish.make import make_release\n"
    "from medllm_pack.publish.targets import HubTarget\n"
    "done = publish_to_hub(make_release(Path(sys.argv[1])), HubTarget(sys.argv[2]))\n"
    "print(done)\n"
)


def start(server: FakeHub, pack: Path, tmp_path: Path, **env: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]), **env,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(pack), REPO], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_killed_process_commits_nothing_and_the_next_one_completes(
    server: FakeHub, publish: Publish, built_pack: Path, tmp_path: Path
) -> None:
    server.faults.seconds_per_chunk = 0.02
    process = start(server, built_pack, tmp_path)
    deadline = time.monotonic() + 30
    while not any(r.body_bytes > 500_000 for r in server.calls("PUT", "/up/")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    command_lines = [
        Path(f"/proc/{process.pid}/task/{task}/cmdline").read_bytes()
        for task in os.listdir(f"/proc/{process.pid}/task")
    ]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert command_lines
    assert not [line for line in command_lines if TOKEN.encode() in line]
    assert list(on_the_hub(server)) == [".gitattributes"]
    server.faults.seconds_per_chunk = 0.0
    assert not publish().created
    assert in_the_pack(built_pack).items() <= on_the_hub(server).items()


def test_a_process_says_nothing_of_its_token(
    server: FakeHub, built_pack: Path, tmp_path: Path
) -> None:
    server.faults.put_errors = [500]
    process = start(server, built_pack, tmp_path, HF_HUB_VERBOSITY="debug")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert TOKEN not in out + err
    assert "sig=" not in out + err
    assert err == ""
    assert in_the_pack(built_pack).items() <= on_the_hub(server).items()
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]
