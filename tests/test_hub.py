"""Sources and downloads: the real Hub client against a Hub on the loopback that misbehaves."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medllm_pack import resources
from medllm_pack.errors import CheckpointError, MedllmError, SourceError, UsageError
from medllm_pack.patience import Patience
from medllm_pack.progress import Silent
from medllm_pack.weights import hub, listing, request
from medllm_pack.weights.hub import fetch
from medllm_pack.weights.needed import Role
from medllm_pack.weights.sources import LocalCopy, Source, parse_source
from tests.fake_hub import FakeHub, Faults, etag, sha256
from tests.hub_client import Recorded, let_speak

REPO = "org/model"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKEN = "hf_canaryCanaryCanaryCanary"
QUICK = Patience(tries=4, first_wait_s=0.0, longest_wait_s=0.0, stall_s=10.0)
TWICE = replace(QUICK, tries=2)
HASTY = replace(QUICK, stall_s=0.5)


def ramp(n: int, salt: int = 0) -> bytes:
    """Return bytes that differ at every place, so that a shifted copy is a wrong one."""
    blocks = (hashlib.sha256(b"%d %d" % (salt, i)).digest() for i in range(-(-n // 32)))
    return b"".join(blocks)[:n]


MODEL = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}\n',
    "generation_config.json": b'{"do_sample": true}\n',
    "tokenizer.model": ramp(5000),
    "tokenizer_config.json": b'{"add_bos_token": true}\n',
    "README.md": b"---\nlicense: llama2\n---\n",
    "LICENSE.txt": "licença\n".encode(),
    "USE_POLICY.md": b"policy\n",
    "Notice": b"notice\n",
    WEIGHTS: ramp(1 << 20),
    # What nobody needs: other formats, code, subfolders.
    "pytorch_model.bin": b"\x80\x04canary",
    "modeling_llama.py": b"raise SystemExit\n",
    "original/consolidated.00.pth": b"\x80\x04canary",
    "onnx/config.json": b"{}",
}
NEEDED = {
    "config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json",
    "README.md", "LICENSE.txt", "USE_POLICY.md", "Notice", WEIGHTS,
}  # fmt: skip
SHARDS = {f"model-0000{i}-of-00002.safetensors": ramp(100_000 + i, salt=i) for i in (1, 2)}
ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": ramp(3000),
    "adapter_model.bin": b"\x80\x04canary",
    "README.md": b"an adapter\n",
}


def sharded(weight_map: Mapping[str, str] | None = None) -> dict[str, bytes]:
    names = sorted(SHARDS)
    index = {"weight_map": weight_map or {f"tensor.{i}": name for i, name in enumerate(names)}}
    small = {name: data for name, data in MODEL.items() if name != WEIGHTS}
    return {**small, INDEX: json.dumps(index).encode(), **SHARDS}


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client library speak, without the user's token."""
    let_speak(tmp_path, monkeypatch)


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.repository(REPO).commit(MODEL)
        yield fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


Get = Callable[..., LocalCopy]


@pytest.fixture
def get(server: FakeHub, cache: Path) -> Get:
    def get(text: str = REPO, *, role: Role = "base", **options: Any) -> LocalCopy:
        options = {"report": Silent(), "patience": QUICK, **options}
        return fetch(
            parse_source(text), role=role, cache=cache, endpoint=server.endpoint, **options
        )

    return get


