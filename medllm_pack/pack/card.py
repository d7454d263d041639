"""The model card of a pack: README.md, from pack.json's content alone.

Everything said comes from the recipe and from what was measured; nothing here has an opinion of its
own, and nothing is read but the document, so that the card is made again when the document changes.
The front matter is what the Hugging Face Hub reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from medllm_pack.limits import described
from medllm_pack.pack.manifest import Document, recipe_of
from medllm_pack.recipe import Recipe

NAME = "README.md"

_OLLAMA_HINT = "ollama create {name} -f {modelfile}\nollama run {name}"
_FRAMED = "The prompt is framed by the style `{style}` (TEMPLATE in the Modelfile).\n"
# All of it works without a network. The key is no part of a pack: it must come another way.
_CHECK = """## Check it yourself

From this folder, without a network:

```
sha256sum --ignore-missing -c SHA256SUMS    # every byte of what is here
medllm-pack verify .                        # and that the papers say what was built
medllm-pack verify . --key ../signer.pub    # and who signed it, if there is a model.sig
```

The public key is the publisher's and must come another way than these files.
"""
_HEADS = ("variant", "mean KLD", "99 %", "same top token", "perplexity", "ratio", "verdict")
# Figure of pack.json -> how a reader sees it.
_FORMS = {
    "kld_mean": ".2e",
    "kld_p99": ".2e",
    "top1": ".2%",
    "ppl": ".5g",
    "ppl_ratio": ".4f",
}


def card(document: Document) -> str:
    """Return the text of README.md.

    Raises:
        SourceError: if the document holds no recipe that this version understands.
    """
    recipe = recipe_of(document)
    return _front_matter(recipe) + "\n" + "\n".join(_sections(recipe, document))


def human_bytes(size: int) -> str:
    """Return a size as Ollama shows it: 13476831264 -> ``13 GB``, 4081004224 -> ``4.1 GB``."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= scale:
            value = size / scale
            return f"{int(value)} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{size} B"


def _front_matter(recipe: Recipe) -> str:
    card = recipe.card
    fields: dict[str, object] = {
        "license": recipe.license.id,
        "language": card.languages,
        "base_model": card.base_model,
        "tags": [*card.tags, "gguf"],
        "pipeline_tag": "text-generation",
    }
    # A JSON value is a YAML value, whatever it holds.
    lines = (f"{key}: {json.dumps(v, ensure_ascii=False)}" for key, v in fields.items() if v)
    return "\n".join(("---", *lines, "---", ""))


def _sections(recipe: Recipe, document: Document) -> Iterator[str]:
    card = recipe.card
    yield f"# {card.title}\n"
    yield f"{card.summary}\n"
    if departures := document["deviations"]:
        yield "This build departs from the published model: " + "; ".join(departures) + ".\n"
    yield from _files(recipe, document)
    if document["parity"] is not None:
        yield from _parity(document["parity"])
    yield _CHECK
    yield from _made_from(document)
    for title, text in (
        ("Training", card.training),
        ("Intended use", card.intended_use),
        ("Limits", card.limits),
    ):
        if text:
            yield f"## {title}\n\n{text}\n"
    yield from _license(recipe, document)
    if card.citation:
        yield f"## Citation\n\n```bibtex\n{card.citation.strip()}\n```\n"


def _files(recipe: Recipe, document: Document) -> Iterator[str]:
    yield "## Files\n"
    yield "| file | size | bits per weight | SHA-256 |\n| --- | --- | --- | --- |"
    for variant in document["variants"]:
        size, bits = human_bytes(variant["size"]), variant["bits_per_weight"]
        yield f"| {variant['file']} | {size} | {bits:.2f} | `{variant['sha256']}` |"
    last = document["variants"][-1]
    hint = _OLLAMA_HINT.format(name=recipe.ollama, modelfile=last["modelfile"])
    yield f"\nIn Ollama, from this folder:\n\n```\n{hint}\n```\n"
    yield _FRAMED.format(style=document["template"]["name"])


def _parity(parity: Document) -> Iterator[str]:
    yield "## Is it still the same model?\n"
    said = "Yes: every variant passed." if parity["passed"] else "**No: a variant failed.**"
    texts = parity["texts"]
    kind = "texts of whoever packed it" if texts["sha256"] is None else "synthetic notes"
    yield (
        f"{said} Each was compared with the model it was made from (transformers, the adapter "
        f"unmerged, in float32) over {texts['count']} {kind}. KLD is the KL divergence of the "
        "predictions, in nats a token; the ratio is that of the perplexities.\n"
    )
    yield f"| {' | '.join(_HEADS)} |\n| --- {'| --: ' * (len(_HEADS) - 2)}| --- |"
    for variant in parity["variants"]:
        figures = (_shown(variant.get(name), form) for name, form in _FORMS.items())
        yield f"| {variant['quant']} | {' | '.join(figures)} | {_verdict(variant)} |"
    for variant in parity["variants"]:
        if departures := variant.get("limits"):
            said = "; ".join(map(described, departures))
            yield f"\nLimits of {variant['quant']} that its recipe sets: {said}."
    yield (
        "\nThis says that the files hold the model, not that the model is right: nothing here "
        "measures clinical validity. Every check is in `parity.json`; `parity.html` shows and "
        "explains it.\n"
    )


def _shown(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _verdict(variant: Mapping[str, Any]) -> str:
    if variant["passed"]:
        return "passed"
    failed = variant.get("failed")
    return f"**failed** at {failed}" if failed else "**failed**"


def _made_from(document: Document) -> Iterator[str]:
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


def _license(recipe: Recipe, document: Document) -> Iterator[str]:
    license_ = recipe.license
    link = f" ({license_.link})" if license_.link else ""
    yield f"## Licence\n\n{license_.name}{link}.\n"
    if license_.notice:
        yield f"{license_.notice}\n"
    if license_.remark:
        yield f"{license_.remark}\n"
    if missing := document["license"]["missing"]:
        yield (
            "**Not to be published as it is**: the licence asks for "
            f"{', '.join(missing)}, which was not at hand.\n"
        )
