"""The main job, end to end: bytes against llama.cpp's own, and the same bytes however it is run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.make_checkpoint import Shape, make
from medllm_pack import direct
from medllm_pack.errors import MedllmError, SourceError, WriteError
from medllm_pack.gguf.layout import lay_out
from medllm_pack.gguf.reader import read_gguf
from medllm_pack.pack.build import Built, build, memory_bytes
from medllm_pack.pack.output import Output
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.progress import SILENT, Reporter, Silent
from medllm_pack.quant import kernels
from medllm_pack.quant.mixes import load_mix, mix_names
from medllm_pack.recipe import load_recipe
from medllm_pack.weights.safetensors import TensorFile
from tests import llama_worker, pico
from tests.llama_worker import Job

ROOT = Path(__file__).resolve().parent.parent
# Sixteen blocks reach every branch of the mixes (n_layer/16 is the finest).
DEEP_LLAMA = replace(pico.LLAMA, layers=16, ff=256)
DEEP_MISTRAL = replace(pico.MISTRAL, layers=16, ff=256)
# llama.cpp refuses these without an importance matrix.
NEEDS_IMPORTANCE = {
    "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
}  # fmt: skip
FREE = [name.upper() for name in mix_names() if name.upper() not in NEEDS_IMPORTANCE]


def run(
    out: Path,
    *,
    quants: list[str],
    threads: int = 2,
    imatrix: Path | None = None,
    base: Path | None = None,
    adapter: Path | None = None,
    merged: Path | None = None,
    report: Reporter = SILENT,
) -> Built:
    """Build a pack of folders with the library."""
    sources = {"base": base, "adapter": adapter, "merged": merged}
    given = {role: path for role, path in sources.items() if path is not None}
    recipe = pico.write_recipe(out.parent / f"recipe-{out.name}", given)
    request = Request(
        recipe=load_recipe(recipe), folder=recipe.parent, out=out, variants=quants, imatrix=imatrix
    )
    return build(make_plan(request), threads=threads, report=report)


def variant(out: Path, name: str) -> Path:
    return out / f"Pico-{name}.gguf"


def pico_file(folder: Path, tokenizer: bytes, name: str) -> Path:
    """Return a GGUF file of a pico model, built inside a folder."""
    base = pico.write_model(folder / "base", tokenizer=tokenizer)
    run(folder / "pack", quants=[name], merged=base)
    return variant(folder / "pack", name)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture(scope="module", params=["llama", "mistral"])
def deep(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes
) -> Path:
    """A pack with every variant that needs no importance matrix, of a model with 16 blocks."""
    shape = {"llama": DEEP_LLAMA, "mistral": DEEP_MISTRAL}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = pico.write_model(folder / "base", shape, tokenizer=tokenizer)
    adapter = pico.write_adapter(folder / "adapter", shape)
    run(folder / "pack", quants=FREE, base=base, adapter=adapter)
    return folder / "pack"


def test_variants_are_byte_for_byte_what_llama_quantize_makes(deep: Path, tmp_path: Path) -> None:
    f16, names = variant(deep, "F16"), [name for name in FREE if name != "F16"]
    llama_worker.quantize(
        Job(f16, tmp_path / name, file_type=load_mix(name).file_type) for name in names
    )
    assert [name for name in names if not same(tmp_path / name, variant(deep, name))] == []


def test_files_are_fixed_points_of_llama_cpps_copy(deep: Path, tmp_path: Path) -> None:
    """`ollama create` copies every GGUF like this: the digest must survive."""
    llama_worker.quantize(
        Job(variant(deep, name), tmp_path / name, only_copy=True) for name in FREE
    )
    assert [name for name in FREE if not same(tmp_path / name, variant(deep, name))] == []


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_every_variant_loads_and_generates_in_llama_cpp(deep: Path) -> None:
    models = [str(variant(deep, name)) for name in FREE]
    texts = llama_worker.call("generate", models=models, prompts=["Paciente"], tokens=4)
    assert list(texts) == models
    assert all(text for [text] in texts.values())


def test_variants_with_importance_are_llama_quantizes(tmp_path: Path, tokenizer: bytes) -> None:
    """In one process, ours and theirs: libggml prepares tables, for up to 12 s a type."""
    wanted = {
        "llama": (
            pico.LLAMA,
            [*sorted(NEEDS_IMPORTANCE), "Q4_K_M", "Q4_0", "Q5_0", "IQ3_M", "IQ4_NL"],
        ),
        "mistral": (
            pico.MISTRAL, ["IQ3_XXS", "IQ1_S", "Q2_K_S", "Q4_K_M", "Q6_K", "IQ4_XS"],
        ),
    }  # fmt: skip
    packs, jobs = [], []
    for place, (shape, names) in wanted.items():
        folder = tmp_path / place
        weights = importance(shape)
        packs.append({
            "out": str(folder / "pack"), "quants": ["F16", *names],
            "merged": str(pico.write_model(folder / "base", shape, tokenizer=tokenizer)),
            "imatrix": str(write_importance(folder / "x.imatrix.gguf", weights)),
        })  # fmt: skip
        f16, matrix = variant(folder / "pack", "F16"), as_lists(weights)
        jobs += [
            Job(f16, folder / name, file_type=load_mix(name).file_type, imatrix=matrix)
            for name in names
        ]
    llama_worker.quantize(jobs, packs=packs)
    for place, (_, names) in wanted.items():
        for name in names:
            ours = variant(tmp_path / place / "pack", name)
            assert same(tmp_path / place / name, ours), (place, name)


def as_lists(weights: dict[str, Any]) -> dict[str, list[float]]:
    return {key: values.tolist() for key, values in weights.items()}


def importance(shape: pico.Pico) -> dict[str, Any]:
    """Return a weight a column for every matrix in the blocks, as llama-imatrix makes them."""
    from medllm_pack.gguf import llama

    config = llama.parse_config(shape.config())
    return {
        t.name: np.abs(pico.ramp((t.shape[1],), 77 + i)) + np.float32(0.01)
        for i, t in enumerate(llama.tensors(config))
        if t.name.startswith("blk.") and len(t.shape) == 2
    }


def write_importance(path: Path, weights: dict[str, Any]) -> Path:
    """Write an importance matrix with gguf-py, the way llama-imatrix lays it out."""
    writer = gguf.GGUFWriter(path, "imatrix", use_temp_file=False)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["/srv/pacientes/laudos.txt"])
    for name, values in weights.items():
        # Sums over 2 chunks: the mean is what was put in, exactly.
        writer.add_tensor(f"{name}.in_sum2", (values * np.float32(2)).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[2.0]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_paths_in_an_importance_matrix_do_not_reach_the_pack(
    tmp_path: Path, tokenizer: bytes
) -> None:
    base = pico.write_model(tmp_path / "base", tokenizer=tokenizer)
    path = write_importance(tmp_path / "paciente.gguf", importance(pico.LLAMA))
    run(tmp_path / "pack", quants=["Q4_K_M"], merged=base, imatrix=path)
    for file in (tmp_path / "pack").iterdir():
        content = file.read_bytes()
        assert b"pacientes" not in content
        assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_bytes_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, llama_folder: Path, llama_adapter: Path, threads: int
) -> None:
    for place, count in (("a", 3), ("b", threads)):
        run(
            tmp_path / place / "pack", quants=["f16", "q4_k_m", "q8_0"], threads=count,
            base=llama_folder, adapter=llama_adapter,
        )  # fmt: skip
    recipes = {"README.md", "pack.json", "SHA256SUMS"}  # the recipe's own folders stand in these
    a, b = digests(tmp_path / "a" / "pack"), digests(tmp_path / "b" / "pack")
    assert a == b
    assert recipes < set(a)


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_threads_compute_than_were_asked_for(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    busy, most = [0], [0]
    lock, real = threading.Lock(), kernels.quantize

    def quantize(*block: Any, **more: Any) -> Any:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.02)  # so that others come meanwhile
        with lock:
            busy[0] -= 1
        return real(*block, **more)

    monkeypatch.setattr(kernels, "quantize", quantize)
    run(tmp_path / "p", quants=["q4_k_m", "q8_0"], merged=llama_folder, threads=threads)
    assert most[0] == threads


def test_bytes_do_not_depend_on_the_size_of_blocks(
    tmp_path: Path, llama_folder: Path, llama_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in "ab":
        run(tmp_path / place, quants=["f16", "q4_k_m"], base=llama_folder, adapter=llama_adapter)
        monkeypatch.setattr("medllm_pack.pack.build.BLOCK_WEIGHTS", 64 * 256)
    for name in ("F16", "Q4_K_M"):
        assert variant(tmp_path / "a", name).read_bytes() == (
            variant(tmp_path / "b", name).read_bytes()
        )


@pytest.mark.parametrize("shards", [2, 5])
def test_output_is_unchanged_by_shard_boundaries(
    tmp_path: Path, llama_folder: Path, llama_adapter: Path, tokenizer: bytes, shards: int
) -> None:
    sharded = pico.write_model(tmp_path / "elsewhere", shards=shards, tokenizer=tokenizer)
    run(tmp_path / "a", quants=["f16", "q4_k_m"], base=llama_folder, adapter=llama_adapter)
    run(tmp_path / "b", quants=["f16", "q4_k_m"], base=sharded, adapter=llama_adapter)
    for name in ("F16", "Q4_K_M"):
        assert variant(tmp_path / "a", name).read_bytes() == (
            variant(tmp_path / "b", name).read_bytes()
        )


def test_pack_is_the_same_from_another_folder(
    tmp_path: Path, llama_folder: Path, llama_adapter: Path
) -> None:
    for place in ("here", "elsewhere/deep"):
        shutil.copytree(llama_folder, tmp_path / place / f"base-{place[:4]}")
        shutil.copytree(llama_adapter, tmp_path / place / "adapter")
    command = [sys.executable, "-m", "medllm_pack", "build", "7b", "--quant", "f16"]
    for place in ("here", "elsewhere/deep"):
        subprocess.run(
            [*command, "--base", f"base-{place[:4]}", "--adapter", "adapter", "--out", "pack"],
            cwd=tmp_path / place, check=True, capture_output=True,
        )  # fmt: skip
    assert digests(tmp_path / "here" / "pack") == digests(tmp_path / "elsewhere" / "deep" / "pack")


def test_killed_at_any_moment_and_run_again_gives_the_same_pack(
    tmp_path: Path, tokenizer: bytes
) -> None:
    shape = replace(pico.LLAMA, layers=6)
    base = pico.write_model(tmp_path / "base", shape, tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "adapter", shape)
    recipe = pico.write_recipe(tmp_path / "recipe", {"base": base, "adapter": adapter})
    command = [sys.executable, "-m", "medllm_pack", "build", str(recipe), "--quiet", "--out"]

    def begin(name: str) -> subprocess.Popen[bytes]:
        """Start a build and wait until it has a place to write to."""
        before = set(tmp_path.glob(f".{name}.partial*"))
        process = subprocess.Popen(
            [*command, name], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not {*tmp_path.glob(f".{name}.partial*")} - before:
            time.sleep(0.005)
        return process

    for name in ("warm", "golden"):  # the first may compile kernels, which takes much longer
        process = begin(name)
        start = time.monotonic()
        assert process.wait() == 0
        duration = time.monotonic() - start
    finished = 0
    for part in range(8):  # from its beginning to its end
        process = begin("pack")
        time.sleep(part / 6 * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "pack").exists():  # it had ended; whatever has the name is whole
            assert digests(tmp_path / "pack") == digests(tmp_path / "golden")
            shutil.rmtree(tmp_path / "pack")
            finished += 1
    assert finished < 8
    subprocess.run([*command, "pack"], cwd=tmp_path, check=True, capture_output=True)
    assert digests(tmp_path / "pack") == digests(tmp_path / "golden")
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_build_cleans_up_and_says_so(
    tmp_path: Path, tokenizer: bytes, stop: signal.Signals
) -> None:
    shape = replace(pico.LLAMA, layers=40)
    base = pico.write_model(tmp_path / "base", shape, tokenizer=tokenizer)
    recipe = pico.write_recipe(tmp_path / "recipe", {"merged": base})
    process = subprocess.Popen(
        [sys.executable, "-m", "medllm_pack", "build", str(recipe), "--quant=q2_k", "--out=p"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # Where the tests run in the background, signals come to them ignored.
        preexec_fn=lambda: signal.signal(stop, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".p.partial*/*.gguf")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + stop
    assert not list(tmp_path.glob(".p.partial*"))
    assert not (tmp_path / "p").exists()
    assert "Traceback" not in said


def test_build_under_nohup_goes_on_without_its_terminal(tmp_path: Path, tokenizer: bytes) -> None:
    shape = replace(pico.LLAMA, layers=40)
    base = pico.write_model(tmp_path / "base", shape, tokenizer=tokenizer)
    recipe = pico.write_recipe(tmp_path / "recipe", {"merged": base})
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "medllm_pack", "build", str(recipe), "--out=p"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".p.partial*/*.gguf")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    check_sums(tmp_path / "p")


def test_two_builds_of_one_target_end_right(tmp_path: Path, tokenizer: bytes) -> None:
    base = pico.write_model(tmp_path / "base", tokenizer=tokenizer)
    recipe = pico.write_recipe(tmp_path / "recipe", {"merged": base})
    command = [sys.executable, "-m", "medllm_pack", "build", str(recipe), "--out", "p"]
    processes = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    codes = sorted(process.wait(timeout=120) for process in processes)
    for process in processes:
        process.communicate()
    assert codes[0] == 0
    assert set(codes) <= {0, 1}
    check_sums(tmp_path / "p")


def check_sums(pack: Path) -> None:
    """Check SHA256SUMS with coreutils, and that it names every file."""
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=pack, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    named = {line.split("  ")[1] for line in (pack / "SHA256SUMS").read_text().splitlines()}
    assert named == {path.name for path in pack.iterdir()} - {"SHA256SUMS"}


def test_pack_folder_holds_what_the_design_says(
    tmp_path: Path, llama_folder: Path, llama_adapter: Path
) -> None:
    built = run(tmp_path / "p", quants=["f16", "q4_k_m"], base=llama_folder, adapter=llama_adapter)
    check_sums(built.folder)
    text = (built.folder / "pack.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert text == json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert (
        document["adapter"] | {"r": 8, "alpha": 16.0, "scale": 2.0, "tensors": 8}
        == (document["adapter"])
    )
    roles = {entry["role"]: entry for entry in document["inputs"]}
    for role, folder in (("base", llama_folder), ("adapter", llama_adapter)):
        for file in roles[role]["files"]:
            content = (folder / file["name"]).read_bytes()
            assert (file["size"], file["sha256"]) == (
                len(content),
                hashlib.sha256(content).hexdigest(),
            )
    for item in document["variants"]:
        path = built.folder / item["file"]
        reader = gguf.GGUFReader(path)
        types: dict[str, int] = {}
        for tensor in reader.tensors:
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        assert item["types"] == types
        assert item["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
        assert item["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        modelfile = (built.folder / item["modelfile"]).read_text(encoding="utf-8")
        assert f"FROM ./{item['file']}\n" in modelfile
    assert document["parity"] is None


def test_adapter_changes_its_targets_and_nothing_else(
    tmp_path: Path, llama_folder: Path, llama_adapter: Path
) -> None:
    run(tmp_path / "with", quants=["f16"], base=llama_folder, adapter=llama_adapter)
    run(tmp_path / "without", quants=["f16"], merged=llama_folder)
    readers = [gguf.GGUFReader(variant(tmp_path / p, "F16")) for p in ("with", "without")]
    changed = {
        a.name
        for a, b in zip(readers[0].tensors, readers[1].tensors, strict=True)
        if not np.array_equal(a.data, b.data)
    }
    assert changed == {f"blk.{i}.attn_{kind}.weight" for i in (0, 1) for kind in "qv"}


class Prepared(Silent):
    """Notes each step, and how many kernels had been compiled by then."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    def step(self, name: str, *, total_bytes: int | None = None) -> None:
        self.steps[name] = kernels._compiled.cache_info().misses


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("quant", ["f16", "q8_0"])
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_what_is_compiled_is_compiled_before_the_pass(
    tmp_path: Path, tokenizer: bytes, dtype: str, quant: str, merged: bool
) -> None:
    model = pico.write_model(tmp_path / "base", dtype=dtype, tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "adapter")
    inputs: dict[str, Any] = {"merged": model} if merged else {"base": model, "adapter": adapter}
    kernels._compiled.cache_clear()
    report = Prepared()
    run(tmp_path / "p", quants=[quant], report=report, **inputs)
    assert ("preparing kernels" in report.steps) == ((dtype, quant, merged) != ("F16", "f16", True))
    assert ("preparing the merge" in report.steps) != merged
    assert report.steps["building"] == kernels._compiled.cache_info().misses


