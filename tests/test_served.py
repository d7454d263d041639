"""Rung *served*, against loopback servers that answer as Ollama does, with llama.cpp."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from medllm_pack import resources
from medllm_pack.errors import ServerError
from medllm_pack.limits import Limits
from medllm_pack.ollama.modelfile import Modelfile
from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.parity import worker
from medllm_pack.parity.checks import Check
from medllm_pack.parity.llamacpp import Model
from medllm_pack.parity.original import Original, Sources
from medllm_pack.parity.prompts import read_beside
from medllm_pack.parity.report.details import translate
from medllm_pack.parity.served import check_served, compare_texts, find_served
from medllm_pack.parity.tokens import Tokenizer
from medllm_pack.progress import Silent
from medllm_pack.recipe import load_recipe, recipe_path
from tests import pico
from tests.fake_ollama import Counts, Ollama, serving
from tests.test_build import run, variant
from tests.test_parity import invoke
from tests.test_server import Answer, Serve, serve  # noqa: F401, a fixture

BEHIND = "{{ .Prompt }}{{ .Response }}"
TINY = resources.folder("examples/tiny/base")
TOKENIZER = Tokenizer(Original({path.name: path for path in TINY.iterdir()}, None))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of the tiny model, which has something to say: random weights know only ties."""
    path = recipe_path("tiny")
    request = Request(
        recipe=load_recipe(path), folder=path.parent, out=tmp_path_factory.mktemp("p") / "tiny",
        variants=("q8_0",),
    )  # fmt: skip
    return build(make_plan(request, report=Silent()), threads=2).folder


class Fake:
    """Answers of a server that holds the pack's variant and runs it with llama.cpp."""

    def __init__(
        self, pack: Path, *, digest: str = "", instead: str = "", status: int = 200
    ) -> None:
        entry = json.loads((pack / "pack.json").read_text(encoding="utf-8"))["variants"][0]
        self.model, self.instead, self.status = pack / entry["file"], instead, status
        self.digest = digest or entry["sha256"]
        self.asked: list[dict[str, Any]] = []

    def __call__(self, path: str, question: Any) -> Answer:
        if path == "/api/version":
            return 200, b'{"version": "0.12.3"}'
        if path == "/api/show":
            text = f'# Modelfile\nFROM /var/blobs/sha256-{self.digest}\nTEMPLATE "{BEHIND}"\n'
            return 200, json.dumps({"modelfile": text}).encode()
        assert path == "/api/generate"
        self.asked.append(question)
        if self.status != 200:
            return self.status, b'{"error": "llama runner process has terminated"}'
        # The style's template adds nothing, so that raw and rendered prompts are the same.
        prompt, tokens = self.instead or question["prompt"], question["options"]["num_predict"]
        with Model(self.model, threads=1) as model:
            text = model.write(prompt, tokens=tokens)
        return 200, json.dumps({"response": text, "done": True}).encode()


def check(pack: Path, serve: Serve, fake: Fake) -> list[Check]:  # noqa: F811
    server = replace(serve(fake), timeout=120)
    served = find_served(server, "clinica:7b", {"q8_0": fake.digest})
    entry = json.loads((pack / "pack.json").read_text(encoding="utf-8"))["variants"][0]

    def write(prompts: Sequence[str], tokens: int) -> dict[str, Any]:
        return worker.call(
            "write", model=str(pack / entry["file"]), prompts=list(prompts), tokens=tokens,
            threads=1, gpu_layers=0,
        )  # fmt: skip

    modelfile: Modelfile = read_beside(pack, entry)
    return check_served(served, "q8_0", modelfile, TOKENIZER, write, Limits())


def test_server_that_runs_the_file_passes(pack: Path, serve: Serve) -> None:  # noqa: F811
    fake = Fake(pack)
    checks = check(pack, serve, fake)
    assert [(c.name, c.passed, c.measured) for c in checks] == [
        ("served.tokens", None, None),  # this one does not count
        ("served.raw", True, 1.0),
        ("served.template", True, 1.0),
    ]
    assert [q["raw"] for q in fake.asked] == [True] * 16 + [False] * 16
    options = fake.asked[0]["options"]
    assert options["temperature"] == 0
    assert options["repeat_penalty"] == 1
    assert options["stop"] == []


def test_server_that_reads_another_prompt_is_caught(pack: Path, serve: Serve) -> None:  # noqa: F811
    checks = check(pack, serve, Fake(pack, instead="O gato dorme"))
    assert [c.passed for c in checks] == [None, False, False]


def test_what_follows_a_near_tie_is_not_counted() -> None:
    ours, margins = ["a", "ab", "abc", "abcd"], [1.0, 0.1, 2.0, 1.0]
    assert compare_texts("abcd", ours, margins, 0.35) == (4, 0)
    assert compare_texts("axyz", ours, margins, 0.35) == (1, 0)
    assert compare_texts("abyz", ours, margins, 0.35) == (2, 2)
    assert compare_texts("", ours, margins, 0.35) == (0, 4)


def test_blank_alone_may_be_where_a_word_of_the_server_begins() -> None:
    ours, margins = ["em", "em ", "em 1", "em 19"], [1.0, 0.1, 2.0, 1.0]
    assert compare_texts("em MID", ours, margins, 0.35) == (1, 0)
    assert compare_texts("em MID", ours, [1.0, 1.0, 2.0, 1.0], 0.35) == (1, 3)
    assert compare_texts("em 2", ours, [1.0, 1.0, 0.1, 1.0], 0.35) == (1, 0)
    assert compare_texts("MID", [" ", " 1"], [0.1, 2.0], 0.35) == (0, 0)
    assert compare_texts(" MID", [" ", " 1"], [2.0, 2.0], 0.35) == (0, 2)