def write(folder: Path, content: Mapping[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def assert_is(copy: LocalCopy, content: Mapping[str, bytes], names: set[str]) -> None:
    assert set(copy.files) == names
    for name, file in copy.files.items():
        assert (file.name, file.path.read_bytes()) == (name, content[name])
        assert file.size == len(content[name])


def partial_files(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


def blobs(cache: Path) -> dict[str, bytes]:
    folder = cache / "models--org--model" / "blobs"
    return {path.name: path.read_bytes() for path in folder.iterdir() if len(path.suffix) == 0}


# --- naming


@pytest.mark.parametrize(
    "text", ["org/name", "org/name@main", "Org-1/n.a_me@refs/pr/3", f"a/b@{'0' * 40}"]
)
def test_a_repository_reads_back_as_it_was_written(text: str) -> None:
    source = parse_source(text)
    assert source.kind == "hub"
    assert str(source) == text
    assert parse_source(str(source)) == source


def test_revision_is_what_stands_behind_the_at() -> None:
    assert parse_source("org/name@v1.0") == Source("hub", "org/name", revision="v1.0")
    assert parse_source("org/name").revision is None


@pytest.mark.parametrize("text", ["./x", "../x", ".", "/nowhere/x", "x/y"])
def test_a_folder_is_found_and_reads_back(text: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    (inner / "x" / "y").mkdir(parents=True)
    source = parse_source(text, relative_to=inner)
    assert source.kind == "folder"
    assert source.folder is not None
    assert source.folder.resolve() == (inner / text).resolve()
    assert parse_source(str(source)) == source


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_source("~/m").folder == tmp_path / "m"


@pytest.mark.parametrize(
    "text",
    ["", "name", "a/b/c", "org/name@", "org/name@..", "org/name@a/../b", "org/name@/etc/passwd",
     "org/name@a/./b", "org/..", "org/a--b", "org/a..b", "org/name.git", "-org/name",
     "org/name@x y", "https://huggingface.co/org/name", "org/nome\u0301", "a\0b", "./a\0b",
     "org/name\n", "x" * 5000, "x/" * 3000],
)  # fmt: skip
def test_anything_else_is_refused_with_both_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r"\./model, or org/name\[@revision\]"):
        parse_source(text)


def test_a_shipped_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = write(tmp_path / "examples" / "tiny" / "base", MODEL)
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path)
    source = parse_source("builtin:tiny/base")
    assert source.folder == shipped
    assert str(source) == "builtin:tiny/base"
    copy = fetch(source, role="base", report=Silent())
    assert (copy.source, copy.kind, copy.revision) == ("builtin:tiny/base", "builtin", None)
    assert_is(copy, MODEL, NEEDED)


@pytest.mark.parametrize("name", ["", "nothing", "../..", "/etc", "tiny/../.."])
def test_what_does_not_ship_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="builtin|shipped"):
        parse_source(f"builtin:{name}")


# --- folders


def folder_copy(folder: Path, role: Role = "base") -> LocalCopy:
    return fetch(parse_source(str(folder)), role=role, report=Silent())


def test_a_folder_gives_the_needed_files_and_hides_where_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "my-llama", MODEL)
    copy = folder_copy(folder)
    assert_is(copy, MODEL, NEEDED)
    assert (copy.source, copy.kind, copy.revision) == ("my-llama", "folder", None)
    assert {file.sha256 for file in copy.files.values()} == {None}
    assert not copy.remote


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    content = {**sharded(), "model-00003-of-00003.safetensors": b"stray"}
    copy = folder_copy(write(tmp_path / "m", content))
    assert_is(copy, content, (NEEDED - {WEIGHTS}) | {INDEX} | set(SHARDS))


def test_a_single_file_wins_over_shards(tmp_path: Path) -> None:
    copy = folder_copy(write(tmp_path / "m", {**sharded(), WEIGHTS: b"one"}))
    assert {name for name in copy.files if "safetensors" in name} == {WEIGHTS}


def test_an_adapter_is_its_own_set_of_files(tmp_path: Path) -> None:
    copy = folder_copy(write(tmp_path / "a", ADAPTER), "adapter")
    assert_is(copy, ADAPTER, {"adapter_config.json", "adapter_model.safetensors", "README.md"})


