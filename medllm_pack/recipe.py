"""Recipes: what a pack is made of and how it presents itself, read from TOML.

A recipe is data that users copy and edit. Every problem of a file is reported at once, with its
key and what the key means. Knows nothing of weights; sources and styles are named, not opened.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from medllm_pack import resources
from medllm_pack.errors import MedllmError, RecipeError, UsageError, WriteError, shown
from medllm_pack.files import read_small, translated
from medllm_pack.home import expanded
from medllm_pack.limit_tables import RecipeLimits
from medllm_pack.limits import unknown_variants
from medllm_pack.tables import Table, parse_table

FOLDER = "quant_recipes/models"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._\-]{0,95}"

Text = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(gt=0)]


class Origin(Table):
    """Where weights come from."""

    source: Text = Field(description="a folder, builtin:NAME, or org/name[@revision] on the Hub")


class ExpectedBase(Table):
    """The shape of the published base model."""

    architecture: Text = Field(description="class in config.json, such as LlamaForCausalLM")
    layers: Size = Field(description="number of blocks")
    hidden_size: Size = Field(description="width of the model")
    intermediate_size: Size = Field(description="width of the feed-forward layers")
    heads: Size = Field(description="attention heads")
    kv_heads: Size = Field(description="key-value heads")
    vocab_size: Size = Field(description="rows of the embedding")


class ExpectedAdapter(Table):
    """How the published adapter was trained."""

    r: Size = Field(description="rank")
    alpha: float = Field(gt=0, description="lora_alpha")
    dropout: float = Field(ge=0, lt=1, description="lora_dropout")
    targets: list[Text] = Field(min_length=1, description="target modules")


class Expectations(Table):
    """What differs from these is named in the pack, or refused if strict."""

    base: ExpectedBase | None = Field(default=None, description="shape of the base model")
    adapter: ExpectedAdapter | None = Field(default=None, description="form of the adapter")


class License(Table):
    """The licence of the result, and what it obliges a distributor to ship."""

    id: Text = Field(description="identifier on the Hugging Face Hub, such as llama2")
    name: Text = Field(description="full name")
    link: str | None = Field(default=None, description="where the text is published")
    notice: str | None = Field(
        default=None, description="sentence that must stand in a NOTICE file"
    )
    texts: dict[str, list[str]] = Field(
        default_factory=dict,
        description="file in the pack -> names it may have in the base repository, any case",
    )
    remark: str | None = Field(
        default=None, description="what a reader should know about the licence"
    )


class Card(Table):
    """Texts and metadata of the model card."""

    title: Text = Field(description="heading")
    summary: Text = Field(description="first paragraph")
    authors: list[Text] = Field(default_factory=list, description="who made the model")
    organization: str | None = Field(default=None, description="who publishes the model")
    languages: list[Text] = Field(default_factory=list, description="ISO 639-1 codes")
    tags: list[Text] = Field(default_factory=list, description="tags on the Hub")
    base_model: str | None = Field(default=None, description="base model on the Hub, org/name")
    training: str | None = Field(default=None, description="how the model was trained")
    intended_use: str | None = Field(default=None, description="what the model is for")
    limits: str | None = Field(default=None, description="what the model is not for")
    citation: str | None = Field(default=None, description="BibTeX entry")


class Recipe(Table):
    """A model recipe.

    Attributes are described by their fields; ``recipes check`` shows the descriptions.
    """

    name: str = Field(
        pattern=rf"^{_NAME}$", description="name of the result; files are NAME-VARIANT.gguf"
    )
    summary: Text = Field(description="one line for `recipes list`")
    variants: list[Text] = Field(
        min_length=1, description="variants that are built when --quant is absent"
    )
    template: Text = Field(description="Modelfile style: a shipped name or a folder")
    ollama: Text = Field(description="name for `ollama create`, such as clinical-br:7b")
    strict: bool = Field(
        default=False, description="whether a departure from `expects` is an error"
    )
    base: Origin | None = Field(
        default=None, description="base model that an adapter is merged into"
    )
    adapter: Origin | None = Field(default=None, description="LoRA adapter")
    merged: Origin | None = Field(default=None, description="published merged weights")
    expects: Expectations = Field(Expectations(), description="shape of the published model")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Ollama parameters that replace the style's"
    )
    parity: RecipeLimits | None = Field(
        default=None, description="limits of `medllm-pack parity` in place of the shipped ones"
    )
    license: License = Field(description="licence and its duties")
    card: Card = Field(description="texts of the model card")

    @field_validator("variants")
    @classmethod
    def _distinct(cls, variants: list[str]) -> list[str]:
        if len({variant.lower() for variant in variants}) != len(variants):
            raise ValueError("a variant is named twice")
        return variants

    @model_validator(mode="after")
    def _has_a_source(self) -> Recipe:
        if self.adapter and not self.base:
            raise ValueError("an adapter needs a base to be merged into; add [base] source = …")
        return self


def recipe_names() -> tuple[str, ...]:
    """Return the names of the shipped recipes."""
    return tuple(sorted(path.stem for path in resources.folder(FOLDER).glob("*.toml")))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe: a shipped name, or the path of a TOML file.

    Raises:
        UsageError: if there is neither.
    """
    if name in recipe_names():
        return resources.folder(FOLDER) / f"{name}.toml"
    path = expanded(name)
    if path.suffix == ".toml":
        return path
    known = recipe_names()
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"there is no recipe {shown(name)}.{hint} Shipped: {', '.join(known)}; "
        "your own is named by the path of its .toml file"
    )


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file.

    Raises:
        RecipeError: with every problem of the file.
        SourceError: if it cannot be read.
    """
    return parse_recipe(read_small(path, limit=1 << 20), subject=path.name)


def parse_recipe(data: bytes, *, subject: str) -> Recipe:
    """Read a recipe from TOML bytes; ``subject`` names it in messages.

    Raises:
        RecipeError: with every problem of the text.
    """
    return parse_table(Recipe, data, subject=subject)


def check_recipe(name: str) -> tuple[str, ...]:
    """Return every problem of a recipe, its variants and its style included.

    Raises:
        UsageError: if there is no such recipe.
    """
    from medllm_pack.ollama.style import Style
    from medllm_pack.quant.mixes import load_mix

    path = recipe_path(name)
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        return error.problems
    problems = []
    names: list[str] = []
    for variant in recipe.variants:
        problems += _problem("variants", lambda name: names.append(load_mix(name).name), variant)
    problems += unknown_variants(recipe.parity, [name.lower() for name in names])
    problems += _problem("template", Style.load, recipe.template)
    return tuple(problems)


def copy_recipe(name: str, target: Path | None = None, *, replace: bool = False) -> Path:
    """Copy a recipe file and return where it is now.

    Raises:
        UsageError: if there is no such recipe.
        WriteError: if the target exists and may not be replaced, or cannot be written.
    """
    source = recipe_path(name)
    target = target or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not replace:
        raise WriteError(f"{shown(target)} exists; --force replaces it, or name another file")
    data = read_small(source, limit=1 << 20)
    with translated(target, elsewhere="another place"):
        target.write_bytes(data)
    return target


def _problem(key: str, load: Callable[[str], object], value: str) -> list[str]:
    try:
        load(value)
    except MedllmError as error:
        return [f"{key}: {line}" for line in error.lines()]
    return []
