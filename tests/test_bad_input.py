"""Bad input: one line that names the thing, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from medllm_pack.cli import console
from medllm_pack.cli.commands import app
from tests import pico
from tests.test_build import importance, write_importance


@dataclass(frozen=True)
class Bench:
    """A folder with sound inputs, to be spoiled one at a time."""

    folder: Path
    tokenizer: bytes

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def recipe(self, text: str = "", **sources: Path) -> str:
        sources = sources or {"base": self.base, "adapter": self.adapter}
        return str(pico.write_recipe(self.folder / "recipe", sources, text=text))

    def rewrite_base(self, **arguments: object) -> None:
        for path in self.base.iterdir():
            path.unlink()
        pico.write_model(self.base, tokenizer=self.tokenizer, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path, tokenizer: bytes) -> Bench:
    bench = Bench(tmp_path, tokenizer)
    pico.write_model(bench.base, tokenizer=tokenizer)
    pico.write_adapter(bench.adapter)
    return bench


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code and both outputs."""
    with pytest.raises(SystemExit) as ended:
        console.run(lambda: app(arguments))
    captured = capsys.readouterr()
    code = ended.value.code
    return code if isinstance(code, int) else 1, captured.out, captured.err


# --- what spoils the inputs; each returns the arguments of the command ------------------------


def unknown_recipe(bench: Bench) -> list[str]:
    return ["build", "8b"]


def unknown_quant(bench: Bench) -> list[str]:
    return ["build", bench.recipe(), "--quant", "f16,q4_k_n"]


def quant_twice(bench: Bench) -> list[str]:
    return ["build", bench.recipe(), "--quant", "q4_k_m,Q4_K_M"]


def unknown_style(bench: Bench) -> list[str]:
    return ["build", bench.recipe(), "--template", "nota-clinca"]


def merged_and_adapter(bench: Bench) -> list[str]:
    return ["build", bench.recipe(), "--merged", str(bench.base), "--adapter", str(bench.adapter)]


def base_alone(bench: Bench) -> list[str]:
    return ["build", bench.recipe(merged=bench.base), "--base", str(bench.base)]


def no_base_stated(bench: Bench) -> list[str]:
    return ["build", "mistral-7b", "--adapter", str(bench.adapter)]


def source_of_no_form(bench: Bench) -> list[str]:
    return ["build", bench.recipe(), "--base", "a/b/c/d"]


def no_threads(bench: Bench) -> list[str]:
    return ["build", bench.recipe(), "--threads", "0"]


def missing_recipe_file(bench: Bench) -> list[str]:
    return ["build", "mine.toml"]


def recipe_not_toml(bench: Bench) -> list[str]:
    Path(bench.recipe()).write_text("name = ")
    return ["build", str(bench.folder / "recipe" / "pico.toml")]


def recipe_with_unknown_key(bench: Bench) -> list[str]:
    return ["build", bench.recipe('qant = ["f16"]')]


def recipe_with_unknown_parameter(bench: Bench) -> list[str]:
    return ["build", bench.recipe("parameters = { num_ctxx = 1 }")]


def no_weights(bench: Bench) -> list[str]:
    (bench.base / "model.safetensors").unlink()
    return ["build", bench.recipe()]


def pickled_weights(bench: Bench) -> list[str]:
    (bench.base / "model.safetensors").rename(bench.base / "pytorch_model.bin")
    return ["build", bench.recipe()]


def pickled_adapter(bench: Bench) -> list[str]:
    (bench.adapter / "adapter_model.safetensors").rename(bench.adapter / "adapter_model.bin")
    return ["build", bench.recipe()]


def pickle_by_another_name(bench: Bench) -> list[str]:
    (bench.base / "model.safetensors").write_bytes(b"\x80\x04\x95" + os.urandom(500))
    return ["build", bench.recipe()]


def truncated_weights(bench: Bench) -> list[str]:
    path = bench.base / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    return ["build", bench.recipe()]


def missing_shard(bench: Bench) -> list[str]:
    bench.rewrite_base(shards=3)
    (bench.base / "model-00003-of-00003.safetensors").unlink()
    return ["build", bench.recipe()]


def wrong_shape(bench: Bench) -> list[str]:
    tensors = pico.weights(pico.LLAMA, "F16")
    tensors["model.layers.1.mlp.up_proj.weight"] = pico.ramp((512, 128), 1).astype(np.float16)
    bench.rewrite_base(tensors=tensors)
    return ["build", bench.recipe()]


def missing_tensor(bench: Bench) -> list[str]:
    tensors = pico.weights(pico.LLAMA, "F16")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    bench.rewrite_base(tensors=tensors)
    return ["build", bench.recipe()]


def foreign_tensor(bench: Bench) -> list[str]:
    tensors = pico.weights(pico.LLAMA, "F16")
    tensors["model.layers.0.self_attn.q_norm.weight"] = pico.ramp((64,), 1).astype(np.float16)
    bench.rewrite_base(tensors=tensors)
    return ["build", bench.recipe()]