def test_server_that_fails_is_a_finding_with_its_reason(
    pack: Path, serve: Serve  # noqa: F811
) -> None:  # fmt: skip
    checks = check(pack, serve, Fake(pack, status=500))
    assert [c.passed for c in checks] == [None, False, False]
    assert "500: 'llama runner process has terminated'" in checks[1].detail


def test_other_weights_on_the_server_are_said_instead_anything(
    pack: Path, serve: Serve  # noqa: F811
) -> None:  # fmt: skip
    with pytest.raises(ServerError, match=r"sha256:0{12}…, which are none of this pack's"):
        find_served(serve(Fake(pack, digest="0" * 64)), "m", {"q8_0": "1" * 64})
    with pytest.raises(ServerError, match="does not say what 'm' holds"):
        find_served(serve(lambda *_: (200, b'{"version": "1"}')), "m", {"q8_0": "1" * 64})


# --- how many tokens it reads, through the command


@pytest.fixture(scope="module")
def pico_pack(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> tuple[Path, Sources]:
    folder = tmp_path_factory.mktemp("pico")
    base = pico.write_model(folder / "base", tokenizer=tokenizer)
    adapter = pico.write_adapter(folder / "adapter")
    run(folder / "pack", quants=["f16"], base=base, adapter=adapter)
    return folder / "pack", Sources(str(base), str(adapter))


def hold(server: Ollama, weights: Path, template: str) -> Path:
    """Let a server hold a model, as `ollama create` does; return where its weights are."""
    digest = "sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest()
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        client.post(f"/api/blobs/{digest}", content=weights.read_bytes()).raise_for_status()
        question = {"model": "m:1", "files": {weights.name: digest}, "template": template}
        client.post("/api/create", json=question).raise_for_status()
    return server.blob(digest)


@pytest.mark.parametrize(
    ("template", "counts", "code", "verdict", "detail"),
    [
        (BEHIND, "all", 0, True, "of 32 prompts the server reads as many tokens as"),
        (
            f"<s>{BEHIND}",
            "all",
            3,
            False,
            "16 have another number .*; one more each time, as with a",
        ),
        (f"Nota: {BEHIND}", "all", 3, False, "of 32 prompts 16 have another number of tokens than"),
        (BEHIND, "new", 0, None, "does not say how many tokens it reads in all"),
        (BEHIND, "nothing", 0, None, "does not say how many tokens it reads in all"),
    ],
)
def test_tokens_of_a_prompt_at_the_server_are_those_of_the_tokenizer(
    pico_pack: tuple[Path, Sources],
    tmp_path: Path,
    template: str,
    counts: Counts,
    code: int,
    verdict: bool | None,
    detail: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack, inputs = pico_pack
    monkeypatch.setenv("MEDLLM_CACHE", str(pack.parent / "cache"))
    with serving(tmp_path / "store", counts=counts) as server:
        hold(server, variant(pack, "F16"), template)
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        ended = invoke(pack, inputs, "--ollama=m:1", "--ctx=64")
    assert getattr(ended.exception, "exit_code", ended.exit_code) == code, ended.output
    (found,) = json.loads((pack / "parity.json").read_text())["variants"]
    checks = {check["name"]: check for check in found["checks"]}
    tokens = checks["served.tokens"]
    assert tokens["passed"] is verdict
    assert re.search(detail, tokens["detail"])
    assert found["failed"] == (None if code == 0 else "served.tokens")
    for check in checks.values():
        assert not [part for part in translate(check["detail"], str) if part.foreign]


# --- which model it runs


def build_tiny(out: Path, *, adapter: bool) -> Path:
    """Build a coarse variant of the tiny model, or of its base; return the file."""
    path = recipe_path("tiny")
    recipe = load_recipe(path)
    if not adapter:
        recipe = recipe.model_copy(update={"base": None, "adapter": None, "merged": recipe.base})
    built = build(make_plan(Request(recipe, path.parent, out, ("q2_k",)), report=Silent()))
    return built.folder / str(built.manifest["variants"][0]["file"])


@pytest.mark.parametrize(("adapter", "code"), [(True, 0), (False, 3)])
def test_server_that_runs_the_base_model_is_caught_in_the_coarsest_variant(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    adapter: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = build_tiny(tmp_path / "pack", adapter=True)
    run_instead = weights if adapter else build_tiny(tmp_path / "base", adapter=False)
    monkeypatch.setenv("MEDLLM_CACHE", str(tmp_path_factory.getbasetemp() / "kept"))
    with serving(tmp_path / "store") as server:
        hold(server, weights, BEHIND).write_bytes(run_instead.read_bytes())
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        sources = Sources(str(TINY), str(TINY.parent / "adapter"))
        ended = invoke(tmp_path / "pack", sources, "--ollama=m:1", "--ctx=64")
    assert getattr(ended.exception, "exit_code", ended.exit_code) == code, ended.output
    (found,) = json.loads((tmp_path / "pack" / "parity.json").read_text())["variants"]
    assert found["failed"] == (None if adapter else "served.raw")
