"""The gate: what is not whole, not proven or not allowed is not published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from medllm_pack.errors import GateError, MedllmError, SourceError, UsageError
from medllm_pack.pack.shape import read_pack
from medllm_pack.progress import Silent
from medllm_pack.publish import gate, licences
from medllm_pack.publish.verify import verify_pack
from tests import pico
from tests import pico_packs as packs
from tests.test_image import HOSTILE


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A pack under a licence that asks for nothing."""
    root = tmp_path_factory.mktemp("gate")
    return packs.make(root / "pack", packs.write_recipe(root / "recipe", llama_folder))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Path:
    """A pack of a LLaMA 2 derivative with all its papers."""
    root = tmp_path_factory.mktemp("llama2")
    model = pico.write_model(root / "m", pico.LLAMA, tokenizer=tokenizer)
    for name, text in packs.LLAMA2_TEXTS.items():
        (model / name).write_text(text, encoding="utf-8")
    recipe = packs.write_recipe(
        root / "recipe", model, license="llama2", notice=packs.LLAMA2_NOTICE,
        texts={"LICENSE": ["LICENSE.txt"], "USE_POLICY.md": ["USE_POLICY.md"]},
        base_model="meta-llama/Llama-2-7b-hf",
    )  # fmt: skip
    return packs.make(root / "pack", recipe, quants=("f16",))


@pytest.fixture
def proven(built: Path, tmp_path: Path) -> Path:
    """A copy of the pack whose parity passed."""
    pack = packs.copy(built, tmp_path / "pack")
    packs.give_parity(pack)
    return pack


@pytest.fixture
def licensed(llama2: Path, tmp_path: Path) -> Path:
    """A copy of the LLaMA 2 pack whose parity passed."""
    pack = packs.copy(llama2, tmp_path / "llama2")
    packs.give_parity(pack)
    return pack


def reasons(pack: Path, *accepted: str, quants: tuple[str, ...] = ()) -> str:
    """Return everything the gate says; the exit code must be that of a check that says no."""
    with pytest.raises(GateError) as caught:
        gate.check(pack, quants, accepted)
    assert caught.value.exit_code == 3
    return "\n".join(caught.value.lines())


def test_a_proven_pack_may_be_published(proven: Path) -> None:
    permit = gate.check(proven)
    assert permit.quants == ("f16", "q4_k_m")
    assert permit.publication()["parity"] == {"f16": "passed", "q4_k_m": "passed"}
    assert permit.publication()["overrides"] == []
    assert "medllm-pack.overrides" not in permit.annotations()


def test_a_llama_2_pack_with_its_papers_may_be_published(licensed: Path) -> None:
    assert gate.check(licensed).publication()["license"] == "llama2"


def test_missing_parity_is_refused_and_can_be_accepted_by_name(built: Path) -> None:
    assert "f16, q4_k_m: not compared" in reasons(built)
    assert "--accept parity-missing" in reasons(built, "parity-failed")
    permit = gate.check(built, (), ("parity-missing",))
    assert [o["name"] for o in permit.publication()["overrides"]] == ["parity-missing"]
    assert permit.annotations()["medllm-pack.overrides"] == "parity-missing"
    assert permit.annotations()["medllm-pack.parity"] == "missing"


def test_parity_of_the_chosen_variants_counts(proven: Path) -> None:
    packs.give_parity(proven, q4_k_m=False)
    assert "q4_k_m: parity says" in reasons(proven)
    assert "f16" not in reasons(proven)
    assert gate.check(proven, ("f16",)).quants == ("f16",)
    permit = gate.check(proven, (), ("parity-failed",))
    assert permit.annotations("f16")["medllm-pack.parity"] == "passed"
    assert permit.annotations("q4_k_m")["medllm-pack.parity"] == "failed"


def departure(used: float, *, looser: bool) -> dict[str, Any]:
    name = "variants.q4_k_m.kld_mean"
    return {"name": name, "shipped": 0.1, "used": used, "looser": looser}