@pytest.mark.parametrize(
    ("role", "content", "says"),
    [
        ("base", {"config.json": b"{}", "pytorch_model.bin": b"x", "optimizer.pt": b"x"},
         r"only as pickle: 'pytorch_model.bin'\. .*safetensors"),
        ("merged", {"config.json": b"{}", "consolidated.00.pth": b"x"}, "only as pickle"),
        ("base", {"config.json": b"{}", "model.ckpt": b"x"}, "only as pickle"),
        ("adapter", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "only as pickle"),
        ("adapter", {"adapter_config.json": b"{}", "adapters.safetensors": b"x"}, "mlx_lm.fuse"),
        ("base", ADAPTER, "use --adapter"),
        ("adapter", MODEL, "use --merged or --base"),
        ("base", {"config.json": b"{}"}, "neither model.safetensors nor .*holds 'config.json'"),
        ("base", {}, "it holds nothing"),
        ("base", {WEIGHTS: b"x"}, "no config.json"),
        ("adapter", {"adapter_model.safetensors": b"x"}, "no adapter_config.json"),
        ("base", {**sharded(), "model-00002-of-00002.safetensors": None},
         "lacks 'model-00002-of-00002.safetensors'"),
    ],
)  # fmt: skip
def test_an_unfit_folder_is_refused_with_the_next_step(
    role: Role, content: dict[str, bytes | None], says: str, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    folder = write(tmp_path / "m", {k: v for k, v in content.items() if v is not None})
    with pytest.raises(SourceError, match=says):
        folder_copy(folder, role)


def test_a_missing_folder_is_refused_with_both_forms(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"No such file.*org/name"):
        folder_copy(tmp_path / "nowhere")


ESCAPES = [
    "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin",
    "C:\\x.safetensors", "\\\\host\\x.safetensors", "x.safetensors\n", "x\0.safetensors",
    "x.safetensors/..", "x.pt.safetensors.bin", 3, None, ["x.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_names_plain_safetensors_only(name: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", sharded({"tensor": name}))
    with pytest.raises(CheckpointError, match="names the shard"):
        folder_copy(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", WEIGHTS, "LICENSE.txt"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dead link", "loop"])
def test_only_regular_files_are_taken(name: str, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m", MODEL) / name
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "dead link":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(name)
    with pytest.raises(SourceError, match="not a regular file|dead link"):
        folder_copy(tmp_path / "m")


def test_links_are_followed_to_the_file_as_in_a_cache(tmp_path: Path) -> None:
    write(tmp_path / "blobs", {"abc": MODEL[WEIGHTS]})
    folder = write(tmp_path / "m", {k: v for k, v in MODEL.items() if k != WEIGHTS})
    (folder / WEIGHTS).symlink_to("../blobs/abc")
    assert folder_copy(folder).files[WEIGHTS].path == tmp_path / "blobs" / "abc"


def test_a_small_file_must_be_small(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", MODEL)
    os.truncate(folder / "LICENSE.txt", (16 << 20) + 1)
    with pytest.raises(SourceError, match="16,777,217 bytes"):
        folder_copy(folder)


def test_a_folder_is_read_without_the_hub_library(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", sharded())
    script = (
        "import sys\n"
        "from medllm_pack.weights.hub import fetch\n"
        "from medllm_pack.weights.sources import parse_source\n"
        "from medllm_pack.progress import Silent\n"
        "parse_source('org/name')\n"
        f"fetch(parse_source({str(folder)!r}), role='base', report=Silent())\n"
        "print([m for m in sys.modules if m.startswith(('huggingface_hub', 'httpx'))])\n"
    )
    assert run_python(script).stdout == "[]\n"


def run_python(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], env=environment(**env), check=True,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def environment(**env: str) -> dict[str, str]:
    root = str(Path(hub.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "HF_HUB_DISABLE_TELEMETRY": "1", **env}


# --- downloads that go well


def test_a_download_is_pinned_needed_and_verified(server: FakeHub, get: Get, cache: Path) -> None:
    report = Recorded()
    copy = get(report=report)
    assert_is(copy, MODEL, NEEDED)
    assert (copy.source, copy.kind) == (REPO, "hub")
    assert copy.revision == server.repository(REPO).refs["main"]
    assert copy.files[WEIGHTS].sha256 == sha256(MODEL[WEIGHTS])
    assert copy.files["tokenizer.model"].sha256 == sha256(MODEL["tokenizer.model"])
    assert copy.files["config.json"].sha256 is None
    assert {r.name for r in server.requests if r.name} == NEEDED
    # Compressed on the way, the bytes of a range would not be the bytes of the file.
    assert {r.headers["accept-encoding"] for r in server.requests if r.name} == {"identity"}
    assert [r.path for r in server.requests if "/main" in r.path] == [
        f"/api/models/{REPO}/revision/main?blobs=true"
    ]
    total = sum(len(MODEL[name]) for name in NEEDED)
    assert sum(report.n_bytes) == sum(size or 0 for _, size in report.steps) == total
    assert all(n > 0 for n in report.n_bytes)
    assert not partial_files(cache)


def test_a_branch_that_moves_does_not_move_a_download(server: FakeHub, get: Get) -> None:
    first = get().revision
    second = server.repository(REPO).commit({**MODEL, WEIGHTS: ramp(10, salt=9)})
    assert get(f"{REPO}@{first}").files[WEIGHTS].size == len(MODEL[WEIGHTS])
    assert get().revision == second
    assert get().files[WEIGHTS].size == 10


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1"])
def test_tags_and_pull_requests_are_revisions(server: FakeHub, get: Get, revision: str) -> None:
    commit = server.repository(REPO).commit({**MODEL, "README.md": b"tagged"}, ref=revision)
    assert get(f"{REPO}@{revision}").revision == commit
    assert get(f"{REPO}@{revision}", offline=True).revision == commit


def test_shards_are_downloaded_by_their_index(server: FakeHub, get: Get) -> None:
    server.repository(REPO).commit({**sharded(), "model-9.safetensors": b"stray"})
    copy = get()
    assert_is(copy, sharded(), (NEEDED - {WEIGHTS}) | {INDEX} | set(SHARDS))
    assert not server.downloads("model-9.safetensors")


def test_an_adapter_is_downloaded(server: FakeHub, get: Get) -> None:
    server.repository("org/lora").commit(ADAPTER)
    copy = get("org/lora", role="adapter")
    assert_is(copy, ADAPTER, {"adapter_config.json", "adapter_model.safetensors", "README.md"})


def test_equal_files_are_downloaded_once(server: FakeHub, get: Get) -> None:
    server.repository(REPO).commit({**MODEL, "NOTICE.txt": MODEL["LICENSE.txt"]})
    report = Recorded()
    copy = get(report=report)
    assert copy.files["NOTICE.txt"].path == copy.files["LICENSE.txt"].path
    assert len(server.downloads("NOTICE.txt") + server.downloads("LICENSE.txt")) == 1
    assert sum(report.n_bytes) == sum(size or 0 for _, size in report.steps)


def test_an_empty_file_is_a_file(server: FakeHub, get: Get) -> None:
    server.repository(REPO).commit({**MODEL, "NOTICE": b""})
    assert get().files["NOTICE"].path.read_bytes() == b""


def test_small_files_come_before_weights(server: FakeHub, get: Get) -> None:
    get()
    assert [r.name for r in server.requests if r.name][-1] == WEIGHTS


@pytest.mark.parametrize("content", [MODEL, sharded()], ids=["single", "shards"])
def test_weights_can_stay_on_the_hub(server: FakeHub, get: Get, content: dict[str, bytes]) -> None:
    server.repository(REPO).commit(content)
    heavy = {WEIGHTS} if WEIGHTS in content else set(SHARDS)
    copy = get(weights=False)
    assert dict(copy.remote) == {name: len(content[name]) for name in heavy}
    assert not heavy & set(copy.files)
    assert not any(server.downloads(name) for name in heavy)
    assert set(get().files) == set(copy.files) | heavy
    assert not get(weights=False).remote


def test_only_pickles_on_the_hub_are_refused_before_any_download(server: FakeHub, get: Get) -> None:
    server.repository(REPO).commit({k: v for k, v in MODEL.items() if k != WEIGHTS})
    with pytest.raises(SourceError, match="only as pickle: 'pytorch_model.bin'"):
        get()
    assert not [r for r in server.requests if r.name]


def test_a_shard_that_the_hub_lacks_is_named(server: FakeHub, get: Get) -> None:
    content = sharded()
    del content["model-00002-of-00002.safetensors"]
    server.repository(REPO).commit(content)
    with pytest.raises(SourceError, match="lacks 'model-00002-of-00002.safetensors'"):
        get()


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_on_the_hub_names_plain_safetensors_only(
    server: FakeHub, get: Get, name: Any
) -> None:
    server.repository(REPO).commit(sharded({"tensor": name}))
    with pytest.raises(CheckpointError, match="names the shard"):
        get()


# --- the cache is everybody's


def test_what_other_tools_downloaded_is_used(server: FakeHub, get: Get, cache: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, cache_dir=cache, endpoint=server.endpoint, allow_patterns=["*.*", "*"])
    before = len(server.requests)
    copy = get()
    assert_is(copy, MODEL, NEEDED)
    assert copy.files[WEIGHTS].sha256 == sha256(MODEL[WEIGHTS])
    assert [r.path for r in server.requests[before:]] == [
        f"/api/models/{REPO}/revision/main?blobs=true"
    ]


def test_what_is_downloaded_is_of_use_to_other_tools(
    server: FakeHub, get: Get, cache: Path
) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache

    copy = get()
    server.close()
    for name in NEEDED:
        path = hf_hub_download(REPO, name, cache_dir=cache, local_files_only=True)
        assert path == try_to_load_from_cache(REPO, name, cache_dir=cache)
        assert Path(path) == copy.folder / name
    (repo,) = scan_cache_dir(cache).repos
    assert (repo.repo_id, repo.nb_files) == (REPO, len(NEEDED))
    assert not scan_cache_dir(cache).warnings


@pytest.mark.parametrize("how", ["offline", "HF_HUB_OFFLINE", "server down"])
def test_what_is_cached_is_used_without_the_hub(
    how: str, server: FakeHub, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    online, report = get(), Recorded()
    server.close()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for text in (REPO, f"{REPO}@{online.revision}"):
        copy = get(text, offline=how == "offline", report=report)
        assert copy == online
    assert len(report.notices) == (2 if how == "server down" else 0)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_only_answers_errors_is_replaced_by_the_cache(
    server: FakeHub, get: Get, status: int
) -> None:
    online, report = get(), Recorded()
    server.faults.api_errors = [status] * 9
    before = len(server.requests)
    assert get(report=report) == online
    assert str(status) in report.notices[0]
    assert len(server.requests) == before + 1  # who has the files does not insist


@pytest.mark.parametrize("content", [MODEL, sharded()], ids=["single", "shards"])
@pytest.mark.parametrize("down", [False, True])
def test_offline_names_what_is_missing(
    server: FakeHub, get: Get, content: dict[str, bytes], down: bool
) -> None:
    server.repository(REPO).commit(content)
    lost = WEIGHTS if WEIGHTS in content else "model-00002-of-00002.safetensors"
    copy = get()
    (copy.folder / lost).unlink()
    if down:
        server.close()
    with pytest.raises(SourceError, match=f"cache lacks '{lost}"):
        get(offline=not down)


def test_offline_with_nothing_cached_says_so(server: FakeHub, get: Get) -> None:
    with pytest.raises(SourceError, match=f"{REPO}@main is not complete here: nothing of it"):
        get(offline=True)
    server.close()
    with pytest.raises(SourceError, match=r"127.0.0.1 is not reachable \(network error: Connect"):
        get()
    assert not server.requests


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_damaged_small_file_in_the_cache_is_not_believed(
    server: FakeHub, get: Get, name: str
) -> None:
    path = get().files[name].path
    path.write_bytes(b"x" * path.stat().st_size)
    if name == "config.json":
        with pytest.raises(SourceError, match="cache lacks 'config.json'"):
            get(offline=True)
    else:
        assert name not in get(offline=True).files
    assert get().files[name].path.read_bytes() == MODEL[name]


def test_a_damaged_index_in_a_cache_without_links_is_not_believed(
    server: FakeHub, get: Get
) -> None:
    server.repository(REPO).commit(sharded())
    index = get().folder / INDEX
    index.unlink()
    index.write_bytes(b"{")
    assert get().files[INDEX].path.read_bytes() == sharded()[INDEX]


def test_cached_weights_of_another_size_are_not_believed(get: Get) -> None:
    path = get().files[WEIGHTS].path
    os.truncate(path, 5)
    assert get().files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]


def test_a_cache_without_links_is_used(get: Get) -> None:
    online = get()
    for path in list(online.folder.iterdir()):
        real = path.resolve()
        path.unlink()
        real.rename(path)
    copy = get(offline=True)
    assert_is(copy, MODEL, NEEDED)
    assert_is(get(), MODEL, NEEDED)


# --- downloads that go wrong


def test_a_killed_process_is_continued_by_the_next(server: FakeHub, get: Get, cache: Path) -> None:
    weights = ramp(4 << 20)
    server.repository(REPO).commit({**MODEL, WEIGHTS: weights})
    server.faults.seconds_per_chunk = 0.04
    process = start_download(server, cache)
    wait_for(lambda: server.sent(WEIGHTS) > 2 << 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (part,) = partial_files(cache)
    assert part.name.startswith(sha256(weights))
    server.faults.seconds_per_chunk = 0.0

    report = Recorded()
    assert get(report=report).files[WEIGHTS].path.read_bytes() == weights
    first, second = server.downloads(WEIGHTS)
    assert first.start == 0
    assert 1 << 19 < second.start < len(weights)
    assert second.status == 206
    assert server.sent(WEIGHTS) < 1.5 * len(weights)
    assert sum(report.n_bytes) == len(weights)
    assert not partial_files(cache)


def start_download(server: FakeHub, cache: Path) -> subprocess.Popen[bytes]:
    script = (
        "from pathlib import Path\n"
        "from medllm_pack.weights.hub import fetch\n"
        "from medllm_pack.weights.sources import parse_source\n"
        "from medllm_pack.progress import Silent\n"
        f"copy = fetch(parse_source({REPO!r}), role='base', report=Silent())\n"
        "print(copy.folder)\n"
    )
    env = environment(HF_ENDPOINT=server.endpoint, HF_HUB_CACHE=str(cache), HF_HOME=str(cache))
    return subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_share_one_download(server: FakeHub, cache: Path) -> None:
    weights = ramp(2 << 20)
    server.repository(REPO).commit({**MODEL, WEIGHTS: weights})
    server.faults.seconds_per_chunk = 0.02
    processes = [start_download(server, cache) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err.decode()
        assert (Path(out.decode().strip()) / WEIGHTS).read_bytes() == weights
    assert server.sent(WEIGHTS) == len(weights)
    assert not partial_files(cache)


def test_two_downloads_end_right_where_locks_do_nothing(
    server: FakeHub, get: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda fd, operation: None)  # as some cluster disks do
    weights = ramp(2 << 20)
    server.repository(REPO).commit({**MODEL, WEIGHTS: weights})
    get(weights=False)
    server.faults.seconds_per_chunk = 0.01
    copies: list[LocalCopy] = []
    threads = [threading.Thread(target=lambda: copies.append(get())) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert [copy.files[WEIGHTS].path.read_bytes() == weights for copy in copies] == [True] * 3
    assert not partial_files(cache)


def test_who_waited_starts_again_if_the_other_one_failed(server: FakeHub, get: Get) -> None:
    get(weights=False)
    server.faults.wrong_bytes, server.faults.seconds_per_chunk = {WEIGHTS}, 0.02
    failed: list[str] = []

    def fail() -> None:
        with pytest.raises(SourceError, match="arrived with the digest"):
            get()
        failed.append(WEIGHTS)

    other = threading.Thread(target=fail)
    other.start()
    wait_for(lambda: server.sent(WEIGHTS) > 0)
    server.faults.wrong_bytes, report = set(), Recorded()
    assert get(report=report).files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]
    other.join()
    assert failed
    assert report.notices == [f"waiting: another process downloads '{WEIGHTS}'"]


def test_the_lock_of_a_killed_process_is_not_waited_for(
    server: FakeHub, get: Get, cache: Path
) -> None:
    server.faults.stall_after = [1000]
    process = start_download(server, cache)
    wait_for(lambda: bool(partial_files(cache)))
    process.kill()
    process.communicate()
    server.faults.stall_after = []
    assert_is(get(), MODEL, NEEDED)


ACCIDENTS: dict[str, Callable[[Faults], None]] = {
    "cut": lambda faults: faults.cut_after.append(200_000),
    "cut at once": lambda faults: faults.cut_after.append(0),
    "500": lambda faults: faults.hub_errors.append(500),
    "429": lambda faults: faults.hub_errors.append(429),
    "expired": lambda faults: faults.storage_errors.append(403),
    "503 behind": lambda faults: faults.storage_errors.append(503),
    "wrong range": lambda faults: setattr(faults, "wrong_ranges", faults.wrong_ranges + 1),
    "whole file": lambda faults: setattr(faults, "ignore_range", True),
}


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(accidents=st.lists(st.sampled_from(sorted(ACCIDENTS)), max_size=8))
def test_after_any_accidents_the_bytes_are_right(
    accidents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("hub")
    with FakeHub() as server:
        server.repository(REPO).commit(MODEL)
        get_from(server, cache, weights=False)
        for accident in accidents:
            ACCIDENTS[accident](server.faults)
        patience = Patience(tries=10, first_wait_s=0.0, longest_wait_s=0.0)
        copy = get_from(server, cache, patience=patience)
        assert copy.files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]
        assert not partial_files(cache)


def get_from(server: FakeHub, cache: Path, **options: Any) -> LocalCopy:
    options = {"report": Silent(), **options}
    return fetch(parse_source(REPO), role="base", cache=cache, endpoint=server.endpoint, **options)


def test_a_cut_download_is_continued_with_a_fresh_address(server: FakeHub, get: Get) -> None:
    get(weights=False)
    server.faults.cut_after = [400_000, 300_000]
    report = Recorded()
    assert get(report=report).files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]
    assert [r.start for r in server.downloads(WEIGHTS)] == [0, 400_000, 700_000]
    assert server.sent(WEIGHTS) == sum(report.n_bytes) == len(MODEL[WEIGHTS])
    addresses = [r.path for r in server.downloads(WEIGHTS)]
    assert len(set(addresses)) == 3


def test_a_range_that_was_not_asked_for_is_not_used(server: FakeHub, get: Get) -> None:
    get(weights=False)
    server.faults.cut_after, server.faults.wrong_ranges = [400_000], 1
    assert get().files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]
    assert [r.start for r in server.downloads(WEIGHTS)] == [0, 400_000, 0]


def test_bytes_are_counted_once_even_if_the_server_starts_again(server: FakeHub, get: Get) -> None:
    get(weights=False)
    server.faults.cut_after, server.faults.ignore_range = [900_000], True
    report = Recorded()
    assert get(report=report).files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]
    assert sum(report.n_bytes) == len(MODEL[WEIGHTS])
    assert all(n > 0 for n in report.n_bytes)
    assert [r.status for r in server.downloads(WEIGHTS)] == [200, 200]


def test_a_stalled_connection_is_given_up_and_continued(server: FakeHub, get: Get) -> None:
    get(weights=False)
    server.faults.stall_after = [300_000]
    start = time.monotonic()
    assert get(patience=HASTY).files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]
    assert time.monotonic() - start < 15  # the server would have been silent for longer
    assert [r.start for r in server.downloads(WEIGHTS)] == [0, 300_000]


def test_a_trickle_is_given_up_although_bytes_come(server: FakeHub, get: Get) -> None:
    get(weights=False)
    server.faults.trickle = 400
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"stops at byte .* \(no answer in time\)"):
        get(patience=replace(HASTY, tries=2))
    assert time.monotonic() - start < 15  # the server would have trickled for longer
    assert len(server.downloads(WEIGHTS)) == 2


def test_a_few_bytes_a_try_do_not_go_on_for_ever(server: FakeHub, get: Get) -> None:
    get(weights=False)
    server.faults.cut_after = [1000] * 99
    with pytest.raises(SourceError, match="stops at byte 4,000 of"):
        get()
    assert [r.start for r in server.downloads(WEIGHTS)] == [0, 1000, 2000, 3000]


def test_trying_ends_and_the_next_run_continues(server: FakeHub, get: Get, cache: Path) -> None:
    get(weights=False)
    server.faults.cut_after = [100_000, 0, 0]
    with pytest.raises(SourceError, match=r"byte 100,000 of 1,048,576 .*again to continue"):
        get(patience=TWICE)
    assert [path.stat().st_size for path in partial_files(cache)] == [100_000]
    server.faults.cut_after = []
    assert get().files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]
    assert server.downloads(WEIGHTS)[-1].start == 100_000


def test_an_endless_storm_of_errors_ends(server: FakeHub, get: Get) -> None:
    server.faults.storage_errors = [503] * 99
    with pytest.raises(SourceError, match="127.0.0.1 answers 503"):
        get()
    server.faults.storage_errors, server.faults.api_errors = [], [500] * 99
    with pytest.raises(SourceError, match=r"not reachable \(it answers 500\)"):
        get()


@pytest.mark.parametrize("how", ["number", "date"])
@pytest.mark.parametrize("where", ["api_errors", "storage_errors"])
def test_the_server_may_ask_for_a_pause(server: FakeHub, get: Get, where: str, how: str) -> None:
    setattr(server.faults, where, [429])
    # A date has whole seconds.
    server.faults.retry_after = "1" if how == "number" else formatdate(time.time() + 2, usegmt=True)
    start = time.monotonic()
    get(patience=Patience(first_wait_s=0.0))
    assert time.monotonic() - start >= 0.9


@pytest.mark.parametrize("where", ["api_errors", "storage_errors"])
def test_a_server_that_asks_for_a_long_pause_is_not_waited_for(
    server: FakeHub, get: Get, where: str
) -> None:
    setattr(server.faults, where, [429])
    server.faults.retry_after = "3600"
    with pytest.raises(SourceError, match=r"answers 429; it asks for a pause of 3600 s\)"):
        get()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", WEIGHTS])
def test_wrong_bytes_never_become_a_file(server: FakeHub, get: Get, cache: Path, name: str) -> None:
    server.faults.wrong_bytes = {name}
    with pytest.raises(SourceError, match=f"'{name}' of {REPO} arrived with the digest"):
        get()
    assert not partial_files(cache)
    assert etag(name, MODEL[name]) not in blobs(cache)
    assert not list(cache.rglob(f"snapshots/*/{name}"))
    server.faults.wrong_bytes = set()
    assert_is(get(), MODEL, NEEDED)


def test_a_partial_file_with_wrong_bytes_never_becomes_a_file(
    server: FakeHub, get: Get, cache: Path
) -> None:
    get(weights=False)
    folder = cache / "models--org--model" / "blobs"
    part = folder / f"{sha256(MODEL[WEIGHTS])}.medllm-pack.incomplete"
    part.write_bytes(b"x" * 1000)
    with pytest.raises(SourceError, match="arrived with the digest"):
        get()
    assert not part.exists()
    assert get().files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]


