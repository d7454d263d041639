"""What a base model's licence allows and asks of whoever passes the weights on, as data.

A pack names its base in several places: the recipe, the card, the inputs. The first family whose
pattern fits one of them decides which licences the pack may claim. Facts are from the agreements'
section 1.b; docs/licences.md says what is done with them and why. This is no legal advice.

Knows nothing of files: whoever asks hands over the texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medllm_pack.errors import shown


@dataclass(frozen=True)
class Duty:
    """Something that a pack must hold before it may be passed on.

    Attributes:
        name: as it is named in messages and by ``--accept licence-duty:NAME``; usually a file.
        file: the file that fulfils it.
        says: a sentence that must stand in the file; case and spacing do not count.
        asks: what the licence asks for, as a message says it.
    """

    name: str
    file: str
    says: str
    asks: str


@dataclass(frozen=True)
class Family:
    """Models under one licence.

    Attributes:
        name: as people call it.
        license_id: the only licence that a derivative may claim, by its name on the Hub.
        pattern: fits the name of a model of the family, lower case.
        begins: how the name of a fine-tuned model must begin; empty if the licence is silent.
        duties: what a pack must hold.
        remark: why no other licence can be claimed.
    """

    name: str
    license_id: str
    pattern: re.Pattern[str]
    begins: str
    duties: tuple[Duty, ...]
    remark: str


def _family(version: str, *, agreement: str, notice: str, built: str = "", begins: str = "",
            pattern: str | None = None) -> Family:  # fmt: skip
    """Return the family of a LLaMA version; the agreements differ in these points only."""
    name = f"Llama {version}"
    duties = [
        Duty("LICENSE", "LICENSE", agreement, "a copy of the agreement"),
        Duty("NOTICE", "NOTICE", notice, f"the sentence {notice!r}"),
        Duty("USE_POLICY.md", "USE_POLICY.md", "Acceptable Use Policy", "the use policy"),
    ]
    if built:
        duties.append(Duty("built-with", "README.md", built, f"the words {built!r} in the card"))
    number = re.escape(version).replace(r"\.", "[._-]")
    # "llama-3b" is a size, "open_llama_3b" another project, "llama-3.1" another version than 3.
    return Family(
        name, f"llama{version}",
        re.compile(pattern or rf"(?<!open[_-])llama[ _-]?{number}(?![0-9b]|[._-][0-9](?![0-9]*b))"),
        begins, tuple(duties),
        f"a fine-tune or a conversion of {name} is a derivative work and stays under its agreement",
    )  # fmt: skip


_META = "Copyright (c) Meta Platforms, Inc. All Rights Reserved."

FAMILIES: tuple[Family, ...] = (
    _family(
        "2",
        agreement="LLAMA 2 COMMUNITY LICENSE AGREEMENT",
        notice=f"Llama 2 is licensed under the LLAMA 2 Community License, {_META}",
        # Code Llama carries the licence of Llama 2.
        pattern=r"(?<!open[_-])llama[ _-]?2(?![0-9b.])|code[ _-]?llama",
    ),
    _family(
        "3",
        agreement="META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
        notice=f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {_META}",
        built="Built with Meta Llama 3",
        begins="Llama 3",
    ),
    *(
        _family(
            version,
            agreement=f"LLAMA {version} COMMUNITY LICENSE AGREEMENT",
            notice=f"Llama {version} is licensed under the Llama {version} Community License, "
            f"{_META}",
            built="Built with Llama",
            begins="Llama",
        )
        for version in ("3.1", "3.2", "3.3")
    ),
)


def families(document: Mapping[str, Any]) -> tuple[Family, ...]:
    """Return the families that a pack derives from, by the names in its pack.json."""
    names = [name.lower() for name in _names(document)]
    return tuple(f for f in FAMILIES if any(f.pattern.search(name) for name in names))


def claim_problems(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a pack may not claim the licence, or the name, that it claims."""
    claimed = document["license"]["id"]
    for family in families(document):
        if claimed != family.license_id:
            yield (
                f"it claims the licence {shown(claimed)}, but it derives from {family.name}: "
                f"{family.remark}. Set id = {family.license_id!r} in the recipe's [license] and "
                "build again"
            )
        if not _squeezed(document["name"]).startswith(_squeezed(family.begins)):
            yield (
                f"its name {shown(document['name'])} must begin with {family.begins!r}, says the "
                f"licence of {family.name}. Change the recipe's name and build again"
            )


def duties(document: Mapping[str, Any]) -> tuple[Duty, ...]:
    """Return what must be in the pack: by its base, by the licence it claims, by its recipe."""
    claimed = document["license"]["id"]
    found = {
        duty.name: duty
        for family in FAMILIES
        if family.license_id == claimed or family in families(document)
        for duty in family.duties
    }
    for file in (*document["license"]["files"], *document["license"]["missing"]):
        found.setdefault(file, Duty(file, file, "", "this text"))
    if notice := (document["recipe"].get("license") or {}).get("notice"):
        found.setdefault("NOTICE", Duty("NOTICE", "NOTICE", notice, f"the sentence {notice!r}"))
    return tuple(found.values())


def fulfils(duty: Duty, text: str | None) -> bool:
    """Say whether a file's text, or its absence, does what the duty asks for."""
    return text is not None and bool(text.strip()) and _plain(duty.says) in _plain(text)


def _names(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield every name in pack.json that says where the weights come from."""
    recipe = document["recipe"]
    card = recipe.get("card") or {}
    origins = (recipe.get(role) or {} for role in ("base", "adapter", "merged"))
    candidates = [
        document["name"], recipe.get("name"), card.get("base_model"), card.get("title"),
        *(card.get("tags") or ()), *(origin.get("source") for origin in origins),
        *(entry["source"] for entry in document["inputs"]),
    ]  # fmt: skip
    yield from (name for name in candidates if isinstance(name, str))


def _plain(text: str) -> str:
    """Return a text without what copying changes: case, line breaks, the copyright sign."""
    return " ".join(text.replace("©", "(c)").split()).casefold()


def _squeezed(text: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", text.lower())
