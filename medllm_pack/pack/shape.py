"""The shape that pack.json must have before anything in it is believed.

A pack may come from anywhere. Names in it must be plain file names, digests 64 hex digits, numbers
numbers; what is not described here is left alone, so that a newer pack can still be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from medllm_pack.errors import SourceError, shown
from medllm_pack.pack import manifest
from medllm_pack.pack.sums import checked_name


def _plain(name: str) -> str:
    try:
        return checked_name(name, of=manifest.NAME)
    except SourceError:
        raise PydanticCustomError("name", "it is not a plain file name") from None


def _distinct(variants: list[_Variant]) -> list[_Variant]:
    for key in ("quant", "file", "modelfile"):
        if len({str(getattr(v, key)).casefold() for v in variants}) != len(variants):
            raise PydanticCustomError("twice", "two variants have one {key}", {"key": key})
    return variants


FileName = Annotated[str, AfterValidator(_plain)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class _Variant(_Part):
    quant: FileName
    file: FileName
    size: Count
    sha256: Hex
    parameters: Count
    types: dict[str, Count]
    modelfile: FileName


class _InputFile(_Part):
    name: str
    size: Count
    sha256: Hex


class _Input(_Part):
    role: str
    source: str
    revision: str | None
    files: list[_InputFile]


class _License(_Part):
    id: str
    name: str
    files: list[FileName]
    missing: list[FileName]


class _Departure(_Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,99}$")]
    shipped: float
    used: float
    looser: bool


class _Verdict(_Part):
    quant: str
    passed: bool
    limits: list[_Departure] = []


class _Parity(_Part):
    passed: bool
    variants: list[_Verdict]


class _Template(_Part):
    name: str
    sha256: Hex


class _Pack(_Part):
    name: FileName
    recipe: dict[str, Any]
    inputs: list[_Input]
    deviations: list[str]
    tools: dict[str, str]
    variants: Annotated[list[_Variant], Field(min_length=1), AfterValidator(_distinct)]
    template: _Template
    license: _License
    parity: _Parity | None


def read_pack(folder: Path) -> manifest.Document:
    """Return the content of a pack's pack.json, its shape checked.

    Raises:
        SourceError: if there is none, or something in it is not what it must be.
    """
    document = manifest.read_manifest(folder)
    try:
        _Pack.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise SourceError(
            f"{manifest.NAME} in {shown(folder)} is damaged at {shown(key)}: {first['msg'].lower()}"
        ) from error
    return document
