"""verify --rebuild: the same inputs give the same digests, and other inputs do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import pico
from tests import pico_packs as packs
from tests.test_bad_input import run


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, llama_adapter: Path) -> Path:
    root = tmp_path_factory.mktemp("rebuild")
    recipe = packs.write_recipe(root / "recipe", llama_folder, role="base")
    text = recipe.read_text().replace(
        "[license]", f'[adapter]\nsource = "{llama_adapter}"\n\n[license]', 1
    )
    recipe.write_text(text)
    built = packs.make(root / "pack", recipe)
    packs.give_parity(built)  # added after the build, as parity does
    from medllm_pack.pack import papers

    papers.update(built, packs.document(built), {})
    return built


def rebuilt(
    capsys: pytest.CaptureFixture[str], pack: Path, *options: str | Path
) -> tuple[int, str]:
    code, out, err = run(["verify", str(pack), "--rebuild", "-q", *map(str, options)], capsys)
    assert list(pack.parent.glob(".*rebuilt*")) == []
    return code, out + err


def test_a_rebuild_from_folders_gives_the_same_digests(
    pack: Path, llama_folder: Path, llama_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--base", llama_folder, "--adapter", llama_adapter, "--threads", "1")
    code, said = rebuilt(capsys, pack, *options)
    assert (code, "rebuild    yes" in said) == (0, True), said


def test_tiny_is_rebuilt_without_any_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", "tiny", "--quant", "q4_k_m", "--out", "tiny", "-q"], capsys)[0] == 0
    code, said = rebuilt(capsys, tmp_path / "tiny")
    assert (code, "the same digests" in said) == (0, True)


def test_another_adapter_is_a_no(
    pack: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {k: v * 2 for k, v in pico.adapter_tensors(pico.LLAMA).items()}
    other = pico.write_adapter(tmp_path / "other", tensors=tensors)
    code, said = rebuilt(capsys, pack, "--base", llama_folder, "--adapter", other)
    assert code == 3
    assert "'adapter_model.safetensors' (adapter) is not the file" in said
    assert "verified" not in said


def test_folders_must_be_named(
    pack: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = rebuilt(capsys, pack, "--base", llama_folder)
    assert (code, "--adapter DIR" in said) == (2, True)
    code, said = rebuilt(capsys, pack, "--merged", llama_folder)
    assert code == 2


def test_inputs_without_rebuild_are_wrong_usage(
    pack: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["verify", str(pack), "--base", str(llama_folder)], capsys)
    assert (code, "--rebuild" in err) == (2, True)


def test_a_changed_recipe_is_a_no(
    pack: Path,
    llama_folder: Path,
    llama_adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = packs.write_recipe(tmp_path / "r", llama_folder, name="Other", role="base")
    code, said = rebuilt(
        capsys, pack, "--base", llama_folder, "--adapter", llama_adapter, "--recipe", recipe
    )
    assert code == 3
    assert "rebuild    NO" in said