def test_a_verdict_by_loosened_limits_is_refused_until_it_is_accepted(proven: Path) -> None:
    packs.give_parity(proven, {"q4_k_m": [departure(0.5, looser=True)]})
    said = reasons(proven, "parity-failed", "parity-missing")
    assert "q4_k_m: variants.q4_k_m.kld_mean 0.5 (looser; shipped 0.1)" in said
    assert "--accept parity-loosened" in said
    permit = gate.check(proven, (), ("parity-loosened",))
    assert [o["name"] for o in permit.publication()["overrides"]] == ["parity-loosened"]
    assert "0.5 (looser" in permit.publication()["overrides"][0]["reason"]
    assert permit.publication()["limits"]["q4_k_m"] == [departure(0.5, looser=True)]
    assert permit.annotations()["medllm-pack.overrides"] == "parity-loosened"
    [check] = [
        c for c in verify_pack(proven, key=None, report=Silent()).checks if c.name == "parity"
    ]
    assert check.passed is None
    assert "the verdict is by limits that the recipe loosened" in check.detail


def test_loosened_limits_of_another_variant_do_not_close_the_gate(proven: Path) -> None:
    packs.give_parity(proven, {"q4_k_m": [departure(0.5, looser=True)]})
    assert gate.check(proven, ("f16",)).publication()["limits"] == {"f16": []}


def test_a_stricter_limit_needs_nothing_and_is_published(proven: Path) -> None:
    packs.give_parity(proven, {"q4_k_m": [departure(0.05, looser=False)]})
    permit = gate.check(proven)
    assert permit.publication()["limits"]["q4_k_m"] == [departure(0.05, looser=False)]
    assert permit.publication()["overrides"] == []


def test_a_limit_that_is_no_limit_is_no_pack(proven: Path) -> None:
    packs.give_parity(proven, {"f16": [departure(0.5, looser=True) | {"name": "a\nb"}]})
    with pytest.raises(SourceError, match=r"is damaged at 'parity\.variants\.0\.limits\.0\.name'"):
        gate.check(proven)


@pytest.mark.parametrize("file", ["Pico-F16.gguf", "README.md", "Modelfile.f16", "pack.json"])
def test_a_changed_byte_is_refused_whatever_is_accepted(proven: Path, file: str) -> None:
    data = bytearray((proven / file).read_bytes())
    data[-2] ^= 1
    (proven / file).write_bytes(data)
    everything = ("parity-missing", "parity-failed", "licence-claim", "licence-duty:LICENSE")
    with pytest.raises(MedllmError) as caught:
        gate.check(proven, (), everything)
    assert file in str(caught.value)
    assert isinstance(caught.value, GateError | SourceError)


