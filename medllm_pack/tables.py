"""TOML that people write, read strictly: every problem at once, with its key and what it means.

Recipes, mixes, styles and limits are such tables. Knows nothing of what they say.
"""

from __future__ import annotations

import tomllib
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from medllm_pack.errors import RecipeError, shown


class Table(BaseModel):
    """A table with these keys and no others, whose values have these types and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Read = TypeVar("_Read", bound=BaseModel)


def parse_table(model: type[_Read], data: bytes, *, subject: str) -> _Read:
    """Read a table from TOML bytes; ``subject`` names it in messages.

    Raises:
        RecipeError: with every problem of the text.
    """
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(subject, [f"it is not valid TOML: {error}"]) from error
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise RecipeError(subject, problems_of(error, model)) from error


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return a sentence for each problem pydantic found: key, fact, meaning of the key."""
    problems = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        fact = item["msg"].removeprefix("Value error, ")
        fact = fact[:1].lower() + fact[1:]
        given = (
            "" if item["type"] in ("missing", "value_error") else f", not {shown(item['input'])}"
        )
        if item["type"] == "extra_forbidden":
            fact, given = "there is no such key", ""
        meaning = _meaning(model, item["loc"])
        problems.append(
            f"{key or 'the file'}: {fact}{given}" + (f" ({meaning})" if meaning else "")
        )
    return problems


def _meaning(model: type[BaseModel], loc: tuple[int | str, ...]) -> str | None:
    """Return the description of the field that a location leads to."""
    description = None
    current: Any = model
    named = False  # whether the next part is a name that the writer chose
    for part in loc:
        fields = getattr(current, "model_fields", {})
        if part in fields and not named:
            description = fields[part].description
            current = _table_of(fields[part].annotation)
            named = get_origin(fields[part].annotation) is dict
        elif named:
            named = False
        else:
            break
    return description


def _table_of(annotation: Any) -> Any:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
