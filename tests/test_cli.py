"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

import medllm_pack
from medllm_pack.gguf import llama
from medllm_pack.gguf.layout import Entry, lay_out
from medllm_pack.gguf.vocab import read_vocabulary
from tests import pico
from tests.test_bad_input import run

HEAVY = ("numpy", "gguf", "pydantic", "sentencepiece", "huggingface_hub", "torch", "llama_cpp")


def test_help_imports_nothing_heavy() -> None:
    """What makes --help answer at once."""
    code = (
        "import sys; sys.argv = ['medllm-pack', '--help']\n"
        "from medllm_pack.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "build" in done.stdout
    assert done.stderr.strip() == "[]"


def test_build_imports_neither_torch_nor_transformers(
    llama_folder: Path, llama_adapter: Path
) -> None:
    code = (
        "import sys; sys.argv = ['medllm-pack', 'build', '7b', '--base', sys.argv[1], "
        "'--adapter', sys.argv[2], '--out', 'p', '--quant', 'f16', '--quiet']\n"
        "from medllm_pack.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "names = ('torch', 'transformers', 'peft', 'huggingface_hub', 'llama_cpp', 'pickle5')\n"
        "print([m for m in names if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama_folder), str(llama_adapter)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.strip() == "[]"


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["--version"], capsys)
    assert (code, out) == (0, f"medllm-pack {medllm_pack.__version__}\n")


def test_plan_promises_what_build_writes(
    capsys: pytest.CaptureFixture[str], llama_folder: Path, llama_adapter: Path
) -> None:
    sources = ["--base", str(llama_folder), "--adapter", str(llama_adapter), "--out", "p", "--json"]
    code, out, err = run(["plan", "7b", "--quant", "f16,q4_k_m,iq4_xs", *sources], capsys)
    assert (code, err) == (0, "")
    planned = json.loads(out)
    assert not Path("p").exists()
    code, out, err = run(["build", "7b", "--quant", "f16,q4_k_m,iq4_xs", *sources], capsys)
    assert (code, err) == (0, "")
    built = json.loads(out)["pack"]
    assert planned["name"] == built["name"] == "Clinical-BR-LlaMA-2-7B-custom"
    for promised, written in zip(planned["variants"], built["variants"], strict=True):
        assert promised["size"] == written["size"] == Path("p", written["file"]).stat().st_size
        assert promised["types"] == written["types"]
    assert planned["write_bytes"] == sum(v["size"] for v in built["variants"])
    assert planned["read_bytes"] == (llama_folder / "model.safetensors").stat().st_size
    assert (
        planned["license"]["missing"]
        == built["license"]["missing"]
        == (["LICENSE", "USE_POLICY.md"])
    )


def test_departures_from_the_recipe_are_said_recorded_and_named(
    capsys: pytest.CaptureFixture[str], llama_folder: Path, llama_adapter: Path
) -> None:
    arguments = ["--base", str(llama_folder), "--adapter", str(llama_adapter), "--out", "p"]
    code, _, err = run(["build", "7b", "--quant", "f16", *arguments], capsys)
    assert code == 0
    assert "note: the base has layers 2, the recipe expects 32" in err
    document = json.loads(Path("p/pack.json").read_text(encoding="utf-8"))
    assert "the base has layers 2, the recipe expects 32" in document["deviations"]
    assert Path("p/Clinical-BR-LlaMA-2-7B-custom-F16.gguf").exists()
    assert "departs from the published model" in Path("p/README.md").read_text(encoding="utf-8")


def test_licence_texts_of_the_base_travel_with_the_pack(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: bytes, llama_adapter: Path
) -> None:
    base = pico.write_model(tmp_path / "base", tokenizer=tokenizer)
    (base / "LICENSE.txt").write_text("LLAMA 2 COMMUNITY LICENSE\n“Agreement” means…\n")
    (base / "USE_POLICY.md").write_text("# Policy\u00a0of use\n")
    arguments = ["--base", str(base), "--adapter", str(llama_adapter), "--out", "p"]
    code, _, err = run(["build", "7b", "--quant", "f16", *arguments], capsys)
    assert code == 0
    assert Path("p/LICENSE").read_bytes() == (base / "LICENSE.txt").read_bytes()
    assert Path("p/USE_POLICY.md").read_bytes() == (base / "USE_POLICY.md").read_bytes()
    assert Path("p/NOTICE").read_text().startswith("Llama 2 is licensed under the LLAMA 2")
    modelfile = Path("p/Modelfile.f16").read_text(encoding="utf-8")
    assert "“Agreement” means…" in modelfile
    assert "\u00a0" not in modelfile  # Ollama would drop it; the file has it, and a note says so
    assert "USE_POLICY.md holds characters that Ollama would drop" in err
    assert json.loads(Path("p/pack.json").read_text())["license"]["missing"] == []


def test_missing_licence_texts_are_said_loudly(
    capsys: pytest.CaptureFixture[str], llama_folder: Path, llama_adapter: Path
) -> None:
    arguments = ["--base", str(llama_folder), "--adapter", str(llama_adapter), "--out", "p"]
    code, _, err = run(["build", "7b", "--quant", "f16", *arguments], capsys)
    assert code == 0
    assert "note: LICENSE is missing" in err
    assert "Not to be published as it is" in Path("p/README.md").read_text(encoding="utf-8")


def test_force_replaces_a_pack(capsys: pytest.CaptureFixture[str], llama_folder: Path) -> None:
    arguments = ["build", "7b", "--merged", str(llama_folder), "--out", "p", "--quiet", "--quant"]
    assert run([*arguments, "f16"], capsys)[0] == 0
    assert run([*arguments, "q8_0"], capsys)[0] == 1
    assert run([*arguments, "q8_0", "--force"], capsys)[0] == 0
    assert sorted(p.suffix for p in Path("p").glob("*.gguf")) == [".gguf"]
    assert not list(Path().glob(".p*"))


def test_quiet_says_nothing_but_the_result(
    capsys: pytest.CaptureFixture[str], llama_folder: Path
) -> None:
    arguments = ["--merged", str(llama_folder), "--out", "p", "--quiet", "--quant", "f16"]
    code, out, err = run(["build", "7b", *arguments], capsys)
    assert (code, err) == (0, "")
    assert "ollama create clinical-br:7b -f p/Modelfile.f16" in out


def test_inspect_shows_a_pack_and_a_file(
    capsys: pytest.CaptureFixture[str], llama_folder: Path
) -> None:
    run(["build", "7b", "--merged", str(llama_folder), "--out", "p", "--quant", "q4_k_m"], capsys)
    code, out, _ = run(["inspect", "p"], capsys)
    assert code == 0
    assert "q4_k_m" in out
    assert "not checked" in out
    code, out, _ = run(["inspect", "p", "--verbose"], capsys)
    assert "TEMPLATE" in out
    file = next(Path("p").glob("*.gguf"))
    code, out, _ = run(["inspect", str(file)], capsys)
    assert out.startswith("llama · 1.48M · Q4_K_M · ")
    code, out, _ = run(["inspect", str(file), "--json"], capsys)
    document = json.loads(out)
    assert document["types"] == {"F32": 5, "Q4_K": 13, "Q6_K": 3}
    assert document["metadata"]["tokenizer.ggml.tokens"] == {"items": 320}
    code, out, _ = run(["inspect", str(file), "--verbose"], capsys)
    assert "blk.1.ffn_down.weight" in out


def test_foreign_text_does_not_drive_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    entries = [
        Entry("general.architecture", GGUFValueType.STRING, "llama"),
        Entry("general.name", GGUFValueType.STRING, "x\x1b[2J\u202eevil\x07"),
    ]
    layout = lay_out(entries, [("a.weight", (1, 32), "F16")], file_type=1)
    (tmp_path / "x.gguf").write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    _, out, _ = run(["inspect", "x.gguf"], capsys)
    assert "\\x1b[2J" in out
    assert not {"\x1b", "\u202e", "\x07"} & set(out)


# Both published models, as their pages show them.
PUBLISHED: list[tuple[pico.Pico, dict[str, Any], str, dict[str, Any]]] = [
    (
        pico.Pico(32, 4096, 11008, 32, 32, 128, 32000),
        {"max_position_embeddings": 4096},
        "llama · 6.74B · F16 · 13 GB",
        {"context_length": 4096, "feed_forward_length": 11008, "attention.head_count_kv": 32},
    ),
    (
        pico.Pico(32, 4096, 14336, 32, 8, 128, 32000, architecture="MistralForCausalLM"),
        {"max_position_embeddings": 32768, "sliding_window": None},
        "llama · 7.24B · F16 · 14 GB",
        {"context_length": 32768, "feed_forward_length": 14336, "attention.head_count_kv": 8},
    ),
]


@pytest.mark.parametrize(
    ("shape", "changes", "summary", "keys"), PUBLISHED, ids=["llama", "mistral"]
)
def test_inspect_shows_what_the_published_pages_show(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: bytes,
    shape: pico.Pico, changes: dict[str, Any], summary: str, keys: dict[str, Any],
) -> None:  # fmt: skip
    """A file of the real size: header as planned, weights as a hole."""
    config = llama.parse_config(shape.config(**changes))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer)
    vocabulary = read_vocabulary({"tokenizer.model": tmp_path / "tokenizer.model"}, rows=32000)
    layout = lay_out(
        [Entry("general.architecture", GGUFValueType.STRING, "llama"),
         *llama.metadata(config), *vocabulary.metadata()],
        [(t.name, t.shape, "F16" if len(t.shape) > 1 else "F32") for t in llama.tensors(config)],
        file_type=1,
    )  # fmt: skip
    (tmp_path / "x.gguf").write_bytes(layout.header)
    os.truncate(tmp_path / "x.gguf", layout.size)
    code, out, _ = run(["inspect", "x.gguf", "--json"], capsys)
    document = json.loads(out)
    assert (code, document["summary"]) == (0, summary)
    expected = {
        "block_count": 32, "embedding_length": 4096, "attention.head_count": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 128, "rope.freq_base": 10000.0, "vocab_size": 32000,
    } | keys  # fmt: skip
    metadata = document["metadata"]
    assert {f"llama.{key}": value for key, value in expected.items()}.items() <= metadata.items()
    tokenizer_keys = {
        "model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2,
        "unknown_token_id": 0, "add_bos_token": True, "add_eos_token": False,
    }  # fmt: skip
    assert {f"tokenizer.ggml.{k}": v for k, v in tokenizer_keys.items()}.items() <= metadata.items()


