"""The wheel: everything it needs is inside it, away from the source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as the wheel installs it, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, *arguments: str, cwd: Path, **more: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"} | more
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_package_is_the_wheels(site: Path, tmp_path: Path) -> None:
    code = "import medllm_pack; print(medllm_pack.__file__)"
    assert run(site, "-c", code, cwd=tmp_path).startswith(str(site))


def test_recipes_mixes_and_styles_are_inside(site: Path, tmp_path: Path) -> None:
    out = run(site, "-m", "medllm_pack", "recipes", "list", "--json", cwd=tmp_path)
    assert sorted(json.loads(out)) == ["7b", "mistral-7b", "tiny"]
    for name in ("7b", "mistral-7b", "tiny"):
        checked = run(site, "-m", "medllm_pack", "recipes", "check", name, cwd=tmp_path)
        assert checked == "no problems\n"


def test_tiny_builds_from_the_wheel_alone(site: Path, tmp_path: Path) -> None:
    build = ["-m", "medllm_pack", "build", "tiny", "--json"]
    out = run(site, *build, cwd=tmp_path, MEDLLM_KERNELS="ggml")  # the others compile for 10 s
    pack = json.loads(out)["pack"]
    assert [v["quant"] for v in pack["variants"]] == ["f16", "q8_0", "q4_k_m"]
    assert pack["adapter"]["tensors"] == 64
    assert pack["deviations"] == []
    assert pack["license"]["missing"] == []
    assert (tmp_path / "dist" / "tiny" / "Modelfile.q4_k_m").exists()


def test_kernel_compiles_from_the_wheel_alone(site: Path, tmp_path: Path) -> None:
    code = (
        "import numpy as np; from medllm_pack.quant import kernels\n"
        "print(len(kernels.quantize(np.ones((1, 64), np.float32), 'Q4_0').tobytes()))\n"
        "print(kernels._kernel('Q4_0', False).stats.cache_misses)"
    )
    size, compiled = run(site, "-c", code, cwd=tmp_path).splitlines()
    assert size == "36"
    assert compiled != "{}"
