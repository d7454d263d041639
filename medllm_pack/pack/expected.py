"""How a base and an adapter differ from the ones that the recipe expects.

A difference is a fact and no fault: the plan decides whether the recipe allows it. Compares
configurations only.
"""

from __future__ import annotations

from collections.abc import Iterator

from medllm_pack.gguf import llama
from medllm_pack.recipe import ExpectedAdapter, ExpectedBase, Recipe
from medllm_pack.weights.adapter_config import AdapterConfig


def deviations(
    recipe: Recipe, config: llama.LlamaConfig, adapter: AdapterConfig | None
) -> Iterator[str]:
    """Yield how base and adapter differ from the published model's."""
    if recipe.expects.base is not None:
        yield from _differences("base", recipe.expects.base, {
            "architecture": config.architecture, "layers": config.n_layer,
            "hidden_size": config.n_embd, "intermediate_size": config.n_ff,
            "heads": config.n_head, "kv_heads": config.n_head_kv, "vocab_size": config.vocab,
        })  # fmt: skip
    if recipe.expects.adapter is not None and adapter is not None:
        yield from _differences("adapter", recipe.expects.adapter, {
            "r": adapter.r, "alpha": adapter.alpha, "dropout": adapter.dropout,
            "targets": sorted(adapter.targets),
        })  # fmt: skip
        for key, given in (("rank_pattern", adapter.rank_pattern),
                           ("alpha_pattern", adapter.alpha_pattern)):  # fmt: skip
            if given:
                yield f"the adapter has a {key}, the published one has none"
        if adapter.rslora:
            yield "the adapter scales by alpha / sqrt(r), the published one by alpha / r"


def _differences(
    what: str, expected: ExpectedBase | ExpectedAdapter, given: dict[str, object]
) -> Iterator[str]:
    for key, value in expected.model_dump().items():
        value = sorted(value) if isinstance(value, list) else value
        if given[key] != value:
            yield f"the {what} has {key} {given[key]}, the recipe expects {value}"
