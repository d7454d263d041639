"""provenance.json and bom.cdx.json: what others' schemas accept, and the same for the same pack."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement

from medllm_pack import files
from medllm_pack.pack.bom import bom
from medllm_pack.pack.papers import derived
from medllm_pack.pack.provenance import provenance
from medllm_pack.recipe import load_recipe, recipe_names, recipe_path
from tests import pico_packs as packs


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("origin")
    return packs.make(root / "pack", packs.write_recipe(root / "recipe", llama_folder))


@pytest.fixture(scope="module")
def document(built: Path) -> dict[str, Any]:
    return packs.document(built)


def from_hub(document: dict[str, Any], recipe: str) -> dict[str, Any]:
    """Return the document as it would be for a shipped recipe with inputs from the Hub."""
    changed = copy.deepcopy(document)
    changed["recipe"] = load_recipe(recipe_path(recipe)).model_dump(mode="json")
    changed["inputs"][0] |= {"source": "org/Model", "revision": "0123456789abcdef" * 2 + "01234567"}
    license_ = changed["recipe"]["license"]
    changed["license"] |= {"id": license_["id"], "name": license_["name"]}
    changed["importance"] = {"sha256": "1" * 64}
    changed["deviations"] = ["the adapter has r 4, the recipe expects 8"]
    changed["parity"] = {
        "passed": True, "texts": {"name": "t", "count": 1, "sha256": "2" * 64},
        "variants": [{"quant": "f16", "passed": True, "kld_mean": 1e-6, "ppl": "inf"}],
    }  # fmt: skip
    return changed


def refuse_schema_faults(value: dict[str, Any]) -> None:
    faults = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(value))
    assert faults is None, str(faults)


@pytest.mark.parametrize("recipe", [None, *recipe_names()])
def test_bom_passes_cyclonedx_s_strict_schema(document: dict[str, Any], recipe: str | None) -> None:
    refuse_schema_faults(bom(document if recipe is None else from_hub(document, recipe)))


def test_the_validator_would_notice(document: dict[str, Any]) -> None:
    value = bom(document)
    value["metadata"]["component"]["modelCard"]["modelParameters"]["unknown"] = 1
    with pytest.raises(AssertionError):
        refuse_schema_faults(value)


@pytest.mark.parametrize("recipe", [None, *recipe_names()])
def test_provenance_passes_in_toto_s_own_classes(
    document: dict[str, Any], recipe: str | None
) -> None:
    value = provenance(document if recipe is None else from_hub(document, recipe))
    # ParseDict refuses fields that the published messages do not have.
    Statement.copy_from_pb(json_format.ParseDict(value, Statement([], "", {}).pb)).validate()
    predicate = json_format.ParseDict(value["predicate"], provenance_pb2.Provenance())
    definition, details = predicate.build_definition, predicate.run_details
    for described in (*definition.resolved_dependencies, *details.byproducts):
        ResourceDescriptor.copy_from_pb(described).validate()
    # slsa.dev: these are required.
    assert definition.build_type
    assert definition.external_parameters
    assert details.builder.id


def test_provenance_names_every_output_and_every_input(document: dict[str, Any]) -> None:
    value = provenance(from_hub(document, "7b"))
    assert {s["name"]: s["digest"]["sha256"] for s in value["subject"]} == {
        v["file"]: v["sha256"] for v in document["variants"]
    }
    found = {d["digest"]["sha256"]: d for d in
             value["predicate"]["buildDefinition"]["resolvedDependencies"]}  # fmt: skip
    for file in document["inputs"][0]["files"]:
        assert found[file["sha256"]]["uri"] == (
            "pkg:huggingface/org/Model@" + "0123456789abcdef" * 2 + "01234567"
        )
        assert found[file["sha256"]]["downloadLocation"].endswith(f"/{file['name']}")
    assert "1" * 64 in found


def test_a_folder_is_known_by_its_digests_alone(document: dict[str, Any]) -> None:
    for dependency in provenance(document)["predicate"]["buildDefinition"]["resolvedDependencies"]:
        assert "uri" not in dependency
        assert "downloadLocation" not in dependency


def test_bom_tells_what_parity_measured(document: dict[str, Any]) -> None:
    component = bom(from_hub(document, "7b"))["metadata"]["component"]
    metrics = component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "kld_mean", "value": "1e-06", "slice": "f16"} in metrics
    properties = {p["name"]: p["value"] for p in component["properties"]}
    assert properties["medllm-pack:template.sha256"] == document["template"]["sha256"]
    assert properties["medllm-pack:parity"] == "passed"


def test_the_papers_of_a_pack_are_those_of_its_pack_json(built: Path) -> None:
    document = packs.document(built)
    for name, text in derived(document).items():
        assert (built / name).read_text(encoding="utf-8") == text
        assert f"  {name}\n" in (built / "SHA256SUMS").read_text()


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_papers_are_the_same_whatever_the_order_of_keys(
    document: dict[str, Any], random: Any
) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            random.shuffle(keys)
            return {key: shuffled(value[key]) for key in keys}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    again = shuffled(document)
    for make in (provenance, bom):
        assert files.canonical_json(make(again)) == files.canonical_json(make(document))
