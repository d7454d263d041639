"""Folders as trainers leave them: what they say beside the weights is said to the user."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medllm_pack.errors import MedllmError
from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Plan, Request, make_plan
from medllm_pack.progress import Silent
from medllm_pack.recipe import load_recipe, recipe_path
from tests import pico

ROOT = Path(__file__).resolve().parent.parent


def planned(tmp_path: Path, **sources: Path) -> Plan:
    recipe = pico.write_recipe(tmp_path / "recipe", {})
    request = Request(
        recipe=load_recipe(recipe), folder=recipe.parent, out=tmp_path / "out", variants=["f16"]
    )
    given: dict[str, Any] = {role: str(path) for role, path in sources.items()}
    return make_plan(replace(request, **given), report=Silent())


def said(plan: Plan, *words: str) -> list[str]:
    return [notice for notice in plan.notices if all(word in notice for word in words)]


def adapter_of(tmp_path: Path, base: str | None) -> Path:
    config = pico.adapter_config(base_model_name_or_path=base)
    return pico.write_adapter(tmp_path / "adapter", config=config)


def folder_of(tmp_path: Path, name: str, tokenizer: bytes) -> Path:
    return pico.write_model(tmp_path / name, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("base", "folder"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("unsloth/llama-2-7b-bnb-4bit", "Llama-2-7b-hf"),
        ("/home/ana/modelos/Llama-2-7b-hf/", "llama_2_7b"),
        (r"C:\modelos\Llama-2-7b-hf", "llama-2-7b"),
        (None, "anything"),
        ("", "anything"),
    ],
)
def test_base_under_another_name_of_the_same_weights_is_no_news(
    tmp_path: Path, tokenizer: bytes, base: str | None, folder: str
) -> None:
    model = folder_of(tmp_path, folder, tokenizer)
    assert not said(planned(tmp_path, base=model, adapter=adapter_of(tmp_path, base)), "trained on")


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "'meta-llama/Llama-2-7b-chat-hf'"),
        ("/home/ana/modelos/llama-chat", "'llama-chat'"),
        ("./modelos/llama-chat", "'llama-chat'"),
    ],
)
def test_base_that_the_adapter_does_not_name_is_said_without_a_path(
    tmp_path: Path, tokenizer: bytes, base: str, shown: str
) -> None:
    model = folder_of(tmp_path, "llama-2-7b", tokenizer)
    plan = planned(tmp_path, base=model, adapter=adapter_of(tmp_path, base))
    (notice,) = said(plan, "trained on", shown, "the folder given", "--base")
    assert "ana" not in notice
    assert "llama-2-7b'" not in notice  # a pack does not depend on where its inputs lay


def test_tokens_and_chat_form_beside_an_adapter_are_said(
    tmp_path: Path, llama_folder: Path
) -> None:
    """As trl and unsloth leave them: tokenizer_config.json of transformers 4."""
    adapter = adapter_of(tmp_path, None)
    decoder = {"1": {"content": "<s>"}, "320": {"content": "<|im_start|>"}}
    config: dict[str, Any] = {"added_tokens_decoder": decoder, "chat_template": "{{ x }}"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    plan = planned(tmp_path, base=llama_folder, adapter=adapter)
    (notice,) = said(plan, "'<|im_start|>', which the base lacks")
    assert "'<s>'" not in notice
    assert said(plan, "chat template lies beside the adapter", "'continuacao'", "--template")


def test_damaged_tokenizer_beside_an_adapter_is_named(tmp_path: Path, llama_folder: Path) -> None:
    adapter = adapter_of(tmp_path, None)
    (adapter / "added_tokens.json").write_text("{")
    with pytest.raises(MedllmError, match=r"added_tokens\.json is not valid JSON"):
        planned(tmp_path, base=llama_folder, adapter=adapter)


def test_model_saved_by_transformers_with_tokens_of_its_own_is_packed_with_them(
    tmp_path: Path, llama_folder: Path, tokenizer: bytes
) -> None:
    """What transformers writes today, and the tokenizer.model of the base beside it."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    own = AutoTokenizer.from_pretrained(llama_folder)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.add_tokens(["anamnese"])
    own.eos_token = "<|im_end|>"
    own.chat_template = "{{ messages }}"
    model.resize_token_embeddings(len(own), mean_resizing=False)
    model.save_pretrained(tmp_path / "m")
    own.save_pretrained(tmp_path / "m")
    with pytest.raises(MedllmError, match=r"no tokenizer\.model.*Copy it from the base model"):
        planned(tmp_path, merged=tmp_path / "m")
    (tmp_path / "m/tokenizer.model").write_bytes(tokenizer)
    plan = planned(tmp_path, merged=tmp_path / "m")
    assert said(plan, "chat template lies beside the weights")
    build(plan)
    fields = gguf.GGUFReader(tmp_path / "out/Pico-F16.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == own.convert_ids_to_tokens(list(range(len(own))))
    assert fields["tokenizer.ggml.eos_token_id"].contents() == own.eos_token_id == 321


@pytest.mark.parametrize("own", [True, False])
def test_model_of_ones_own_under_a_shipped_name_is_said(
    tmp_path: Path, llama_folder: Path, llama_adapter: Path, own: bool
) -> None:
    """A copied recipe says what its owner wrote; the shipped one names other authors."""
    path = recipe_path("7b")
    request = Request(
        recipe=load_recipe(path), folder=path.parent if own else tmp_path, out=tmp_path / "out",
        base=str(llama_folder), adapter=str(llama_adapter), variants=["f16"],
    )  # fmt: skip
    found = said(make_plan(request, report=Silent()), "authors", "recipes copy")
    assert bool(found) is own


def test_folder_of_a_trainer_names_its_last_checkpoint(tmp_path: Path, llama_folder: Path) -> None:
    for step in (100, 1000, 900):
        (tmp_path / f"out-of-trl/checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(MedllmError, match=r"such as …/checkpoint-1000"):
        planned(tmp_path, base=llama_folder, adapter=tmp_path / "out-of-trl")


def test_pickled_adapter_is_to_be_saved_by_peft(tmp_path: Path, llama_folder: Path) -> None:
    adapter = adapter_of(tmp_path, None)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(MedllmError, match=r"only as pickle.*PEFT, then save_pretrained"):
        planned(tmp_path, base=llama_folder, adapter=adapter)


def test_file_in_place_of_its_folder_is_said(tmp_path: Path, llama_folder: Path) -> None:
    adapter = adapter_of(tmp_path, None)
    for path in (Path("../adapter/adapter_model.safetensors"), adapter / "adapter_config.json"):
        with pytest.raises(MedllmError, match="name the folder that it lies in"):
            planned(tmp_path, base=llama_folder, adapter=path)


def test_way_around_a_refusal_works_as_the_manual_has_it(
    tmp_path: Path, llama_folder: Path, tokenizer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of docs/own-model.md, on an adapter with tokens and whole modules of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = AutoTokenizer.from_pretrained(llama_folder)
    own.add_tokens(["<|fim|>"], special_tokens=True)
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float16)
    base.resize_token_embeddings(len(own), mean_resizing=False)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about the vocabulary that has grown
        get_peft_model(base, config).save_pretrained(tmp_path / "my-lora")
    own.save_pretrained(tmp_path / "my-lora")
    with pytest.raises(MedllmError, match=r"modules_to_save.*merge it with PEFT"):
        planned(tmp_path, base=llama_folder, adapter=tmp_path / "my-lora")
    (tmp_path / "llama-2-7b").symlink_to(llama_folder)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/own-model.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "docs/own-model.md", "exec"), {})
    (tmp_path / "merged/tokenizer.model").write_bytes(tokenizer)
    plan = planned(tmp_path, merged=tmp_path / "merged")
    assert plan.vocabulary.tokens[320] == "<|fim|>"