def not_a_number(bench: Bench) -> list[str]:
    tensors = pico.weights(pico.LLAMA, "F16")
    tensors["model.layers.0.mlp.up_proj.weight"][7, 7] = np.nan
    bench.rewrite_base(tensors=tensors)
    return ["build", bench.recipe()]


def too_large_for_half(bench: Bench) -> list[str]:
    tensors = pico.weights(pico.LLAMA, "F32")
    tensors["model.layers.0.mlp.up_proj.weight"][7, 7] = 1e6
    bench.rewrite_base(tensors=tensors, dtype="F32")
    return ["build", bench.recipe()]


def no_tokenizer(bench: Bench) -> list[str]:
    (bench.base / "tokenizer.model").unlink()
    return ["build", bench.recipe()]


def damaged_tokenizer(bench: Bench) -> list[str]:
    (bench.base / "tokenizer.model").write_bytes(b"not a model")
    return ["build", bench.recipe()]


def token_twice(bench: Bench) -> list[str]:
    shape = pico.with_rows(pico.LLAMA, 321)
    bench.rewrite_base(shape=shape, config=shape.config())
    (bench.base / "added_tokens.json").write_text(json.dumps({"<unk>": 320}))
    return ["build", bench.recipe()]


def no_config(bench: Bench) -> list[str]:
    (bench.base / "config.json").unlink()
    return ["build", bench.recipe()]


def another_family(bench: Bench) -> list[str]:
    config = pico.LLAMA.config(architectures=["FalconForCausalLM"])
    (bench.base / "config.json").write_text(json.dumps(config))
    return ["build", bench.recipe()]


