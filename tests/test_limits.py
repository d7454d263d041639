"""Limits: shipped for every mix, read strictly, and what a recipe changes stays known."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from medllm_pack import limit_tables as limits
from medllm_pack import resources
from medllm_pack.errors import PlanError, RecipeError
from medllm_pack.limit_tables import LimitTable, RecipeLimits
from medllm_pack.limits import Limits
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.progress import Silent
from medllm_pack.quant.mixes import mix_names
from medllm_pack.recipe import check_recipe, load_recipe, parse_recipe, recipe_path
from medllm_pack.tables import parse_table

TINY = recipe_path("tiny").read_text(encoding="utf-8")
SHIPPED = (resources.folder("quant_recipes") / "limits.toml").read_text(encoding="utf-8")


def given(text: str) -> Limits:
    """Return the limits of a recipe with a table."""
    return Limits(parse_recipe(f"{TINY}\n{text}".encode(), subject="mine.toml").parity)


def test_every_shipped_mix_has_a_row_of_its_own() -> None:
    assert tuple(limits.shipped().variants) == (*mix_names(), "other")


def test_nothing_of_the_shipped_limits_is_lost_by_reading_them() -> None:
    assert limits.shipped().model_dump() == tomllib.loads(SHIPPED)


def test_recipe_without_limits_has_the_shipped_ones() -> None:
    assert given("").logits("q4_k_m") == Limits().logits("q4_k_m")
    assert given("").departures("q4_k_m", kinds=["Q4_K"], rungs=["merge", "served"]) == ()


def test_limit_of_a_recipe_replaces_that_one_and_no_other() -> None:
    ours, usual = given("[parity.variants.q4_k_m]\nkld_mean = 0.02"), Limits()
    assert ours.logits("q4_k_m").kld_mean == 0.02
    assert ours.logits("q4_k_m").kld_p99 == usual.logits("q4_k_m").kld_p99
    assert ours.logits("q4_k_s") == usual.logits("q4_k_s")


def test_own_mix_has_the_limits_of_the_name_that_its_own_begins_with() -> None:
    usual = Limits()
    assert usual.logits("q4_k_m-clinica") == usual.logits("q4_k_m")
    assert usual.logits("minha") == usual.logits("other")
    assert usual.weights("NVFP4") == usual.weights("other")
    ours = given("[parity.variants.q4_k_m]\nkld_mean = 0.02")
    assert ours.logits("q4_k_m-clinica").kld_mean == 0.02
    [departure] = ours.departures("q4_k_m-clinica", kinds=(), rungs=())
    assert departure.document()["name"] == "variants.q4_k_m-clinica.kld_mean"


@pytest.mark.parametrize(
    ("table", "looser"),
    [
        ("[parity.variants.q4_k_m]\nkld_mean = 0.9", True),
        ("[parity.variants.q4_k_m]\nkld_mean = 0.001", False),
        ("[parity.variants.q4_k_m]\ntop1_clear = 0.5", True),
        ("[parity.variants.q4_k_m]\ntop1_clear = 0.999", False),
        ("[parity.tensors.Q4_K]\nrmse = 0.9", True),
        ("[parity.tensors.Q4_K]\nworst_row = 1.5", True),
        ("[parity.merge]\nquantized = 0.01", False),
        ("[parity.served]\nagreement = 0.1", True),
        ("[parity.served]\ntie = 2.0", True),
    ],
)
def test_departure_knows_whether_it_is_looser(table: str, looser: bool) -> None:
    found = given(table).departures("q4_k_m", kinds=["Q4_K"], rungs=["merge", "served"])
    assert [departure.looser for departure in found] == [looser]


def test_file_made_with_an_importance_matrix_has_a_limit_of_its_own_for_blocks() -> None:
    table = limits.RecipeLimits.model_validate({"tensors": {"Q4_K": {"worst_block_matrix": 0.9}}})
    assert Limits(table).weights("Q4_K") == Limits().weights("Q4_K")
    assert Limits(table).departures("q4_k_m", kinds=["Q4_K"], rungs=()) == ()
    assert Limits(table, matrix=True).weights("Q4_K").worst_block == 0.9
    [departure] = Limits(table, matrix=True).departures("q4_k_m", kinds=["Q4_K"], rungs=())
    assert departure.path == ("tensors", "Q4_K", "worst_block_matrix")


def test_departures_are_those_that_counted() -> None:
    ours = given(
        "[parity.variants.q8_0]\nkld_mean = 0.9\n[parity.tensors.Q4_K]\nrmse = 0.9\n"
        "[parity.served]\ntie = 1.0\n[parity.generation.ties]\nf16 = 1.0\n"
        "[parity.variants.f16]\nkld_mean = 1e-4"  # the shipped one
    )
    assert ours.departures("f16", kinds=["Q8_0"], rungs=["merge"]) == ()
    found = ours.departures("f16", kinds=(), rungs=["generation"])
    assert [d.path for d in found] == [("generation", "ties", "f16")]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[parity.variants.q4_k_m]\nkld = 1.0", "kld: there is no such key"),
        ("[parity.variants.q4_k_m]\nkld_mean = 'x'", "q4_k_m.kld_mean: input should be a valid"),
        ("[parity.variants.q4_k_m]\nkld_mean = -1", "greater than 0, not '-1' (largest mean KL"),
        ("[parity.variants.q4_k_m]\nkld_mean = nan", "parity.variants.q4_k_m.kld_mean: "),
        ("[parity.variants.q4_k_m]\nkld_mean = inf", "parity.variants.q4_k_m.kld_mean: "),
        ("[parity.variants.q4_k_m]\ntop1_clear = 95", "less than or equal to 1, not '95'"),
        ("[parity.variants.Q4_K_M]\nkld_mean = 1.0", "Q4_K_M"),
        ("[parity.tensors.Q4_K]\nrmse = 1.0", "less than 1, not '1.0'"),
        ("[parity.tensors.Q4_K]\nrmse = true", "parity.tensors.Q4_K.rmse: "),
        ("[parity.tensors.Q4_K]\nworst_row = 5", "less than or equal to 4, not '5'"),
        ("[parity.tensors.Q9_K]\nrmse = 0.1", "there is no type 'Q9_K'; there are Q8_0"),
        ("[parity.generation.ties]\nq8_0 = 0.1", "q8_0: there is no such key"),
        ("[parity.speed]\nfast = 1", "parity.speed: there is no such key"),
    ],
)
def test_what_is_wrong_with_a_recipes_limits_is_one_line(table: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        given(table)
    [line] = caught.value.lines()
    assert line.startswith("mine.toml: parity.")
    assert said in line


def test_limits_of_a_variant_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    text = f"{TINY}\n[parity.variants.q4_km]\nkld_mean = 0.2\n"
    Path("mine.toml").write_text(text, encoding="utf-8")
    [problem] = check_recipe("mine.toml")
    assert problem.startswith("parity.variants.q4_km: there is no such variant; shipped are f32,")
    request = Request(recipe=load_recipe(Path("mine.toml")), folder=tmp_path, out=tmp_path / "p")
    with pytest.raises(PlanError, match="q4_km: there is no such variant"):
        make_plan(request, report=Silent())


def test_own_mix_of_the_recipe_may_have_limits(tmp_path: Path) -> None:
    mix = (resources.folder("quant_recipes/mixes") / "q8_0.toml").read_text(encoding="utf-8")
    (tmp_path / "m.toml").write_text(mix.replace('name = "Q8_0"', 'name = "Clinica"'))
    text = TINY.replace('variants = ["f16", "q8_0", "q4_k_m"]', f'variants = ["{tmp_path}/m.toml"]')
    Path("mine.toml").write_text(f"{text}\n[parity.variants.clinica]\nkld_mean = 0.2\n")
    assert check_recipe("mine.toml") == ()


def test_shipped_limits_that_are_damaged_are_named() -> None:
    damaged = SHIPPED.replace("kld_mean = 0.004,  ", "").replace("agreement = 0.98", "")
    damaged = "\n".join(line for line in damaged.splitlines() if not line.startswith("other"))
    with pytest.raises(RecipeError) as caught:
        limits.complete(parse_table(LimitTable, damaged.encode(), subject="limits.toml"))
    assert caught.value.problems == (
        "variants.other: this row is missing", "tensors.other: this row is missing",
        "variants.q8_0.kld_mean: this limit is missing",
        "generation.agreement: this limit is missing",
    )  # fmt: skip


def test_limits_of_a_recipe_survive_pack_json() -> None:
    table = parse_recipe(
        f"{TINY}\n[parity.variants.q4_k_m]\nkld_mean = 0.2\n".encode(), subject="x"
    ).parity
    assert table is not None
    written = table.model_dump(mode="json")
    assert written == {"variants": {"q4_k_m": {"kld_mean": 0.2}}}
    assert RecipeLimits.model_validate(written) == table