@pytest.mark.parametrize("left", [len(MODEL[WEIGHTS]), len(MODEL[WEIGHTS]) + 7])
def test_a_whole_partial_file_is_finished_without_a_request(
    server: FakeHub, get: Get, cache: Path, left: int
) -> None:
    get(weights=False)
    folder = cache / "models--org--model" / "blobs"
    part = folder / f"{sha256(MODEL[WEIGHTS])}.medllm-pack.incomplete"
    part.write_bytes((MODEL[WEIGHTS] + bytes(9))[:left])
    assert get().files[WEIGHTS].path.read_bytes() == MODEL[WEIGHTS]
    assert not server.downloads(WEIGHTS)


def test_more_bytes_than_stated_are_refused(server: FakeHub, get: Get, cache: Path) -> None:
    server.faults.extra_bytes = 1
    with pytest.raises(SourceError, match="sends more than the"):
        get()
    assert not partial_files(cache)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_file_that_changes_between_listing_and_download_is_refused(
    server: FakeHub, get: Get, name: str
) -> None:
    other = etag(name, b"something else")
    server.faults.etags = {name: other}
    with pytest.raises(SourceError, match=f"announces '{name}' .* {other}"):
        get()


def test_a_new_commit_is_not_continued_from_the_old_one(
    server: FakeHub, get: Get, cache: Path
) -> None:
    get(weights=False)
    server.faults.cut_after = [100_000, 0]
    with pytest.raises(SourceError, match="100,000"):
        get(patience=TWICE)
    new = ramp(1 << 20, salt=5)
    server.repository(REPO).commit({**MODEL, WEIGHTS: new})
    assert get().files[WEIGHTS].path.read_bytes() == new
    assert server.downloads(WEIGHTS)[-1].start == 0


