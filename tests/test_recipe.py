"""Recipes: the shipped ones, a user's copy, and every problem at once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from medllm_pack.errors import RecipeError, UsageError
from medllm_pack.recipe import (
    check_recipe,
    copy_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_path,
)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_has_no_problems(name: str) -> None:
    assert check_recipe(name) == ()


def test_shipped_recipes_are_those_of_the_readme() -> None:
    assert recipe_names() == ("7b", "mistral-7b", "tiny")


def test_7b_describes_the_published_model() -> None:
    recipe = load_recipe(recipe_path("7b"))
    assert recipe.name == "Clinical-BR-LlaMA-2-7B"
    assert recipe.base is not None
    assert recipe.merged is not None
    assert recipe.base.source == "meta-llama/Llama-2-7b-hf"
    assert recipe.merged.source == "pucpr-br/Clinical-BR-LlaMA-2-7B"
    adapter = recipe.expects.adapter
    assert adapter is not None
    assert (adapter.r, adapter.alpha, adapter.dropout) == (8, 16.0, 0.1)
    assert adapter.targets == ["q_proj", "v_proj"]
    assert recipe.license.id == "llama2"
    assert recipe.license.notice == (
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    )


def test_mistral_states_no_base() -> None:
    assert load_recipe(recipe_path("mistral-7b")).base is None


def test_copy_is_the_same_recipe_and_can_be_built_from_its_path(tmp_path: Path) -> None:
    copied = copy_recipe("7b", None, replace=False)
    assert load_recipe(recipe_path(str(copied))) == load_recipe(recipe_path("7b"))


def test_near_miss_is_offered() -> None:
    with pytest.raises(UsageError, match="Did you mean 'tiny'"):
        recipe_path("tinny")


BROKEN = """
name = "with a space"
summary = ""
variants = []
template = "nota-clinica"
colour = "blue"
[base]
sauce = "x"
[expects.adapter]
r = "8"
alpha = 16
dropout = 1.5
targets = []
[license]
id = "x"
[card]
title = "x"
summary = "x"
"""


def test_every_problem_is_reported_with_key_and_meaning() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(BROKEN.encode(), subject="mine.toml")
    lines = caught.value.lines()
    expected = [
        ("name: ", "files are NAME-VARIANT.gguf"),
        ("summary: ", "recipes list"),
        ("variants: ", "--quant is absent"),
        ("ollama: ", "ollama create"),
        ("colour: there is no such key", ""),
        ("base.source: ", "on the Hub"),
        ("base.sauce: there is no such key", ""),
        ("expects.adapter.r: ", "rank"),
        ("expects.adapter.dropout: ", "lora_dropout"),
        ("expects.adapter.targets: ", "target modules"),
        ("license.name: ", "full name"),
    ]
    for key, meaning in expected:
        assert any(f"mine.toml: {key}" in line and meaning in line for line in lines), (key, lines)
    assert len(lines) == len(expected)


def test_adapter_without_base_is_a_problem() -> None:
    text = recipe_path("tiny").read_text(encoding="utf-8")
    document = text.replace('[base]\nsource = "builtin:tiny/base"\n', "")
    assert "base" not in tomllib.loads(document)
    with pytest.raises(RecipeError, match="needs a base"):
        parse_recipe(document.encode(), subject="x")


def test_unknown_variant_and_style_are_problems_of_a_recipe(tmp_path: Path) -> None:
    text = recipe_path("tiny").read_text(encoding="utf-8")
    text = text.replace('"q8_0"', '"q8_9"').replace('"continuacao"', '"continuacão"')
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    problems = check_recipe("mine.toml")
    assert len(problems) == 2
    assert "q8_9" in problems[0]
    assert "template" in problems[1]