def test_weights_of_a_variant_that_is_not_published_are_not_read(proven: Path) -> None:
    with (proven / "Pico-Q4_K_M.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    gate.check(proven, ("f16",))
    assert "Pico-Q4_K_M.gguf has SHA-256" in reasons(proven)


def test_weights_of_a_variant_that_is_not_published_may_be_absent(proven: Path) -> None:
    (proven / "Pico-Q4_K_M.gguf").unlink()
    gate.check(proven, ("f16",))
    assert "Pico-Q4_K_M.gguf is missing" in reasons(proven)


def test_missing_and_extra_files_are_refused_together(proven: Path) -> None:
    (proven / "README.md").unlink()
    (proven / "notes.txt").write_text("mine")
    said = reasons(proven)
    assert "README.md is missing" in said
    assert "'notes.txt' is not part of the pack" in said


def test_a_link_in_place_of_a_file_is_refused(proven: Path, tmp_path: Path) -> None:
    (proven / "README.md").rename(tmp_path / "elsewhere.md")
    (proven / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert "'README.md' is not a regular file" in reasons(proven)


def test_sums_written_anew_do_not_hide_other_weights(proven: Path) -> None:
    """Who changes a file and SHA256SUMS is contradicted by pack.json."""
    with (proven / "Pico-F16.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    packs.reseal(proven)
    assert "Pico-F16.gguf: pack.json states SHA-256" in reasons(proven)


def test_sums_and_pack_json_written_anew_do_not_hide_another_header(proven: Path) -> None:
    packs.change(proven, lambda content: content["variants"][0].update(parameters=1))
    assert "pack.json states '1'" in reasons(proven)


def test_every_reason_is_said_at_once(licensed: Path) -> None:
    packs.change(licensed, lambda content: content.update(parity=None))
    (licensed / "NOTICE").write_text("All rights reserved.\n")
    (licensed / "extra").write_text("")
    said = reasons(licensed)
    for part in ("NOTICE has SHA-256", "'extra'", "parity-missing", "licence-duty:NOTICE"):
        assert part in said


@pytest.mark.parametrize("file", ["LICENSE", "NOTICE", "USE_POLICY.md"])
def test_llama_2_without_one_of_its_papers_is_refused(licensed: Path, file: str) -> None:
    (licensed / file).unlink()
    packs.change(licensed, lambda content: _lose(content, file))
    said = reasons(licensed)
    assert f"{file} is missing" in said
    permit = gate.check(licensed, (), (f"licence-duty:{file}",))
    assert permit.annotations()["medllm-pack.overrides"] == f"licence-duty:{file}"


def _lose(content: dict[str, Any], file: str) -> None:
    content["license"]["files"] = [f for f in content["license"]["files"] if f != file]


def test_another_licence_s_text_is_not_the_agreement(licensed: Path) -> None:
    (licensed / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    packs.reseal(licensed)
    assert "LICENSE does not hold it" in reasons(licensed)


def test_a_notice_that_says_something_else_is_refused(licensed: Path) -> None:
    notice = packs.LLAMA2_NOTICE.replace("All Rights Reserved", "Some Rights Reserved")
    (licensed / "NOTICE").write_text(notice)
    packs.reseal(licensed)
    assert "licence-duty:NOTICE" in reasons(licensed)
    # Line breaks and the copyright sign do not change the sentence.
    (licensed / "NOTICE").write_text(packs.LLAMA2_NOTICE.replace("(c) ", "©\n"))
    packs.reseal(licensed)
    gate.check(licensed)


def test_a_text_that_the_recipe_asks_for_and_nobody_found_is_refused(
    tmp_path: Path, llama_folder: Path
) -> None:
    recipe = packs.write_recipe(tmp_path / "r", llama_folder, texts={"LICENSE": ["LICENSE"]})
    pack = packs.make(tmp_path / "pack", recipe, quants=("f16",))
    packs.give_parity(pack)
    assert "licence-duty:LICENSE" in reasons(pack)


def test_apache_on_a_llama_2_derivative_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    """The published merged weights are tagged so; the tag cannot relicense their base."""
    recipe = packs.write_recipe(
        tmp_path / "r", llama_folder, license="apache-2.0", base_model="meta-llama/Llama-2-7b-hf"
    )
    pack = packs.make(tmp_path / "pack", recipe, quants=("f16",))
    packs.give_parity(pack)
    said = reasons(pack)
    assert "claims the licence 'apache-2.0', but it derives from Llama 2" in said
    assert "licence-duty:NOTICE" in said
    # Each duty is accepted by its own name, or not at all.
    duties = ("licence-duty:LICENSE", "licence-duty:NOTICE", "licence-duty:USE_POLICY.md")
    assert "licence-claim" in reasons(pack, *duties)
    permit = gate.check(pack, (), ("licence-claim", *duties))
    assert {o["name"] for o in permit.publication()["overrides"]} == {"licence-claim", *duties}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("meta-llama/Llama-2-7b-hf", "Llama 2"), ("pucpr-br/Clinical-BR-LlaMA-2-7B", "Llama 2"),
        ("NousResearch/llama2-13b", "Llama 2"), ("codellama/CodeLlama-7b-hf", "Llama 2"),
        ("meta-llama/Meta-Llama-3-8B", "Llama 3"), ("Llama-3-70B-Instruct", "Llama 3"),
        ("meta-llama/Llama-3.1-8B", "Llama 3.1"), ("Meta-Llama-3.1-70B", "Llama 3.1"),
        ("meta-llama/Llama-3.2-1B", "Llama 3.2"), ("nvidia/Llama-3_3-Nemotron-Super", "Llama 3.3"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama 3.3"), ("llama-3.2", "Llama 3.2"),
        ("mistralai/Mistral-7B-v0.1", None), ("openlm-research/open_llama_3b_v2", None),
        ("TinyLlama/TinyLlama-1.1B", None), ("huggyllama/llama-30b", None), ("folder", None),
        ("medllm-tiny", None), ("llama", None),
    ],
)  # fmt: skip
def test_families_are_known_by_their_names(name: str, family: str | None) -> None:
    document = {"name": "x", "recipe": {"card": {"base_model": name}}, "inputs": []}
    assert [f.name for f in licences.families(document)] == ([family] if family else [])


def test_llama_3_asks_for_a_name_and_for_words_in_the_card(
    tmp_path: Path, llama_folder: Path
) -> None:
    recipe = packs.write_recipe(
        tmp_path / "r", llama_folder, license="llama3.1", base_model="meta-llama/Llama-3.1-8B"
    )
    pack = packs.make(tmp_path / "pack", recipe, quants=("f16",))
    packs.give_parity(pack)
    said = reasons(pack)
    assert "must begin with 'Llama'" in said
    assert "'Built with Llama'" in said


def test_an_override_that_names_nothing_is_wrong_usage(proven: Path) -> None:
    for name in ("digests", "everything", "licence-duty:", ""):
        with pytest.raises(UsageError, match="names nothing that can be accepted"):
            gate.check(proven, (), (name,))


def test_an_override_that_was_not_needed_is_not_recorded(proven: Path) -> None:
    assert gate.check(proven, (), ("parity-missing",)).publication()["overrides"] == []


def test_an_unknown_variant_is_wrong_usage(proven: Path) -> None:
    with pytest.raises(UsageError, match="the pack has no variant 'q8_0'; it has f16, q4_k_m"):
        gate.check(proven, ("q8_0",))


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_anywhere_is_no_pack(built: Path, name: str, tmp_path: Path) -> None:
    before = json.dumps(packs.document(built))
    for keys in (("variants", 0, "file"), ("variants", 1, "modelfile"), ("variants", 0, "quant"),
                 ("license", "files", 0), ("license", "missing", 0)):  # fmt: skip
        document = json.loads(before)
        document["license"] |= {"files": ["LICENSE"], "missing": ["NOTICE"]}
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = name
        (tmp_path / "pack.json").write_text(json.dumps(document))
        field = re.escape(repr(".".join(map(str, keys))))
        with pytest.raises(SourceError, match=f"is damaged at {field}"):
            read_pack(tmp_path)


@pytest.mark.parametrize("key", ["quant", "file", "modelfile"])
def test_two_variants_of_one_name_are_no_pack(proven: Path, key: str) -> None:
    def same(content: dict[str, Any]) -> None:
        first, second = content["variants"]
        second[key] = first[key].upper()

    packs.change(proven, same)
    with pytest.raises(SourceError, match=f"two variants have one {key}"):
        gate.check(proven)


def test_a_permit_knows_what_changed_since(proven: Path) -> None:
    permit = gate.check(proven)
    assert permit.unchanged("Pico-F16.gguf")
    (proven / "Pico-F16.gguf").write_bytes((proven / "Pico-F16.gguf").read_bytes())
    assert not permit.unchanged("Pico-F16.gguf")
    assert not permit.unchanged("absent")


def test_deviations_are_published(proven: Path) -> None:
    packs.change(proven, lambda c: c.update(deviations=["the adapter has r 4, expected 8"]))
    permit = gate.check(proven)
    assert permit.publication()["deviations"] == ["the adapter has r 4, expected 8"]
    assert "r 4" in permit.annotations()["medllm-pack.deviations"]