def test_a_full_disk_is_noticed_before_the_download(server: FakeHub, get: Get) -> None:
    server.faults.sizes = {WEIGHTS: 1 << 60}
    with pytest.raises(SourceError, match=r"needs 1,152,921,504,606,846,976 more bytes .* free"):
        get()
    assert not server.downloads(WEIGHTS)


def test_a_cache_that_cannot_be_written_says_what_to_do(get: Get, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file")
    with pytest.raises(SourceError, match="HF_HOME"):
        get()


# --- answers and what they mean


@pytest.mark.parametrize("token", [None, TOKEN])
def test_gated_names_the_page(
    server: FakeHub, get: Get, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        server.tokens = {token}
        monkeypatch.setenv("HF_TOKEN", token)
    server.faults.gated = True
    says = "your account has no access" if token else "is gated"
    with pytest.raises(SourceError, match=says) as raised:
        get()
    assert f"https://huggingface.co/{REPO}" in str(raised.value)
    assert "hf auth login" in str(raised.value)
    assert not [r for r in server.requests if r.status in {200, 206} and r.name]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("org/nothing", "org/nothing is not on the Hub, or it is private: .*hf auth login"),
        (f"{REPO}@nothing", f"{REPO} has no revision 'nothing'; https://huggingface.co/{REPO}"),
        (f"{REPO}@{'0' * 40}", "has no revision '0000"),
    ],
)
def test_what_does_not_exist_is_named(get: Get, text: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        get(text)


def test_a_listed_file_that_is_not_served_is_named(server: FakeHub, get: Get) -> None:
    server.faults.gone = {"tokenizer_config.json"}
    with pytest.raises(SourceError, match="lists 'tokenizer_config.json' at 'main' but does not"):
        get()


def test_a_bad_token_is_told_without_being_shown(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SourceError, match="does not accept your token.*hf auth login") as raised:
        get()
    assert TOKEN not in str(raised.value)


def test_the_token_goes_to_the_hub_and_nowhere_else(
    server: FakeHub, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.tokens = {TOKEN}
    server.faults.cut_after = [0, 0, 1000]
    get()
    assert {r.headers.get("authorization") for r in server.requests if r.server == "hub"} == {
        f"Bearer {TOKEN}"
    }
    elsewhere = [r for r in server.requests if r.server == "storage"]
    assert elsewhere
    assert not [r for r in elsewhere if "authorization" in r.headers]
    assert not [r for r in elsewhere if TOKEN in json.dumps(r.headers)]


def test_no_error_shows_a_token_or_a_signed_address(
    server: FakeHub, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.tokens = {TOKEN}
    for fault in (
        {"gated": True},
        {"gone": {WEIGHTS}},
        {"hub_errors": [500] * 99},
        {"hub_errors": [403]},
        {"hub_errors": [400]},
        {"storage_errors": [403] * 99},
        {"cut_after": [0] * 99},
        {"stall_after": [0] * 99},
        {"wrong_bytes": {WEIGHTS}},
        {"redirect_to": "ftp://x/?sig=secret"},
        {"redirect_to": "http://[::1/?sig=secret"},
        {"redirect_to": "http://x:99999/?sig=secret"},
        {"redirect_to": "http://x y/?sig=secret"},
    ):
        for name, value in fault.items():
            monkeypatch.setattr(server.faults, name, value)
        with pytest.raises(MedllmError) as raised:
            get(patience=HASTY if "stall_after" in fault else TWICE)
        text = str(raised.value)
        assert TOKEN not in text
        assert "sig=" not in text
        assert "http://" not in text
        monkeypatch.undo()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_redirects_in_a_circle_end(server: FakeHub, get: Get) -> None:
    commit = server.repository(REPO).refs["main"]
    server.faults.redirect_to = f"/{REPO}/resolve/{commit}/tokenizer.model"
    with pytest.raises(SourceError, match="in circles"):
        get()


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"[]", b"{}", b'{"id": "a/b"}', b"3"])
def test_a_login_page_is_not_taken_for_the_hub(
    server: FakeHub, get: Get, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fake_hub.json.dumps", lambda document: body.decode())
    with pytest.raises(SourceError, match="is no Hugging Face Hub; check HF_ENDPOINT"):
        get()


@pytest.mark.parametrize("bad", ["../../x", "a" * 39, "A" * 64, "", None, 3])
def test_a_digest_from_the_hub_is_no_path(bad: Any) -> None:
    @dataclass
    class Sibling:
        rfilename: str = "config.json"
        size: int = 3
        blob_id: Any = bad
        lfs: None = None

    with pytest.raises(SourceError, match="no size and digest"):
        listing.item_of(Sibling())


def test_https_is_never_left() -> None:
    here = "https://hub.test/a"
    assert request.redirected(here, "/b", "hub.test") == "https://hub.test/b"
    with pytest.raises(SourceError, match="https is never left"):
        request.redirected(here, "http://hub.test/b", "hub.test")
