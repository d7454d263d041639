"""bom.cdx.json: the bill of materials of a model, as CycloneDX 1.6 knows it.

One component, the model, with a model card, its files by digest, and the base and the adapter as
its ancestors. Made from pack.json alone; what the recipe does not say is not said here. The prompt
template has no field of its own in CycloneDX 1.6: its digest is a property.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

from medllm_pack import files
from medllm_pack.pack.provenance import location

NAME: Final = "bom.cdx.json"
Document = dict[str, Any]

# The Hub's names of licences that SPDX lists; others go by their full name.
_SPDX: Final = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause",
                "cc-by-4.0": "CC-BY-4.0", "cc-by-sa-4.0": "CC-BY-SA-4.0"}  # fmt: skip
_METRICS: Final = ("kld_mean", "kld_p99", "top1", "ppl", "ppl_ratio")
_RISK: Final = {
    "name": "The model writes plausible text that can be wrong, and can repeat its training texts",
    "mitigationStrategy": "A licensed health professional reviews every output; neither the model "
    "nor the tool that packed it is a medical device",
}


def bom(document: Mapping[str, Any]) -> Document:
    """Return the bill of materials for the content of a pack.json."""
    content = files.canonical_json(document).encode("utf-8")
    number = uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(content).hexdigest())
    model = _model(document)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        "metadata": {"tools": {"components": _tools(document)}, "component": model},
        "dependencies": [
            {"ref": model["bom-ref"], "dependsOn": [a["bom-ref"] for a in _ancestors(document)]},
            *({"ref": ancestor["bom-ref"]} for ancestor in _ancestors(document)),
        ],
    }


def _model(document: Mapping[str, Any]) -> Document:
    card = document["recipe"]["card"]
    optional = {
        "description": card["summary"],
        "authors": [{"name": name} for name in card["authors"]],
        "publisher": card["organization"],
        "tags": card["tags"],
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": document["name"],
        "licenses": [{"license": _license(document)}],
        "pedigree": {"ancestors": list(_ancestors(document))},
        "modelCard": _card(document),
        "components": [_variant(variant) for variant in document["variants"]],
        "properties": list(_properties(document)),
    } | {key: value for key, value in optional.items() if value}


def _license(document: Mapping[str, Any]) -> Document:
    license_, link = document["license"], document["recipe"]["license"]["link"]
    known = _SPDX.get(license_["id"])
    named: Document = {"id": known} if known else {"name": license_["name"]}
    return named | {"acknowledgement": "declared"} | ({"url": link} if link else {})


def _card(document: Mapping[str, Any]) -> Document:
    card = document["recipe"]["card"]
    base = document["recipe"]["expects"]["base"]
    parameters = {
        "task": "text-generation",
        "architectureFamily": "llama",
        "modelArchitecture": base["architecture"] if base else "",
        "inputs": [{"format": "text"}],
        "outputs": [{"format": "text"}],
    }
    considerations = {
        "useCases": [card["intended_use"]] if card["intended_use"] else [],
        "technicalLimitations": [card["limits"]] if card["limits"] else [],
        "ethicalConsiderations": [_RISK],
    }
    measured = list(_metrics(document))
    return {
        "modelParameters": {key: value for key, value in parameters.items() if value},
        "considerations": {key: value for key, value in considerations.items() if value},
    } | ({"quantitativeAnalysis": {"performanceMetrics": measured}} if measured else {})


def _metrics(document: Mapping[str, Any]) -> Iterator[Document]:
    """Yield what parity measured, each against the model before packing."""
    for entry in (document["parity"] or {"variants": ()})["variants"]:
        for name in _METRICS:
            if entry.get(name) is not None:
                yield {"type": name, "value": str(entry[name]), "slice": entry["quant"]}


def _variant(variant: Mapping[str, Any]) -> Document:
    said = ("quant", "size", "parameters", "bits_per_weight")
    return {
        "type": "file",
        "bom-ref": f"file/{variant['file']}",
        "name": variant["file"],
        "mime-type": "application/octet-stream",
        "hashes": [{"alg": "SHA-256", "content": variant["sha256"]}],
        "properties": [_property(key, variant[key]) for key in said],
    }


def _ancestors(document: Mapping[str, Any]) -> Iterator[Document]:
    for entry in document["inputs"]:
        purl = location(entry["source"], entry["revision"])
        ancestor: Document = {
            "type": "machine-learning-model",
            "bom-ref": f"input/{entry['role']}",
            "name": entry["source"],
            "components": [
                {
                    "type": "file",
                    "name": file["name"],
                    "hashes": [{"alg": "SHA-256", "content": file["sha256"]}],
                }
                for file in entry["files"]
            ],
            "properties": [_property("role", entry["role"])],
        }
        if entry["revision"] is not None:
            ancestor["version"] = entry["revision"]
        if purl is not None and purl.startswith("pkg:"):
            ancestor["purl"] = purl
        yield ancestor


def _properties(document: Mapping[str, Any]) -> Iterator[Document]:
    template, parity = document["template"], document["parity"]
    yield _property("template.name", template["name"])
    yield _property("template.sha256", template["sha256"])
    yield _property("parity", {None: "missing", True: "passed", False: "failed"}[
        parity and parity["passed"]
    ])  # fmt: skip
    for text in document["deviations"]:
        yield _property("deviation", text)


def _tools(document: Mapping[str, Any]) -> list[Document]:
    return [
        {"type": "application", "name": name, "version": version}
        for name, version in sorted(document["tools"].items())
    ]


def _property(name: str, value: object) -> Document:
    return {"name": f"medllm-pack:{name}", "value": str(value)}
