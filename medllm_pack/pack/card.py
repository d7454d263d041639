"""The papers of a pack: model card, licence, notice, use policy.

Everything said comes from the recipe and from what was measured while building; nothing here has
an opinion of its own. The front matter is what the Hugging Face Hub reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from medllm_pack.pack.plan import Plan

Document = dict[str, Any]

_OLLAMA_HINT = "ollama create {name} -f {modelfile}\nollama run {name}"


def papers(plan: Plan, document: Document) -> dict[str, str]:
    """Return file name -> text of the card and of the licence's papers."""
    texts = {duty.file: duty.text for duty in plan.duties if duty.text is not None}
    if plan.recipe.license.notice:
        texts["NOTICE"] = plan.recipe.license.notice + "\n"
    texts["README.md"] = _front_matter(plan) + "\n" + "\n".join(_sections(plan, document))
    return texts


def human_bytes(size: int) -> str:
    """Return a size as Ollama shows it: 13476831264 -> ``13 GB``, 4081004224 -> ``4.1 GB``."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= scale:
            value = size / scale
            return f"{int(value)} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{size} B"


def _front_matter(plan: Plan) -> str:
    card = plan.recipe.card
    fields: dict[str, object] = {
        "license": plan.recipe.license.id,
        "language": card.languages,
        "base_model": card.base_model,
        "tags": [*card.tags, "gguf"],
        "pipeline_tag": "text-generation",
    }
    # A JSON value is a YAML value, whatever it holds.
    lines = (f"{key}: {json.dumps(v, ensure_ascii=False)}" for key, v in fields.items() if v)
    return "\n".join(("---", *lines, "---", ""))


def _sections(plan: Plan, document: Document) -> Iterator[str]:
    card = plan.recipe.card
    yield f"# {card.title}\n"
    yield f"{card.summary}\n"
    if plan.deviations:
        yield "This build departs from the published model: " + "; ".join(plan.deviations) + ".\n"
    yield from _files(plan, document)
    yield from _made_from(plan, document)
    for title, text in (
        ("Training", card.training),
        ("Intended use", card.intended_use),
        ("Limits", card.limits),
    ):
        if text:
            yield f"## {title}\n\n{text}\n"
    yield from _license(plan)
    if card.citation:
        yield f"## Citation\n\n```bibtex\n{card.citation.strip()}\n```\n"


def _files(plan: Plan, document: Document) -> Iterator[str]:
    yield "## Files\n"
    yield "| file | size | bits per weight | SHA-256 |\n| --- | --- | --- | --- |"
    for variant in document["variants"]:
        size, bits = human_bytes(variant["size"]), variant["bits_per_weight"]
        yield f"| {variant['file']} | {size} | {bits:.2f} | `{variant['sha256']}` |"
    last = document["variants"][-1]
    hint = _OLLAMA_HINT.format(name=plan.recipe.ollama, modelfile=last["modelfile"])
    yield f"\nIn Ollama, from this folder:\n\n```\n{hint}\n```\n"
    yield (
        f"The prompt is framed by the style `{plan.style.name}` (TEMPLATE in the Modelfile).\n"
        "`SHA256SUMS` lists every file; check with `sha256sum -c SHA256SUMS`.\n"
    )


def _made_from(plan: Plan, document: Document) -> Iterator[str]:
    yield "## Made from\n"
    for entry in document["inputs"]:
        revision = f" at revision `{entry['revision']}`" if entry["revision"] else ""
        yield f"- {entry['role']}: {entry['source']}{revision}"
    adapter = document["adapter"]
    if adapter is not None:
        yield (
            f"- the adapter (r = {adapter['r']}, alpha = {adapter['alpha']:g}, "
            f"{', '.join(adapter['targets'])}) was added to the base in float64 and rounded once "
            f"to F16; "
            f"all {adapter['tensors']} of its tensors were used"
        )
    tools = document["tools"]
    yield (
        f"- packed by medllm-pack {tools['medllm-pack']}; quantized as llama.cpp does "
        f"(llama-cpp-python {tools['llama-cpp-python']})\n"
    )
    yield "Digests of every input file are in `pack.json`.\n"


def _license(plan: Plan) -> Iterator[str]:
    license_ = plan.recipe.license
    link = f" ({license_.link})" if license_.link else ""
    yield f"## Licence\n\n{license_.name}{link}.\n"
    if license_.notice:
        yield f"{license_.notice}\n"
    if license_.remark:
        yield f"{license_.remark}\n"
    if plan.open_duties:
        yield (
            "**Not to be published as it is**: the licence asks for "
            f"{', '.join(plan.open_duties)}, which was not at hand.\n"
        )
