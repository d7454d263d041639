"""The texts that a licence obliges a distributor to ship: found, missing, or beyond a Modelfile.

Knows which files of the inputs hold them. Whether a pack may be published without one is the
gate's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medllm_pack import files
from medllm_pack.ollama.rules import survives
from medllm_pack.pack.inputs import Inputs, find_text
from medllm_pack.recipe import License, Recipe


@dataclass(frozen=True)
class Duty:
    """A text that the licence obliges a distributor to ship; ``text`` is None if not found."""

    file: str
    text: str | None


def find_duties(recipe: Recipe, inputs: Inputs) -> Iterator[Duty]:
    """Yield every text the licence asks for, from the model or from the base repository."""
    for file, names in recipe.license.texts.items():
        copies = (inputs.model, inputs.license)
        found = (find_text(copy, names) for copy in copies if copy is not None)
        path = next((path for path in found if path is not None), None)
        text = files.read_small(path, limit=1 << 20).decode("utf-8") if path else None
        yield Duty(file, text)


def notices(duties: Sequence[Duty]) -> Iterator[str]:
    """Yield what the user should know of the texts."""
    for duty in duties:
        if _lost_in_modelfile(duty):
            yield (
                f"{duty.file} holds characters that Ollama would drop, so the Modelfile only names "
                "the licence; the file itself is in the pack, unchanged"
            )
        if duty.text is None:
            yield (
                f"{duty.file} is missing: the licence asks for it, and neither the model nor the "
                "base repository here holds it. Put it beside the base weights and build again; "
                "the pack cannot be published without it"
            )


def in_modelfile(license_: License, duties: Sequence[Duty]) -> tuple[str, ...]:
    """Return what a Modelfile says of the licence: its texts, or its name and link."""
    texts = tuple(duty.text for duty in duties if duty.text and not _lost_in_modelfile(duty))
    return texts or (f"{license_.name} {license_.link or ''}".strip(),)


def _lost_in_modelfile(duty: Duty) -> bool:
    """Say whether Ollama's parser would change a licence text; the pack ships it as a file too."""
    text = duty.text or ""
    return '"""' in text or not all(map(survives, text))