def test_recipes_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["recipes", "list"], capsys)
    assert code == 0
    assert "mistral-7b" in out
    assert run(["recipes", "copy", "7b", "mine.toml"], capsys)[0] == 0
    assert run(["recipes", "copy", "7b", "mine.toml"], capsys)[0] == 1
    assert run(["recipes", "check", "mine.toml"], capsys)[1] == "no problems\n"
    Path("mine.toml").write_text('name = "x y"')
    code, out, _ = run(["recipes", "check", "mine.toml"], capsys)
    assert code == 3
    assert "mine.toml: variants" in out
    code, out, _ = run(["recipes", "show", "tiny", "--json"], capsys)
    assert json.loads(out)["name"] == "medllm-tiny"


def test_plan_names_the_70b_like_any_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: bytes
) -> None:
    """Planning a hub model needs its configuration and tokenizer, not its weights."""
    shape = replace(pico.LLAMA, layers=80, heads=8, kv_heads=1, head_dim=32, ff=256)
    base = pico.write_model(tmp_path / "base", shape, tokenizer=tokenizer)
    arguments = ["--merged", str(base), "--quant", "q3_k_m", "--json", "--out", "p"]
    code, out, _ = run(["plan", "7b", *arguments], capsys)
    assert code == 0
    assert json.loads(out)["variants"][0]["types"]["Q5_K"] > 1


@pytest.mark.parametrize(
    "command", [["parity"], ["install"], ["inspect"], ["publish", "oci://x.example/a/b"]]
)
def test_folder_that_is_no_pack_is_named(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "leer").mkdir()
    code, out, error = run([command[0], "leer", *command[1:]], capsys)
    assert (code, out) == (1, "")
    assert "'leer' is no pack: it holds no pack.json" in error


def commands() -> dict[str, Any]:
    import typer

    from medllm_pack.cli.commands import app

    root: Any = typer.main.get_command(app)
    below = root.commands["recipes"].commands
    own = {name: command for name, command in root.commands.items() if name != "recipes"}
    return own | {f"recipes {name}": command for name, command in below.items()}


@pytest.mark.parametrize("name", commands())
def test_every_command_explains_its_options_and_knows_json(name: str) -> None:
    options = {option.name: option for option in commands()[name].params}
    assert [key for key, option in options.items() if not option.help] == []
    assert "json" in options