@pytest.mark.parametrize("shape", [pico.LLAMA, pico.MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_llama_cpp_computes_what_transformers_and_peft_compute(
    tmp_path: Path, tokenizer: bytes, shape: pico.Pico, dtype: str
) -> None:
    """The whole chain: names, row order, merge and metadata, by the logits of both."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = pico.write_model(tmp_path / "base", shape, dtype=dtype, tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "adapter", shape)
    run(tmp_path / "p", quants=["f32"], base=base, adapter=adapter)
    ids = [1, *range(260, 300)]
    llama_worker.call(
        "logits", model=str(variant(tmp_path / "p", "F32")), texts=[ids],
        targets=[str(tmp_path / "x.npy")],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, str(adapter))(torch.tensor([ids])).logits[0]
    got = np.load(tmp_path / "x.npy")
    # Weights are rounded to F16 on the way; the spread of the logits is about 3.
    assert np.abs(got - expected.numpy()).max() < 0.02
    assert (got.argmax(1) == expected.numpy().argmax(1)).mean() > 0.95


def test_tied_embeddings_are_packed_without_a_head(tmp_path: Path, tokenizer: bytes) -> None:
    shape = replace(pico.LLAMA, tied=True)
    tensors = pico.weights(replace(shape, tied=False), "F16")  # a head that must not be read
    base = pico.write_model(tmp_path / "base", shape, tensors=tensors, tokenizer=tokenizer)
    built = run(tmp_path / "p", quants=["f16", "q4_k_m"], merged=base)
    names = {t.name: t.type for t in read_gguf(variant(tmp_path / "p", "Q4_K_M")).tensors}
    assert "output.weight" not in names
    assert names["token_embd.weight"] == "Q6_K"
    assert any("tied" in notice for notice in built.manifest["notices"])
    theirs = tmp_path / "theirs.gguf"
    llama_worker.quantize([Job(variant(tmp_path / "p", "F16"), theirs, file_type=15)])
    assert theirs.read_bytes() == variant(tmp_path / "p", "Q4_K_M").read_bytes()


def test_old_rotary_buffers_are_left_out(tmp_path: Path, tokenizer: bytes) -> None:
    tensors = pico.weights(pico.LLAMA, "F16")
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = pico.ramp((32,), 1)
    base = pico.write_model(tmp_path / "base", tensors=tensors, tokenizer=tokenizer)
    run(tmp_path / "p", quants=["f16"], merged=base)
    assert len(read_gguf(variant(tmp_path / "p", "F16")).tensors) == 21


@pytest.mark.parametrize(
    "name", ["base/config.json", "base/tokenizer.model", "adapter/adapter_config.json"]
)
@pytest.mark.parametrize("gone", [False, True])
def test_small_input_that_changes_after_the_plan_has_read_it_ends_the_build(
    tmp_path: Path, tokenizer: bytes, name: str, gone: bool
) -> None:
    """Else pack.json would name the digest of bytes that are not in the pack."""
    base = pico.write_model(tmp_path / "base", tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "adapter")

    class Editor(Silent):
        def step(self, step: str, *, total_bytes: int | None = None) -> None:
            path = tmp_path / name
            content = path.read_bytes() if path.exists() else b""
            path.unlink(missing_ok=True)
            if not gone:
                path.write_bytes(content)  # of the same size

    with pytest.raises(SourceError, match=f"'{Path(name).name}'"):
        run(tmp_path / "p", quants=["f16"], base=base, adapter=adapter, report=Editor())
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_value_that_is_not_finite_stops_the_build_with_its_tensor(
    tmp_path: Path, tokenizer: bytes, bad: float, name: str
) -> None:
    tensors = pico.weights(pico.LLAMA, "F16")
    tensors[name].reshape(-1)[-3] = bad
    base = pico.write_model(tmp_path / "base", tensors=tensors, tokenizer=tokenizer)
    with pytest.raises(MedllmError, match=name):
        run(tmp_path / "p", quants=["f16", "q4_k_m"], merged=base)
    assert not list(tmp_path.glob("*p*/*.gguf"))


def test_value_that_overflows_f16_stops_the_build_with_its_tensor(
    tmp_path: Path, tokenizer: bytes
) -> None:
    tensors = pico.weights(pico.LLAMA, "F32")
    tensors["model.layers.0.mlp.gate_proj.weight"][3, 3] = 70000.0
    base = pico.write_model(tmp_path / "base", dtype="F32", tensors=tensors, tokenizer=tokenizer)
    with pytest.raises(MedllmError, match=r"gate_proj.*70000, which overflows F16"):
        run(tmp_path / "p", quants=["f16"], merged=base)


def test_sum_that_overflows_f16_stops_the_build(tmp_path: Path, llama_folder: Path) -> None:
    tensors = pico.adapter_tensors(pico.LLAMA)
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_"
    tensors[f"{name}A.weight"][:] = 300
    tensors[f"{name}B.weight"][:] = 300
    adapter = pico.write_adapter(tmp_path / "a", tensors=tensors)
    with pytest.raises(MedllmError, match=r"v_proj.*overflows F16"):
        run(tmp_path / "p", quants=["f16"], base=llama_folder, adapter=adapter)


@pytest.mark.parametrize(("quant", "largest"), [("Q4_1", 1.0), ("Q4_0", 1e30)])
def test_scale_that_is_not_finite_is_refused_where_llama_quantize_refuses(
    tmp_path: Path, tokenizer: bytes, quant: str, largest: float
) -> None:
    """Every weight is finite; what an importance matrix makes of the largest ones is not."""
    tensors = pico.weights(pico.LLAMA, "F16")
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    bits = np.random.default_rng(4).integers(0, 1 << 16, up.shape).astype(np.uint16)
    up[:] = np.nan_to_num(bits.view(np.float16), nan=0)
    base = pico.write_model(tmp_path / "base", tensors=tensors, tokenizer=tokenizer)
    weights = {"blk.1.ffn_up.weight": np.full(256, largest, dtype=np.float32)}
    path = write_importance(tmp_path / "x.gguf", weights)
    run(tmp_path / "f16", quants=["F16"], merged=base)
    with pytest.raises(MedllmError, match=rf"blk.1.ffn_up.weight has a scale in {quant} that is"):
        run(tmp_path / "pack", quants=["F16", quant], merged=base, imatrix=path)
    assert not (tmp_path / "pack").exists()
    f16, mix = variant(tmp_path / "f16", "F16"), load_mix(quant)
    job = Job(f16, tmp_path / "theirs.gguf", file_type=mix.file_type, imatrix=as_lists(weights))
    with pytest.raises(RuntimeError, match="quantize"):
        llama_worker.quantize([job])


def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Three times the blocks, of a width that fills the blocks of rows.

    What is in memory at the worst moment depends on which thread is ahead, by some tens of
    megabytes; four blocks more are 400 of input alone.
    """
    peaks, weights = [], []
    for layers in (2, 6):
        shape = Shape(layers, 2048, 5632, 32, 32, vocab=2000)
        tokenizer = ROOT / "tests" / "golden" / "tokenizer.model"
        make(shape, tmp_path / str(layers), tokenizer=tokenizer)
        weights.append((tmp_path / str(layers) / "base" / "model.safetensors").stat().st_size)
        peaks.append(peak_of_build(tmp_path, tmp_path / str(layers)))
    assert peaks[1] - peaks[0] < (weights[1] - weights[0]) / 4
    assert max(peaks) < memory_bytes(2, threads=2)  # what `plan` says, whatever the model's depth


def peak_of_build(folder: Path, work: Path) -> int:
    """Return the peak resident bytes of a build in a process of its own.

    The process tells itself: what the kernel counts for a child includes its parent before exec.
    """
    code = (
        "import sys; from medllm_pack.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )
    sources = ["--base", str(work / "base"), "--adapter", str(work / "adapter")]
    arguments = ["build", "7b", "--quant=f16,q8_0", "--threads=2", "--out", str(work / "pack")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, *sources],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.splitlines()[-1]) * 1024


def test_output_that_is_not_complete_has_no_digest(tmp_path: Path) -> None:
    layout = lay_out([], [("a.weight", (4, 32), "F16"), ("b.weight", (3,), "F32")], file_type=1)
    output = Output(tmp_path / "x.gguf", layout)
    output.write(layout.by_name["b.weight"].offset, bytes(12))
    with pytest.raises(WriteError, match="only up to byte 0"):
        output.finish()
    output.close()


@pytest.mark.parametrize("bypass", [True, False])
@pytest.mark.parametrize("columns", [32, 4096])
@pytest.mark.parametrize("kept", [0, 3 * 4096, 16 << 20])
@pytest.mark.parametrize("seed", range(2))
def test_digest_is_the_files_whatever_the_order_of_the_blocks(
    tmp_path: Path,
    seed: int,
    kept: int,
    columns: int,
    bypass: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of 34 bytes share pages with many others; rows of 4352 hold none, one or two.

    Blocks whose turn comes late are read back: all, many or none of them.
    """
    monkeypatch.setattr("medllm_pack.pack.output.KEPT_BYTES", kept)
    shapes = [(f"blk.{i}.attn_q.weight", (7, columns), "Q8_0") for i in range(9)]
    layout = lay_out([], [*shapes, ("output_norm.weight", (5,), "F32")], file_type=7)
    output = Output(tmp_path / "x.gguf", layout, direct=bypass)
    pieces = [
        (slot.offset + row * slot.row_bytes, slot.row_bytes)
        for slot in layout.slots
        for row in range(slot.nbytes // slot.row_bytes)
    ]
    order = random.Random(seed)
    order.shuffle(pieces)
    expected = bytearray(layout.header.ljust(layout.size, b"\0"))
    for offset, size in pieces:
        expected[offset : offset + size] = order.randbytes(size)
        output.write(offset, bytes(expected[offset : offset + size]))
    digest = output.finish()
    output.close()
    content = (tmp_path / "x.gguf").read_bytes()
    assert content == expected
    assert len(content) == layout.size
    assert digest == hashlib.sha256(content).hexdigest()
    assert read_gguf(tmp_path / "x.gguf").tensors == layout.slots


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_digest_that_fails_is_no_digest_and_ends_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is computed by a thread of its own, whose end alone nobody would see."""

    written = threading.Event()

    def fail(*_: object) -> None:
        written.wait(60)
        raise error

    monkeypatch.setattr("medllm_pack.files.DigestBehind.update", fail)
    layout = lay_out([], [("a.weight", (64, 64), "F16")], file_type=1)
    output = Output(tmp_path / "x.gguf", layout)
    [slot] = layout.slots
    output.write(slot.offset, bytes(slot.nbytes))
    written.set()
    with pytest.raises(type(error)):
        output.finish()
    with pytest.raises(type(error)):
        output.write(slot.offset, bytes(slot.nbytes))
    output.close()


def test_who_writes_faster_than_the_digest_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written in order is not read back, however slow the digest."""
    monkeypatch.setattr("medllm_pack.pack.output.KEPT_BYTES", 3 * 4352)
    read_back: list[Any] = []
    monkeypatch.setattr(Output, "_read_back", lambda *what: read_back.append(what))
    layout = lay_out([], [("blk.0.attn_q.weight", (300, 4096), "Q8_0")], file_type=7)
    slot = layout.slots[0]
    output = Output(tmp_path / "x.gguf", layout)
    update = output._digest.update

    def slow(data: memoryview) -> None:
        time.sleep(0.002)
        update(data)

    monkeypatch.setattr(output._digest, "update", slow)
    for row in range(300):
        output.write(slot.offset + row * slot.row_bytes, random.Random(row).randbytes(4352))
    digest = output.finish()
    output.close()
    assert not read_back
    assert digest == hashlib.sha256((tmp_path / "x.gguf").read_bytes()).hexdigest()


def test_closed_file_is_not_written_to_by_who_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor's number would be the next file's."""
    layout = lay_out([], [("a.weight", (64, 64), "F16")], file_type=1)
    [slot] = layout.slots
    output = Output(tmp_path / "x.gguf", layout)
    begun, gate, pwrite = threading.Event(), threading.Event(), os.pwrite

    def held(fd: int, data: memoryview, offset: int) -> int:
        begun.set()
        gate.wait(30)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", held)
    writing = threading.Thread(target=output.write, args=(slot.offset, bytes(slot.nbytes)))
    writing.start()
    assert begun.wait(30)
    closing = threading.Thread(target=output.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    gate.set()
    closing.join(30)
    writing.join(30)
    with (tmp_path / "next").open("xb") as following:
        with pytest.raises(OSError, match="closed"):
            output.write(slot.offset, bytes(slot.nbytes))
        assert os.fstat(following.fileno()).st_size == 0


def test_thread_writes_all_files_through_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(size: int) -> NDArray[np.uint8]:
        asked.append(size)
        return direct.aligned(size)

    def write(n: int) -> None:
        output = Output(tmp_path / f"{n}.gguf", layout)
        output.write(layout.slots[0].offset, bytes(layout.slots[0].nbytes))
        output.finish()
        output.close()

    monkeypatch.setattr("medllm_pack.pack.output.aligned", counted)
    monkeypatch.setattr("medllm_pack.pack.output._CHUNK", 4096)
    layout = lay_out([], [("a.weight", (64, 64), "F16")], file_type=1)
    with ThreadPoolExecutor(1) as pool:
        list(pool.map(write, range(3)))
    assert len([size for size in asked if size > 4096]) == 1


def test_header_larger_than_what_is_kept_waits_for_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medllm_pack.pack.output.KEPT_BYTES", 4096)
    names = [f"blk.{i}.attn_q.weight" for i in range(200)]
    layout = lay_out([], [(name, (2, 32), "Q8_0") for name in names], file_type=7)
    assert len(layout.header) > 2 * 4096
    opening = threading.Thread(
        target=lambda: Output(tmp_path / "x.gguf", layout).close(), daemon=True
    )
    opening.start()
    opening.join(10)
    assert not opening.is_alive()


def test_block_is_written_at_once_with_the_pages_that_it_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = lay_out([], [("blk.0.attn_q.weight", (40, 4096), "Q8_0")], file_type=7)
    slot = layout.slots[0]
    output = Output(tmp_path / "x.gguf", layout)
    calls: list[int] = []
    pwrite = os.pwrite

    def counted(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    for row in range(0, 40, 4):
        output.write(slot.offset + row * slot.row_bytes, bytes([row]) * 4 * 4352)
    output.finish()
    output.close()
    assert len(calls) <= 10 + 2  # ten blocks, and what remains of the ends


def test_digest_is_of_what_was_meant_if_the_disk_changes_it(tmp_path: Path) -> None:
    """Else the digest would vouch for the damage."""
    layout = lay_out([], [(f"{x}.weight", (64, 64), "F16") for x in "ab"], file_type=1)
    output = Output(tmp_path / "x.gguf", layout)
    first, second = layout.slots
    output.write(second.offset, bytes(second.nbytes))
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.seek(second.offset + second.nbytes // 2)
        file.write(b"?")
    output.write(first.offset, bytes(first.nbytes))
    digest = output.finish()
    output.close()
    meant = layout.header.ljust(layout.size, b"\0")
    assert digest == hashlib.sha256(meant).hexdigest()
    assert digest != hashlib.sha256((tmp_path / "x.gguf").read_bytes()).hexdigest()


@pytest.mark.parametrize("cache", [False, True])
def test_build_larger_than_memory_gives_the_same_bytes(
    tmp_path: Path, tokenizer: bytes, cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the page cache is bypassed where the file system can, but for what waits in it."""
    base = pico.write_model(tmp_path / "base", DEEP_LLAMA, tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "adapter", DEEP_LLAMA)
    size = (base / "model.safetensors").stat().st_size
    asked: list[int] = []
    waited: list[int] = []

    def switch_on(fd: int) -> bool:
        asked.append(fd)
        return direct.switch_on(fd)

    def again(file: TensorFile, start: int, end: int) -> Iterator[memoryview]:
        waited.append(end - start)
        return read_again(file, start, end)

    read_again = TensorFile._again
    run(tmp_path / "a", quants=["f16"], base=base, adapter=adapter)
    monkeypatch.setattr("medllm_pack.memory.available", lambda: 9 * size // 5 if cache else 0)
    monkeypatch.setattr("medllm_pack.pack.build.WAITING_BYTES", 16 << 20)  # no room
    monkeypatch.setattr("medllm_pack.weights.safetensors.switch_on", switch_on)
    monkeypatch.setattr("medllm_pack.weights.safetensors._NEAR", size // 8)
    monkeypatch.setattr("medllm_pack.weights.safetensors._SMALL", 10_000)
    monkeypatch.setattr(TensorFile, "_again", again)
    run(tmp_path / "b", quants=["f16"], base=base, adapter=adapter)
    assert asked
    # Layers 2 to 9 of 16 come last in the file, and first in the output if there is room.
    assert sum(waited) > size // 4 if cache else not waited
    for name in ("Pico-F16.gguf", "pack.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