def code_of_its_own(bench: Bench) -> list[str]:
    config = pico.LLAMA.config(auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (bench.base / "config.json").write_text(json.dumps(config))
    return ["build", bench.recipe()]


def adapter_of_another_model(bench: Bench) -> list[str]:
    shape = pico.Pico(layers=3)
    pico.write_adapter(bench.adapter, shape)
    return ["build", bench.recipe()]


def dora_adapter(bench: Bench) -> list[str]:
    pico.write_adapter(bench.adapter, config=pico.adapter_config(use_dora=True))
    return ["build", bench.recipe()]


def adapter_without_config(bench: Bench) -> list[str]:
    (bench.adapter / "adapter_config.json").unlink()
    return ["build", bench.recipe()]


def departs_from_strict(bench: Bench) -> list[str]:
    text = (
        "strict = true\n[expects.adapter]\nr = 16\nalpha = 16.0\ndropout = 0.1\n"
        'targets = ["q_proj", "v_proj"]'
    )
    return ["build", bench.recipe(text)]


def target_exists(bench: Bench) -> list[str]:
    (bench.folder / "out").mkdir()
    return ["build", bench.recipe(), "--out", "out"]


def force_on_what_is_no_pack(bench: Bench) -> list[str]:
    (bench.folder / "out").mkdir()
    (bench.folder / "out" / "thesis.txt").write_text("years of work")
    return ["build", bench.recipe(), "--out", "out", "--force"]


def target_below_a_file(bench: Bench) -> list[str]:
    (bench.folder / "file").write_text("x")
    return ["build", bench.recipe(), "--out", "file/out"]


def importance_needed(bench: Bench) -> list[str]:
    return ["build", bench.recipe(), "--quant", "iq2_xxs"]


def importance_damaged(bench: Bench) -> list[str]:
    (bench.folder / "im.gguf").write_bytes(b"GGUF" + bytes(40))
    return ["build", bench.recipe(), "--imatrix", "im.gguf"]


def importance_of_another_model(bench: Bench) -> list[str]:
    weights = importance(pico.Pico(width=512))
    write_importance(bench.folder / "im.gguf", weights)
    return ["build", bench.recipe(), "--quant", "q4_k_m", "--imatrix", "im.gguf"]


def hub_while_offline(bench: Bench) -> list[str]:
    return ["build", bench.recipe(), "--base", "org/not-cached"]


def file_that_is_no_gguf(bench: Bench) -> list[str]:
    return ["inspect", str(bench.base / "config.json")]


def folder_that_is_no_pack(bench: Bench) -> list[str]:
    return ["inspect", str(bench.base)]


CASES: list[tuple[Callable[[Bench], list[str]], int, str]] = [
    (unknown_recipe, 2, "'8b'"),
    (unknown_quant, 2, "q4_k_n"),
    (quant_twice, 2, "Q4_K_M twice"),
    (unknown_style, 2, "nota-clinica"),
    (merged_and_adapter, 2, "--merged"),
    (base_alone, 2, "--adapter"),
    (no_base_stated, 2, "--base"),
    (source_of_no_form, 2, "a/b/c/d"),
    (no_threads, 2, "--threads"),
    (missing_recipe_file, 1, "mine.toml"),
    (recipe_not_toml, 1, "TOML"),
    (recipe_with_unknown_key, 1, "qant"),
    (recipe_with_unknown_parameter, 1, "num_ctxx"),
    (no_weights, 1, "model.safetensors"),
    (pickled_weights, 1, "pytorch_model.bin"),
    (pickled_adapter, 1, "adapter_model.bin"),
    (pickle_by_another_name, 1, "pickle"),
    (truncated_weights, 1, "model.safetensors"),
    (missing_shard, 1, "model-00003-of-00003"),
    (wrong_shape, 1, "model.layers.1.mlp.up_proj.weight"),
    (missing_tensor, 1, "model.layers.1.mlp.up_proj.weight"),
    (foreign_tensor, 1, "q_norm"),
    (not_a_number, 1, "model.layers.0.mlp.up_proj.weight"),
    (too_large_for_half, 1, "1e+06"),
    (no_tokenizer, 1, "tokenizer.model"),
    (damaged_tokenizer, 1, "tokenizer.model"),
    (token_twice, 1, "<unk>"),
    (no_config, 1, "config.json"),
    (another_family, 1, "FalconForCausalLM"),
    (code_of_its_own, 1, "auto_map"),
    (adapter_of_another_model, 1, "model.layers.2.self_attn"),
    (dora_adapter, 1, "DoRA"),
    (adapter_without_config, 1, "adapter_config.json"),
    (departs_from_strict, 1, "r 8, the recipe expects 16"),
    (target_exists, 1, "'out' exists"),
    (force_on_what_is_no_pack, 1, "not a pack"),
    (target_below_a_file, 1, "file/out"),
    (importance_needed, 1, "importance matrix"),
    (importance_damaged, 1, "im.gguf"),
    (importance_of_another_model, 1, "another model"),
    (hub_while_offline, 1, "org/not-cached"),
    (file_that_is_no_gguf, 1, "config.json"),
    (folder_that_is_no_pack, 1, "pack.json"),
]


@pytest.mark.parametrize(("spoil", "code", "says"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_bad_input_gives_a_clear_line_and_leaves_nothing(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Bench], list[str]],
    code: int,
    says: str,
) -> None:
    arguments = spoil(bench)
    if arguments[0] == "build" and "--out" not in arguments:
        arguments += ["--out", "out"]
    before = listing(bench.folder)
    got, out, err = run(arguments, capsys)
    assert got == code, err
    assert says in err
    assert "Traceback" not in err
    assert out == ""
    if code == 1:
        lines = err.strip().splitlines()
        assert all(line.startswith("error: ") for line in lines), err
    assert listing(bench.folder) == before


def test_all_problems_are_reported_at_once(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = pico.weights(pico.LLAMA, "F16")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    bench.rewrite_base(tensors=tensors)
    (bench.base / "tokenizer.model").unlink()
    (bench.folder / "out").mkdir()
    code, _, err = run(["build", bench.recipe(), "--out", "out"], capsys)
    assert code == 1
    for thing in ("up_proj", "model.norm", "tokenizer.model", "'out' exists"):
        assert thing in err


def test_full_disk_is_named_before_the_work_starts(bench: Bench) -> None:
    """A limit on the size of files stands for a disk that is too small."""
    before = listing(bench.folder)
    recipe = bench.recipe()
    before |= listing(bench.folder)
    done = subprocess.run(
        [sys.executable, "-m", "medllm_pack", "build", recipe, "--quant", "f16", "--out", "out"],
        cwd=bench.folder, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(bench.folder) == before


def test_small_disk_is_refused_by_the_plan(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medllm_pack.files.disk_free", lambda path: 1_000_000)
    code, _, err = run(["build", bench.recipe(), "--out", "out"], capsys)
    assert code == 1
    assert "0.00 GB free" in err
    assert not (bench.folder / "out").exists()


def test_no_pickle_is_ever_opened(bench: Bench) -> None:
    """A live pickle under every name that is read: its code must never run."""
    import pickle

    class Canary:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(bench.folder / "fired"),)

    payload = pickle.dumps(Canary())
    recipe = bench.recipe()
    for place in (bench.base / "model.safetensors", bench.base / "tokenizer.model",
                  bench.base / "config.json", bench.base / "tokenizer_config.json",
                  bench.adapter / "adapter_model.safetensors",
                  bench.adapter / "adapter_config.json"):  # fmt: skip
        sound = place.read_bytes()
        place.write_bytes(payload)
        done = subprocess.run(
            [sys.executable, "-m", "medllm_pack", "build", recipe, "--out", "out"],
            cwd=bench.folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1, place
        assert "Traceback" not in done.stderr
        place.write_bytes(sound)
    assert not (bench.folder / "fired").exists()


def test_traceback_changes_neither_line_nor_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["inspect", str(tmp_path / "missing.gguf")]
    code, _, plain = run(command, capsys)
    monkeypatch.setenv("MEDLLM_DEBUG", "1")
    code_with, _, traced = run(command, capsys)
    assert code_with == code == 1
    assert traced.startswith("Traceback")
    assert traced.endswith(plain)
