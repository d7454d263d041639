"""provenance.json: where the files of a pack come from, as an in-toto statement.

The predicate is SLSA's provenance v1: every GGUF file as a subject, every input file by digest, the
recipe and the variants as what was asked for. Made from pack.json alone, so without time or host,
and the same for the same pack. It says what the builder says of itself, on whatever machine it ran:
SLSA build level 1, no more (docs/provenance.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

from medllm_pack import files

NAME: Final = "provenance.json"

# in-toto attestation framework, spec/v1/statement.md; slsa.dev/spec/v1.0/provenance.
STATEMENT: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:medllm-pack:build:1"
BUILDER: Final = "urn:medllm-pack:command-line"

Document = dict[str, Any]


def provenance(document: Mapping[str, Any]) -> Document:
    """Return the statement for the content of a pack.json."""
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": variant["file"], "digest": {"sha256": variant["sha256"]}}
            for variant in document["variants"]
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "recipe": document["recipe"],
                    "variants": [variant["quant"] for variant in document["variants"]],
                    "template": document["template"]["name"],
                },
                "internalParameters": {
                    "adapter": document["adapter"],
                    "deviations": document["deviations"],
                },
                "resolvedDependencies": list(_dependencies(document)),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": dict(document["tools"])},
                "byproducts": [{"name": "pack.json", "digest": {"sha256": _own(document)}}],
            },
        },
    }


def location(source: str, revision: str | None) -> str | None:
    """Return the name of a source that holds anywhere; a folder has none but its digests."""
    if source == "folder":
        return None
    if source.startswith("builtin:"):
        return f"urn:medllm-pack:{source}"
    # Package URL of type huggingface: the version is the commit.
    return f"pkg:huggingface/{quote(source)}" + (f"@{revision.lower()}" if revision else "")


def _dependencies(document: Mapping[str, Any]) -> Iterator[Document]:
    for entry in document["inputs"]:
        uri = location(entry["source"], entry["revision"])
        for file in entry["files"]:
            named: Document = {
                "name": f"{entry['role']}/{file['name']}",
                "digest": {"sha256": file["sha256"]},
            }
            if uri is not None:
                named["uri"] = uri
            if entry["revision"] is not None:
                named["downloadLocation"] = (
                    f"https://huggingface.co/{quote(entry['source'])}/resolve/"
                    f"{entry['revision']}/{quote(file['name'])}"
                )
            yield named
    if document["importance"] is not None:
        yield {"name": "imatrix", "digest": {"sha256": document["importance"]["sha256"]}}


def _own(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(files.canonical_json(document).encode("utf-8")).hexdigest()
