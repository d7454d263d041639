"""Parity: sound packs pass, and every planted fault is caught on its rung, with exit code 3."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import typer
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from typer.testing import CliRunner

from medllm_pack.cli.parity import parity
from medllm_pack.errors import (
    CheckFailedError,
    MedllmError,
    SourceError,
    UsageError,
    WriteError,
)
from medllm_pack.gguf.reader import read_gguf
from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.parity import allowance, ways, whole, worker
from medllm_pack.parity.checks import Verdict, at_most
from medllm_pack.parity.measures import KLD_EDGES, KLD_QUANTILES, compare, spread, summarize
from medllm_pack.parity.nameless import Nameless
from medllm_pack.parity.original import Original, Sources, Weights
from medllm_pack.parity.reference import compute_logits
from medllm_pack.parity.report.details import translate
from medllm_pack.parity.report.page import page
from medllm_pack.parity.run import Result, check_pack
from medllm_pack.parity.runtime import Runtime, layers
from medllm_pack.parity.seen import _fit
from medllm_pack.parity.texts import read_texts, shipped_texts
from medllm_pack.parity.tokens import STRINGS, Tokenizer
from medllm_pack.progress import Silent
from medllm_pack.quant import ggml
from medllm_pack.quant.mixes import load_mix, mix_names
from medllm_pack.recipe import load_recipe, recipe_path
from tests import pico
from tests.test_bad_input import run as command
from tests.test_build import check_sums, importance, run, variant, write_importance

TEXTS = shipped_texts(count=2)
SHAPES = {"llama": pico.LLAMA, "mistral": pico.MISTRAL}
Made = tuple[Path, Sources]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Sources:
    """Base and adapter of a LLaMA-like pico model."""
    folder = tmp_path_factory.mktemp("inputs")
    base = pico.write_model(folder / "base", tokenizer=tokenizer)
    adapter = pico.write_adapter(folder / "adapter")
    return Sources(base=str(base), adapter=str(adapter))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, inputs: Sources) -> Path:
    """A sound pack of it."""
    return build_pack(tmp_path_factory.mktemp("built") / "pack", inputs, ["f16"])


@pytest.fixture(scope="module")
def built_twice(tmp_path_factory: pytest.TempPathFactory, inputs: Sources) -> Path:
    """A sound pack with a quantized variant."""
    return build_pack(tmp_path_factory.mktemp("twice") / "pack", inputs, ["q8_0", "f16"])


@pytest.fixture(scope="module")
def f16(built: Path, inputs: Sources) -> Made:
    """The sound pack and what it was made from."""
    return built, inputs


@pytest.fixture(scope="module")
def q4_k_m(tmp_path_factory: pytest.TempPathFactory, inputs: Sources) -> Made:
    """A sound pack of a Q4_K_M variant."""
    return build_pack(tmp_path_factory.mktemp("q4") / "pack", inputs, ["q4_k_m"]), inputs


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Made:
    """A sound pack of a model whose heads share keys."""
    folder = tmp_path_factory.mktemp("grouped")
    base = pico.write_model(folder / "b", pico.MISTRAL, tokenizer=tokenizer)
    inputs = Sources(str(base), str(pico.write_adapter(folder / "a", pico.MISTRAL)))
    return build_pack(folder / "pack", inputs, ["f16"]), inputs


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the reference for all tests: the texts are the same."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def pack(built: Path, tmp_path: Path) -> Path:
    """A copy of the sound pack, to be spoiled."""
    return Path(shutil.copytree(built, tmp_path / "pack"))


@pytest.fixture
def two(built_twice: Path, tmp_path: Path) -> Path:
    """A copy of the sound pack of two variants, to be spoiled."""
    return Path(shutil.copytree(built_twice, tmp_path / "two"))


def build_pack(
    out: Path,
    inputs: Sources,
    quants: list[str],
    *,
    base: Path | None = None,
    adapter: Path | None = None,
) -> Path:
    """Build a pack of the inputs, or of others in their place."""
    base = base or Path(inputs.base or "")
    run(out, quants=quants, base=base, adapter=adapter or Path(inputs.adapter or ""))
    return out


def check(pack: Path, inputs: Sources | None = None) -> Result:
    return check_pack(
        pack, texts=TEXTS, sources=inputs, runtime=Runtime(threads=1), report=Silent()
    )


def reseal(pack: Path) -> None:
    """Let pack.json say that the files are as they were built: the fault is the builder's."""
    path = pack / "pack.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for entry in document["variants"]:
        entry["sha256"] = hashlib.sha256((pack / entry["file"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(document), encoding="utf-8")


class Editor:
    """Changes a GGUF file in place, through gguf-py's reader."""

    def __init__(self, path: Path) -> None:
        self.reader = gguf.GGUFReader(path, "r+")
        self.data = {tensor.name: tensor.data for tensor in self.reader.tensors}

    def swap(self, one: str, other: str) -> None:
        kept = self.data[one].copy()
        self.data[one][:] = self.data[other]
        self.data[other][:] = kept

    def set(self, key: str, value: float) -> None:
        self.reader.fields[key].parts[-1][0] = value

    def items(self, key: str) -> list[NDArray[Any]]:
        field = self.reader.fields[key]
        return [field.parts[i] for i in field.data]


# --- sound packs


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_reference_equals_the_ordinary_forward_of_transformers_and_peft(
    tmp_path: Path, tokenizer: bytes, name: str, dtype: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shape = SHAPES[name]
    base = pico.write_model(tmp_path / "b", shape, dtype=dtype, shards=2, tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "a", shape)
    original = Original(*({p.name: p for p in folder.iterdir()} for folder in (base, adapter)))
    sequences = [[1, *range(260, 300)], [1, 7]]
    with Nameless() as place:
        paths = compute_logits(original, sequences, place=place, report=Silent())
        ours = [np.load(path) for path in paths]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter))
    for logits, ids in zip(ours, sequences, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        # Seen: equal to the bit on both shapes; the logits' spread is about 0.8.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_sound_pack_passes_every_rung(tmp_path: Path, tokenizer: bytes, name: str) -> None:
    shape = SHAPES[name]
    base = pico.write_model(tmp_path / "b", shape, dtype="BF16", tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "a", shape)
    quants = ["f16", "bf16", "q8_0", "q4_k_m"]
    run(tmp_path / "p", quants=quants, base=base, adapter=adapter)
    result = check(tmp_path / "p", Sources(str(base), str(adapter)))
    assert [v.failed for v in result.verdicts] == [None] * 4
    rungs = [c.rung for c in result.verdicts[0].checks]
    assert list(dict.fromkeys(rungs)) == [
        "file", "settings", "merge", "weights", "tokens", "template", "logits", "generation",
    ]  # fmt: skip
    by_size = [result.verdicts[i].figures["kld_mean"] for i in (0, 2, 3)]
    assert by_size == sorted(by_size)
    check_sums(tmp_path / "p")
    manifest = json.loads((tmp_path / "p" / "pack.json").read_text(encoding="utf-8"))
    assert manifest["parity"]["passed"] is True
    assert [v["quant"] for v in manifest["parity"]["variants"]] == quants
    assert manifest["parity"]["texts"] == TEXTS.document()
    assert json.loads((tmp_path / "p" / "parity.json").read_text()) == result.document
    tensors = [len(v["tensors"]) for v in result.document["variants"]]
    assert tensors == [len(read_gguf(variant(tmp_path / "p", "F16")).tensors)] * 4
    html = (tmp_path / "p" / "parity.html").read_text(encoding="utf-8")
    assert html == page(manifest, result.document)


def test_pack_whose_head_was_trained_passes_with_its_pair_proven(
    tmp_path: Path, tokenizer: bytes
) -> None:
    base = pico.write_model(tmp_path / "b", dtype="BF16", tokenizer=tokenizer)
    head = pico.weights(pico.LLAMA, "BF16")["lm_head.weight"]
    adapter = pico.write_head_adapter(tmp_path / "a", head)
    run(tmp_path / "p", quants=["f16", "q4_k_m"], base=base, adapter=adapter)
    result = check(tmp_path / "p", Sources(str(base), str(adapter)))
    for verdict in result.verdicts:
        assert verdict.failed is None
        assert {c.name: c.measured for c in verdict.checks}["merge.pairs"] == 3
    manifest = json.loads((tmp_path / "p" / "pack.json").read_text(encoding="utf-8"))
    assert manifest["adapter"]["tensors"] == 7


def test_variants_made_with_an_importance_matrix_pass_and_have_limits_of_their_own(
    tmp_path: Path, inputs: Sources
) -> None:
    matrix = write_importance(tmp_path / "m.gguf", importance(pico.LLAMA))
    base, adapter = Path(inputs.base or ""), Path(inputs.adapter or "")
    quants = ["q6_k", "q2_k_s", "iq2_xxs"]
    run(tmp_path / "p", quants=quants, base=base, adapter=adapter, imatrix=matrix)
    verdicts = check(tmp_path / "p", inputs).verdicts
    assert [v.failed for v in verdicts] == [None] * 3
    [block] = [c for c in verdicts[0].checks if c.name == "weights.worst_block"]
    assert block.limit == "<= 1"


def test_pack_of_merged_weights_passes_without_a_merge_proof(
    tmp_path: Path, inputs: Sources
) -> None:
    run(tmp_path / "p", quants=["f16"], merged=Path(inputs.base or ""))
    [verdict] = check(tmp_path / "p", Sources(merged=inputs.base)).verdicts
    assert verdict.passed
    assert {c.name: c.passed for c in verdict.checks}["merge.pairs"] is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 320, "content": "<|im_end|>"}]}),
        ("added_tokens.json", {"<|im_end|>": 320}),
        ("added_tokens.json", {"<|im_end|>": 777}),  # without a row: what the pieces say counts
    ],
)
def test_end_of_text_that_was_added_is_among_the_inputs_and_passes(
    tmp_path: Path, tokenizer: bytes, name: str, content: dict[str, Any]
) -> None:
    base = pico.write_model(tmp_path / "b", replace(pico.LLAMA, vocab=321), tokenizer=tokenizer)
    (base / name).write_text(json.dumps(content))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    inputs = Sources(str(base), str(pico.write_adapter(tmp_path / "a")))
    pack = build_pack(tmp_path / "p", inputs, ["f16"])
    recorded = json.loads((pack / "pack.json").read_text(encoding="utf-8"))["inputs"][0]["files"]
    digest = hashlib.sha256((base / name).read_bytes()).hexdigest()
    assert [file["sha256"] for file in recorded if file["name"] == name] == [digest]
    [verdict] = check(pack, inputs).verdicts
    assert verdict.failed is None
    (base / name).write_text("{}")
    with pytest.raises(SourceError, match=rf"'{name}' is not the file that the pack"):
        check(pack, inputs)


def test_eos_behind_every_prompt_is_named(tmp_path: Path, inputs: Sources) -> None:
    base = Path(shutil.copytree(inputs.base or "", tmp_path / "b"))
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_eos_token": True}))
    pack = build_pack(tmp_path / "p", inputs, ["f16"], base=base)
    assert "sets add_eos_token" in (pack / "pack.json").read_text(encoding="utf-8")
    failed = check(pack, Sources(str(base), inputs.adapter)).verdicts[0].failed
    assert failed is not None
    assert failed.name == "template.end"
    assert "set add_eos_token to false" in failed.detail
    assert not [part for part in translate(failed.detail, str) if part.foreign]


WORDS = {
    "320": {"content": "mmHg", "special": False}, "321": {"content": "<|im_end|>", "special": True},
    "322": {"content": "hipertens", "special": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Sources:
    """A model with words, and an end of text, that were added to its tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    shape = pico.with_rows(pico.LLAMA, 324)
    base = pico.write_model(folder / "b", shape, tokenizer=tokenizer)
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"added_tokens_decoder": WORDS, "legacy": True}
    path.write_text(json.dumps(config | {"eos_token": "<|im_end|>", "pad_token": "<unk>"}))
    return Sources(str(base), str(pico.write_adapter(folder / "a")))


def test_model_with_words_that_were_added_passes(tmp_path: Path, words: Sources) -> None:
    pack = build_pack(tmp_path / "p", words, ["f16"])
    old, new = "{{ .Prompt }}", "<|im_end|>{{ .Prompt }}"
    modelfile_changed(pack, old, new)
    [verdict] = check(pack, words).verdicts
    assert [c.name for c in verdict.checks if c.passed is False] == ["template.digest"]


@pytest.mark.parametrize("text", ["PA 130x80 mmHg, hipertensa", "dor\n<|im_end|>\nfim</s>b", "a"])
def test_added_tokens_are_cut_out_as_transformers_does_it(text: str, words: Sources) -> None:
    from transformers import AutoTokenizer

    files = {path.name: path for path in Path(words.base or "").iterdir()}
    ours = Tokenizer(Original(files, None)).encode(text, special=True)
    assert ours == AutoTokenizer.from_pretrained(words.base)(text)["input_ids"]


@pytest.mark.parametrize("place", ["tokenizer.json", "added_tokens.json"])
def test_token_that_takes_the_place_of_a_piece_passes(
    tmp_path: Path, tokenizer: bytes, place: str
) -> None:
    base = pico.write_model(tmp_path / "b", tokenizer=tokenizer)
    pieces = SentencePieceProcessor(model_proto=tokenizer)
    used = {id_ for text in STRINGS for id_ in pieces.encode(text)}
    free = max(set(range(259, pieces.vocab_size())) - used)
    content = {"added_tokens": [{"id": free, "content": "<|fim|>"}]}
    (base / place).write_text(json.dumps(content if "r.j" in place else {"<|fim|>": free}))
    inputs = Sources(str(base), str(pico.write_adapter(tmp_path / "a")))
    [verdict] = check(build_pack(tmp_path / "p", inputs, ["f16"]), inputs).verdicts
    assert verdict.failed is None


def test_tiny_passes_with_the_sources_that_its_recipe_names(tmp_path: Path) -> None:
    path = recipe_path("tiny")
    request = Request(
        recipe=load_recipe(path), folder=path.parent, out=tmp_path / "tiny",
        variants=("f16", "q8_0", "q4_k_m"),
    )  # fmt: skip
    build(make_plan(request, report=Silent()), threads=2)
    result = check(tmp_path / "tiny")
    assert [v.failed for v in result.verdicts] == [None] * 3


def test_limits_of_the_recipe_count_and_are_told_wherever_the_verdict_is(
    tmp_path: Path, inputs: Sources
) -> None:
    text = (
        "[parity.variants.q8_0]\nkld_mean = 1e-9\n[parity.variants.f16]\nkld_p99 = 0.5\n"
        "[parity.generation.ties]\nf16 = 0.01\n[parity.tensors.Q4_K]\nrmse = 0.5\n"
    )
    recipe = pico.write_recipe(
        tmp_path / "r", {"base": Path(inputs.base or ""), "adapter": Path(inputs.adapter or "")},
        text=text,
    )  # fmt: skip
    request = Request(
        recipe=load_recipe(recipe), folder=recipe.parent, out=tmp_path / "p",
        variants=("f16", "q8_0"),
    )  # fmt: skip
    build(make_plan(request, report=Silent()), threads=1)
    result = check(tmp_path / "p", inputs)
    failed = result.verdicts[1].failed
    assert failed is not None
    assert (failed.name, failed.limit) == ("logits.kld_mean", "<= 1e-09")
    # Q4_K has no tensor here, so its limit did not count.
    expected = {
        "f16": [
            {"name": "variants.f16.kld_p99", "shipped": 0.001, "used": 0.5, "looser": True},
            {"name": "generation.ties.f16", "shipped": 0.02, "used": 0.01, "looser": False},
        ],
        "q8_0": [
            {"name": "variants.q8_0.kld_mean", "shipped": 0.004, "used": 1e-9, "looser": False}
        ],
    }
    pack = json.loads((tmp_path / "p" / "pack.json").read_text(encoding="utf-8"))
    for document in (result.document, pack["parity"]):
        assert {v["quant"]: v["limits"] for v in document["variants"]} == expected
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    assert "Limits of f16 that its recipe sets: variants.f16.kld_p99 0.5 (looser; shipped" in card
    page_ = (tmp_path / "p" / "parity.html").read_text(encoding="utf-8")
    assert page_.count("<code>variants.f16.kld_p99</code>") == 2  # in both languages
    ended = invoke(tmp_path / "p", inputs, "-q")
    assert "f16: limit of the recipe: variants.f16.kld_p99 0.5 (looser" in ended.stdout


def test_weights_of_the_model_are_read_once_for_all_variants(
    two: Path, inputs: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int, int]] = []
    rows = Weights.rows

    def noted(self: Weights, name: str, start: int, stop: int) -> Any:
        read.append((name, start, stop))
        return rows(self, name, start, stop)

    monkeypatch.setattr(Weights, "rows", noted)
    result = check_pack(two, sources=inputs, report=Silent())
    assert [verdict.passed for verdict in result.verdicts] == [True, True]
    assert len(read) == len(set(read))
    assert {name for name, _, _ in read} > {"model.embed_tokens.weight", "model.norm.weight"}


def test_what_a_run_depends_on_is_recorded_and_threads_are_not(pack: Path, inputs: Sources) -> None:
    found = []
    for threads in (1, 3):
        runtime = Runtime(threads=threads, ctx=64)
        check_pack(pack, texts=TEXTS, sources=inputs, runtime=runtime, report=Silent())
        found.append((pack / "parity.json").read_bytes())
    assert found[0] == found[1]
    assert json.loads(found[0])["llama.cpp"] == {"ctx": 64, "gpu_layers": 0}
    assert Runtime(gpu_layers=layers("all")).document()["gpu_layers"] == "all"


def test_checking_again_gives_the_same_bytes(pack: Path, inputs: Sources) -> None:
    check(pack, inputs)
    first = {p.name: p.read_bytes() for p in pack.iterdir()}
    check(pack, inputs)
    assert {p.name: p.read_bytes() for p in pack.iterdir()} == first


# --- planted faults


def not_merged(pack: Path, inputs: Sources) -> None:
    other = pack.parent / "other"
    run(other, quants=["f16", "q8_0"], merged=Path(inputs.base or ""))
    take(pack, other)


def scale_of_one(pack: Path, inputs: Sources) -> None:
    adapter = pico.write_adapter(pack.parent / "a", config=pico.adapter_config(lora_alpha=8))
    take(pack, build_pack(pack.parent / "other", inputs, ["f16", "q8_0"], adapter=adapter))


def scale_of_rslora(pack: Path, inputs: Sources) -> None:
    adapter = pico.write_adapter(pack.parent / "a", config=pico.adapter_config(use_rslora=True))
    take(pack, build_pack(pack.parent / "other", inputs, ["f16", "q8_0"], adapter=adapter))


def scale_by_dropout(pack: Path, inputs: Sources) -> None:
    """As training has it: what dropout leaves is made larger."""
    config = pico.adapter_config(lora_alpha=16 / 0.9)
    adapter = pico.write_adapter(pack.parent / "a", config=config)
    quants = ["q8_0", "q4_k_m", "q2_k"]
    take(pack, build_pack(pack.parent / "other", inputs, quants, adapter=adapter))


def pairs_swapped_between_q_and_v(pack: Path, inputs: Sources) -> None:
    names = {"q_proj": "v_proj", "v_proj": "q_proj"}
    tensors = {
        key.replace(kind, names[kind]): value
        for key, value in pico.adapter_tensors(pico.LLAMA).items()
        for kind in names
        if kind in key
    }
    adapter = pico.write_adapter(pack.parent / "a", tensors=tensors)
    take(pack, build_pack(pack.parent / "other", inputs, ["f16", "q8_0"], adapter=adapter))


def another_model(pack: Path, inputs: Sources) -> None:
    tensors = {name: value[::-1] for name, value in pico.weights(pico.LLAMA, "F16").items()}
    tokenizer = (Path(inputs.base or "") / "tokenizer.model").read_bytes()
    base = pico.write_model(pack.parent / "b", tensors=tensors, tokenizer=tokenizer)
    take(pack, build_pack(pack.parent / "other", inputs, ["f16", "q8_0"], base=base))


def take(pack: Path, other: Path) -> None:
    for file in pack.glob("*.gguf"):
        shutil.copyfile(other / file.name, file)


def q_rows_not_permuted(pack: Path, inputs: Sources) -> None:
    data = Editor(variant(pack, "F16")).data
    for i in range(pico.LLAMA.layers):
        rows = data[f"blk.{i}.attn_q.weight"]
        heads = rows.reshape(pico.LLAMA.heads, pico.LLAMA.head_dim // 2, 2, -1)
        rows[:] = heads.swapaxes(1, 2).reshape(rows.shape).copy()


def layers_swapped(pack: Path, inputs: Sources) -> None:
    editor = Editor(variant(pack, "F16"))
    for name in [name for name in editor.data if name.startswith("blk.0.")]:
        editor.swap(name, name.replace("blk.0.", "blk.1."))


def tensor_zeroed(pack: Path, inputs: Sources) -> None:
    Editor(variant(pack, "F16")).data["blk.1.ffn_down.weight"][:] = 0


def bit_flipped(pack: Path, inputs: Sources) -> None:
    Editor(variant(pack, "F16")).data["blk.0.ffn_up.weight"].view(np.uint16)[3, 5] ^= 1


def norm_changed(pack: Path, inputs: Sources) -> None:
    Editor(variant(pack, "F16")).data["output_norm.weight"][7] *= 1.001


def wrong_rope_base(pack: Path, inputs: Sources) -> None:
    Editor(variant(pack, "F16")).set("llama.rope.freq_base", 500000.0)


def wrong_epsilon(pack: Path, inputs: Sources) -> None:
    Editor(variant(pack, "F16")).set("llama.attention.layer_norm_rms_epsilon", 1e-6)


def vocabulary_swapped(pack: Path, inputs: Sources) -> None:
    tokens = Editor(variant(pack, "F16")).items("tokenizer.ggml.tokens")[259:]
    one, other = next(
        (a, b) for i, a in enumerate(tokens) for b in tokens[i + 1 :] if len(a) == len(b)
    )
    kept = one.copy()
    one[:], other[:] = other, kept


def score_sign_wrong(pack: Path, inputs: Sources) -> None:
    for score in Editor(variant(pack, "F16")).items("tokenizer.ggml.scores")[259:]:
        score *= -1


def token_of_another_type(pack: Path, inputs: Sources, *, id_: int, kind: gguf.TokenType) -> None:
    Editor(variant(pack, "F16")).items("tokenizer.ggml.token_type")[id_][0] = kind


def header_says_more(pack: Path, inputs: Sources, *, key: str, value: Any) -> None:
    path = variant(pack, "F16")
    kinds = {int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    more = {key: MetadataDetails(kinds[type(value)], value)}
    copy_with_new_metadata(gguf.GGUFReader(path), writer, more, [])
    path.with_suffix(".new").replace(path)


def bos_off(pack: Path, inputs: Sources) -> None:
    Editor(variant(pack, "F16")).set("tokenizer.ggml.add_bos_token", 0)


def modelfile_changed(pack: Path, old: str, new: str) -> None:
    path = pack / "Modelfile.f16"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def double_bos(pack: Path, inputs: Sources) -> None:
    modelfile_changed(pack, 'TEMPLATE """', 'TEMPLATE """<s>')


def stop_that_never_occurs(pack: Path, inputs: Sources) -> None:
    modelfile_changed(pack, "TEMPLATE", 'PARAMETER stop """\u2581fim"""\nTEMPLATE')


def stop_at_once(pack: Path, inputs: Sources) -> None:
    modelfile_changed(pack, "TEMPLATE", 'PARAMETER stop """e"""\nTEMPLATE')


def end_within_a_word(pack: Path, inputs: Sources) -> None:
    modelfile_changed(pack, "{{ .Response }}", " {{ .Response }}")


def other_template(pack: Path, inputs: Sources) -> None:
    modelfile_changed(pack, "{{ .Prompt }}", "{{ .Prompt }}\n")


def adapter_by_the_modelfile(pack: Path, inputs: Sources) -> None:
    modelfile_changed(pack, "TEMPLATE", "ADAPTER ./lora\nTEMPLATE")


def k_permuted_as_q(pack: Path, inputs: Sources) -> None:
    shape = pico.MISTRAL
    rows = Editor(variant(pack, "F16")).data["blk.1.attn_k.weight"]
    theirs = rows.reshape(shape.kv_heads, shape.head_dim // 2, 2, -1).swapaxes(1, 2)
    wrong = theirs.reshape(shape.heads, 2, -1, rows.shape[1]).swapaxes(1, 2)
    rows[:] = wrong.reshape(rows.shape).copy()


def wrong_scales(pack: Path, inputs: Sources) -> None:
    rows = Editor(variant(pack, "Q4_K_M")).data["blk.0.ffn_up.weight"]
    blocks = rows.reshape(-1, 144)  # d, dmin, 12 bytes of scales, 128 of weights
    blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * np.float16(1.25)).view(np.uint8)


def another_vocabulary(pack: Path, inputs: Sources, *, pieces: int) -> None:
    shape = pico.with_rows(pico.LLAMA, pieces)
    tokenizer = pico.train_tokenizer(pack.parent / "t", vocab=pieces)
    base = pico.write_model(pack.parent / "b", shape, tokenizer=tokenizer)
    take(pack, build_pack(pack.parent / "other", inputs, ["f16"], base=base))


def token_twice(pack: Path, inputs: Sources) -> None:
    tokens = Editor(variant(pack, "F16")).items("tokenizer.ggml.tokens")
    tokens[-1][:] = tokens[-2]  # llama.cpp aborts


Fault = Callable[[Path, Sources], None]


@dataclass(frozen=True)
class Planted:
    """A fault of whoever built the pack.

    Attributes:
        plant: puts it into a pack.
        check: the one that names it.
        said: a part of what it says.
        heard: whether the logits alone would have noticed.
        pack: fixture of the pack.
    """

    plant: Fault
    check: str
    said: str
    heard: bool
    pack: str = "f16"


FAULTS = {
    "adapter not merged":
        Planted(not_merged, "merge.pairs", "holds nothing of the adapter", True),
    "alpha ignored (scale 1)":
        Planted(scale_of_one, "merge.pairs", "0.500 times what the adapter adds", True),
    "alpha taken for rsLoRA's":
        Planted(scale_of_rslora, "merge.pairs", "2.828 times what the adapter adds", True),
    "A and B swapped between q and v":
        Planted(pairs_swapped_between_q_and_v, "merge.pairs", "of the adapter", True),
    "q rows not permuted":
        Planted(q_rows_not_permuted, "weights.exact", "rows in Hugging Face's order", True),
    "k permuted as q with grouped heads":
        Planted(k_permuted_as_q, "weights.exact", "blk.1.attn_k.weight", True, "grouped"),
    "two layers swapped":
        Planted(layers_swapped, "weights.exact", "holds blk.1.", True),
    "one tensor zeroed":
        Planted(tensor_zeroed, "weights.exact", "blk.1.ffn_down.weight is all zero", True),
    "one bit flipped in the data":
        Planted(bit_flipped, "weights.exact", "blk.0.ffn_up.weight: 1 of", False),
    "wrong rope base":
        Planted(wrong_rope_base, "settings", "llama.rope.freq_base is '500000.0'", True),
    "wrong norm epsilon":
        Planted(wrong_epsilon, "settings", "epsilon", False),
    "two vocabulary entries swapped":
        Planted(vocabulary_swapped, "tokens.vocabulary", "token ", False),
    "score sign wrong":
        Planted(score_sign_wrong, "tokens.vocabulary", "score", False),
    "a piece that is not shown, as a control token":
        Planted(partial(token_of_another_type, id_=300, kind=gguf.TokenType.CONTROL),
                "tokens.vocabulary", "token 300 is of the type control, not normal", False),
    "a piece that is cut out of any text":
        Planted(partial(token_of_another_type, id_=300, kind=gguf.TokenType.USER_DEFINED),
                "tokens.vocabulary", "token 300 is of the type user-defined", False),
    "an end of text that is shown":
        Planted(partial(token_of_another_type, id_=2, kind=gguf.TokenType.NORMAL),
                "tokens.vocabulary", "token 2 is of the type normal, not control", False),
    "another token that ends an answer":
        Planted(partial(header_says_more, key="tokenizer.ggml.eot_token_id", value=300),
                "tokens.vocabulary", "eot_token_id is '300', the tokenizer says None", False),
    "a chat template of another model":
        Planted(partial(header_says_more, key="tokenizer.chat_template", value="{{ 'x' }}"),
                "tokens.vocabulary", "chat_template is", False),
    "a setting that config.json does not know":
        Planted(partial(header_says_more, key="llama.attention.sliding_window", value=64),
                "settings", "sliding_window is '64', the model has None", False),
    "add_bos off":
        Planted(bos_off, "tokens.vocabulary", "add_bos_token", False),
    "double BOS by the template":
        Planted(double_bos, "template.bos", "3 BOS in one of 3 prompts", False),
    "a stop that can never occur":
        Planted(stop_that_never_occurs, "template.stops", "can never occur", False),
    "a Q4_K tensor quantized with wrong scales":
        Planted(wrong_scales, "weights.rmse", "blk.0.ffn_up.weight (Q4_K)", True, "q4_k_m"),
    "a variant of another model":
        Planted(another_model, "weights.exact", "values differ", True),
    # Beyond what must be caught.
    "another model with fewer tokens":
        Planted(partial(another_vocabulary, pieces=310), "settings", "llama.vocab_size", True),
    "another model with more tokens":
        Planted(partial(another_vocabulary, pieces=340), "settings", "llama.vocab_size", True),
    "one weight of a norm off by 0.1 %":
        Planted(norm_changed, "weights.exact", "output_norm.weight: 1 of", False),
    "a stop that ends every answer":
        Planted(stop_at_once, "template.stops", "near the beginning of most notes", False),
    "a prompt that ends within a word":
        Planted(end_within_a_word, "template.end", "do not end where an answer begins", False),
    "another template":
        Planted(other_template, "template.digest", "not the one that pack.json names", False),
    "an adapter that the Modelfile adds":
        Planted(adapter_by_the_modelfile, "template.modelfile", "'ADAPTER ./lora'", False),
    "a token twice, on which llama.cpp aborts":
        Planted(token_twice, "tokens.vocabulary", "token 319", True),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught_on_its_rung_with_exit_code_3(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = FAULTS[name]
    built, inputs = request.getfixturevalue(fault.pack)
    pack = Path(shutil.copytree(built, tmp_path / "pack"))
    fault.plant(pack, inputs)
    reseal(pack)
    monkeypatch.setenv("MEDLLM_CACHE", str(kept))
    capsys.readouterr()
    code, out, err = command(
        ["parity", str(pack), f"--base={inputs.base}", f"--adapter={inputs.adapter}",
         "--threads=1", "-q"], capsys,
    )  # fmt: skip
    assert code == 3, err
    [line] = err.splitlines()
    assert line.startswith(f"error: {fault.pack if fault.pack != 'grouped' else 'f16'} is not ")
    assert f": {fault.check}: " in line
    assert "Usual cause: " in line
    assert f"failed at {fault.check}" in out
    [found] = json.loads((pack / "parity.json").read_text(encoding="utf-8"))["variants"]
    checks = {check["name"]: check for check in found["checks"]}
    assert fault.said in checks[fault.check]["detail"]
    for check in found["checks"]:  # the page says all of it in Portuguese, too
        assert not [part for part in translate(check["detail"], str) if part.foreign], check
    heard = any(c["passed"] is False for n, c in checks.items() if n.startswith("logits"))
    assert heard is fault.heard
    manifest = json.loads((pack / "pack.json").read_text(encoding="utf-8"))
    assert manifest["parity"]["passed"] is False
    assert manifest["parity"]["variants"][0]["failed"] == fault.check


@pytest.mark.parametrize("fault", [not_merged, scale_of_one])
def test_fault_of_the_merge_shows_in_a_quantized_variant_alone(
    two: Path, inputs: Sources, fault: Fault
) -> None:
    fault(two, inputs)
    reseal(two)
    failed = check(two, inputs).verdicts[0].failed
    assert failed is not None
    assert failed.name == "merge.pairs"


def test_scale_off_by_a_tenth_shows_in_every_quantized_variant(
    tmp_path: Path, inputs: Sources
) -> None:
    pack = build_pack(tmp_path / "p", inputs, ["q8_0", "q4_k_m", "q2_k"])
    assert check(pack, inputs).passed
    scale_by_dropout(pack, inputs)
    reseal(pack)
    for verdict in check(pack, inputs).verdicts:
        assert verdict.failed is not None
        assert verdict.failed.name == "merge.pairs"
        assert "holds 1.1" in verdict.failed.detail


@pytest.mark.parametrize("kind", ["Q4_K", "Q2_K", "IQ1_M"])
def test_what_a_quantizer_shrinks_is_not_missed_from_a_small_adapter(kind: str) -> None:
    """Rows of W lean towards D, as trained ones do, and a matrix lets go of most columns."""
    random = np.random.default_rng(1)
    w = random.standard_normal((512, 1024)) * 0.02
    d = random.standard_normal((512, 8)) @ random.standard_normal((8, 1024))
    d *= 0.03 * np.linalg.norm(w) / np.linalg.norm(d)
    w += d
    weights = np.exp(2 * random.standard_normal(1024)).astype(np.float32)
    for share in (1.0, 1.1):
        data = ggml.quantize((w + share * d).astype(np.float32), kind, importance=weights)
        s = gguf.quants.dequantize(data.reshape(512, -1), gguf.GGMLQuantizationType[kind])
        products = [
            float((a * b).sum()) for a, b in ((s, s), (s, w), (w, w), (s, d), (w, d), (d, d))
        ]
        found, alike = _fit(*products)
        noise = np.linalg.norm(s - w - share * d) / np.sqrt(s.size) / np.linalg.norm(d)
        assert found == pytest.approx(share, abs=3 * noise)
        assert alike > 0.5


def test_quantized_variant_of_another_model_is_caught(two: Path, inputs: Sources) -> None:
    another_model(two, inputs)
    reseal(two)
    failed = check(two, inputs).verdicts[0].failed
    assert failed is not None
    assert failed.name == "weights.exact"  # the norms are in F32 there, too


def test_variant_under_the_name_of_another_is_caught(two: Path, inputs: Sources) -> None:
    """A file that is better than its name says, too; pack.json may repeat the mistake."""
    shutil.copyfile(variant(two, "F16"), variant(two, "Q8_0"))
    reseal(two)
    failed = check(two, inputs).verdicts[0].failed
    assert failed is not None
    assert failed.name == "file.variant"
    assert failed.detail == (
        "general.file_type is '1', of Q8_0 it is 7; the tensors are 16 F16, 5 F32, pack.json says "
        "5 F32, 16 Q8_0"
    )
    assert not [part for part in translate(failed.detail, str) if part.foreign]
    path = two / "pack.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["variants"][0]["types"] = {"F32": 5, "F16": 16}
    path.write_text(json.dumps(document), encoding="utf-8")
    failed = check(two, inputs).verdicts[0].failed
    assert failed is not None
    assert failed.detail == "general.file_type is '1', of Q8_0 it is 7"


def test_every_shipped_mix_bears_the_number_of_its_name() -> None:
    known = {kind.name.partition("_")[2].lower(): int(kind) for kind in gguf.LlamaFileType}
    for name in mix_names():
        assert load_mix(name).file_type == known[name]


def test_byte_flipped_after_the_build_is_caught_by_the_digest(pack: Path, inputs: Sources) -> None:
    bit_flipped(pack, inputs)
    failed = check(pack, inputs).verdicts[0].failed
    assert failed is not None
    assert failed.name == "file.digest"


def test_scale_of_a_quantized_block_that_is_wrong_is_caught(two: Path, inputs: Sources) -> None:
    rows = Editor(variant(two, "Q8_0")).data["blk.0.ffn_up.weight"]
    rows[3, 1] ^= 0x01  # a high bit of the first block's scale
    reseal(two)
    failed, sound = (v.failed for v in check(two, inputs).verdicts)
    assert sound is None
    assert failed is not None
    assert failed.name == "weights.worst_block"


def test_tensor_that_is_farthest_from_the_limit_of_its_type_is_named_first(
    q4_k_m: Made, tmp_path: Path
) -> None:
    """A cosine of Q6_K that is wrong is larger than a sound one of Q4_K."""
    built, inputs = q4_k_m
    pack = Path(shutil.copytree(built, tmp_path / "pack"))
    data = Editor(variant(pack, "Q4_K_M")).data
    for name, factor in (("output.weight", 1.12), ("blk.1.attn_v.weight", 1.2)):
        scales = data[name].reshape(-1, 210)[::2, -2:]  # of every second block
        scales[:] = (scales.copy().view(np.float16) * np.float16(factor)).view(np.uint8)
    reseal(pack)
    checks = {c.name: c for c in check(pack, inputs).verdicts[0].checks}
    for name in ("weights.rmse", "weights.cosine"):
        assert checks[name].passed is False
        assert checks[name].detail.startswith("blk.1.attn_v.weight (Q6_K): relative")
        assert "output.weight" in checks[name].detail


@pytest.mark.parametrize("name", ["output.weight", "blk.1.ffn_gate.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scale_that_is_no_number_is_caught_wherever_it_is(
    name: str, value: float, two: Path, inputs: Sources
) -> None:
    """Comparing with NaN is never true: it must not get lost among numbers."""
    rows = Editor(variant(two, "Q8_0")).data[name]
    rows[3, :2] = np.array([value], np.float16).view(np.uint8)
    reseal(two)
    checks = {c.name: c for c in check(two, inputs).verdicts[0].checks}
    for which in ("weights.rmse", "weights.cosine", "weights.worst_block"):
        assert checks[which].passed is False
        assert checks[which].detail == f"{name} holds values that are no finite numbers"


def test_one_wrong_row_is_caught_where_a_matrix_excuses_single_weights(
    tmp_path: Path, inputs: Sources
) -> None:
    """A token's row that is nothing, in a file whose weights may each be off by their block."""
    matrix = write_importance(tmp_path / "m.gguf", importance(pico.LLAMA))
    base, adapter = Path(inputs.base or ""), Path(inputs.adapter or "")
    run(tmp_path / "p", quants=["q4_k_m"], base=base, adapter=adapter, imatrix=matrix)
    assert check(tmp_path / "p", inputs).passed
    Editor(variant(tmp_path / "p", "Q4_K_M")).data["token_embd.weight"][5] = 0
    reseal(tmp_path / "p")
    failed = check(tmp_path / "p", inputs).verdicts[0].failed
    assert failed is not None
    assert failed.name == "weights.worst_row"
    assert failed.detail == "token_embd.weight (Q4_K): a row is off by 1 times what it holds"
    assert not [part for part in translate(failed.detail, str) if part.foreign]
    manifest = json.loads((tmp_path / "p" / "pack.json").read_text(encoding="utf-8"))
    manifest["recipe"]["parity"] = {"tensors": {"Q4_K": {"worst_row": 1.1}}}
    (tmp_path / "p" / "pack.json").write_text(json.dumps(manifest), encoding="utf-8")
    [verdict] = check(tmp_path / "p", inputs).verdicts
    [row] = [c for c in verdict.checks if c.name == "weights.worst_row"]
    assert (row.limit, row.passed) == ("<= 1.1", True)
    assert [d.path[-1] for d in verdict.departures] == ["worst_row"]


def test_check_that_passes_gives_no_reasons_of_others(q4_k_m: Made, tmp_path: Path) -> None:
    built, inputs = q4_k_m
    pack = Path(shutil.copytree(built, tmp_path / "pack"))
    rows = Editor(variant(pack, "Q4_K_M")).data["blk.0.ffn_up.weight"]
    rows[3, 16:20] ^= 0x08  # a few weights of one block
    reseal(pack)
    checks = {c.name: c for c in check(pack, inputs).verdicts[0].checks}
    assert checks["weights.worst_block"].passed is False
    assert checks["weights.rmse"].passed
    assert checks["weights.rmse"].detail.startswith("nearest to its limit: ")


def test_truncated_file_fails_and_the_others_are_still_checked(two: Path, inputs: Sources) -> None:
    data = variant(two, "Q8_0").read_bytes()
    variant(two, "Q8_0").write_bytes(data[:-32])
    first, second = check(two, inputs).verdicts
    assert first.failed is not None
    assert first.failed.name == "file.header"
    assert second.passed


# --- the worker


def test_abort_in_llama_cpp_is_a_finding_with_its_signal(pack: Path, inputs: Sources) -> None:
    token_twice(pack, inputs)
    reseal(pack)
    checks = {c.name: c for c in check(pack, inputs).verdicts[0].checks}
    assert checks["tokens.ids"].passed is False
    assert "SIGABRT" in checks["tokens.ids"].detail
    assert "SIGABRT" in checks["logits"].detail


def test_job_that_meets_a_limit_is_a_finding_and_the_others_go_on(
    two: Path, inputs: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger file gets less memory than the addresses of its own bytes."""
    monkeypatch.setattr(allowance, "_BASE", -variant(two, "F16").stat().st_size + (100 << 20))
    monkeypatch.setattr(allowance, "_STACK", 0)
    monkeypatch.setattr(allowance, "_ROOM", 0)
    result = check(two, inputs)
    for verdict in result.verdicts:
        checks = {c.name: c for c in verdict.checks}
        assert checks["weights.exact"].passed
        assert checks["tokens.ids"].passed is False
    with pytest.raises(CheckFailedError) as error:
        result.raise_if_failed()
    assert error.value.exit_code == 3


# --- inputs and texts


def test_texts_of_too_few_tokens_are_no_ground_for_a_verdict(
    pack: Path, inputs: Sources, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Dor")
    texts = read_texts(tmp_path / "a.txt", count=9)
    with pytest.raises(SourceError, match="the texts have [0-9]+ tokens; a verdict needs 100"):
        check_pack(pack, texts=texts, sources=inputs, report=Silent())
    assert not (pack / "parity.json").exists()


def test_line_of_a_figure_that_fails_says_it_and_its_limit() -> None:
    failed = at_most("logits.kld_mean", 0.25, 0.12, "nats, over 859 tokens")
    result = Result(Path(), TEXTS, (Verdict("q4_k_m", (failed,)),), {}, ways.ON_CPU)
    with pytest.raises(CheckFailedError, match=r"kld_mean: 0\.25, which should be <= 0\.12 \(nats"):
        result.raise_if_failed()


def test_cache_that_cannot_be_made_is_one_error(pack: Path, inputs: Sources) -> None:
    with pytest.raises(WriteError, match=r"the cache '/dev/null/x' cannot be.*or --no-cache"):
        check_pack(pack, texts=TEXTS, sources=inputs, cache=Path("/dev/null/x"), report=Silent())


def test_pack_json_without_types_is_one_error(pack: Path, inputs: Sources) -> None:
    document = json.loads((pack / "pack.json").read_text(encoding="utf-8"))
    del document["variants"][0]["types"]
    (pack / "pack.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(SourceError, match="lacks 'types'"):
        check(pack, inputs)


def test_folder_for_temporary_files_that_is_not_there_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's tempfile would take /tmp, where users' texts may not go."""
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    with Nameless() as place, pytest.raises(WriteError, match=r"/no/such/folder.*TMPDIR"):
        place.new()


def test_input_that_is_not_the_packs_is_refused_by_name(
    pack: Path, inputs: Sources, tmp_path: Path
) -> None:
    adapter = pico.write_adapter(tmp_path / "a", tensors={
        name: value + 1 for name, value in pico.adapter_tensors(pico.LLAMA).items()
    })  # fmt: skip
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors.* is not the file"):
        check(pack, Sources(inputs.base, str(adapter)))
    assert not (pack / "parity.json").exists()


def test_folder_that_pack_json_cannot_know_is_asked_for(pack: Path) -> None:
    with pytest.raises(UsageError, match="--base DIR"):
        check(pack)


def test_gpu_that_is_not_there_is_one_line_with_the_command(pack: Path, inputs: Sources) -> None:
    if worker.call("facts", allowance=allowance.LOOK_AT_GPU)["gpu"]:
        pytest.skip("this llama.cpp computes on a GPU")
    ended = invoke(pack, inputs, "--gpu-layers", "all")
    assert isinstance(ended.exception, MedllmError)
    assert ended.exception.exit_code == 1
    if not ggml.gpu_libraries():
        assert "CMAKE_ARGS=-DGGML_CUDA=on pip install" in str(ended.exception)
    assert not (pack / "parity.json").exists()
    assert isinstance(invoke(pack, inputs, "--gpu-layers", "viele").exception, UsageError)


def test_pack_that_cannot_be_written_to_is_refused_before_the_work(pack: Path) -> None:
    if os.geteuid() == 0:  # root may write everywhere but to what is mounted read-only
        readonly = f"mount --bind {pack} {pack} && mount -o remount,bind,ro {pack}"
        if subprocess.run(["unshare", "-m", "sh", "-c", readonly], capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
        prefix = ["unshare", "-m", "sh", "-c", f'{readonly} && exec "$@"', "sh"]
    else:
        prefix = []
        pack.chmod(0o500)
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "medllm_pack", "parity", str(pack)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    pack.chmod(0o700)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "parity.json' cannot be written: " in line
    assert line.endswith("choose a copy of the pack in a folder of yours")


def test_missing_extra_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from medllm_pack.parity import original

    monkeypatch.setattr(original, "_NEEDED", ("numpy", "no_such_library"))
    with pytest.raises(MedllmError, match=r"pip install 'medllm-pack\[parity\]'"):
        original.require_extra()


def test_texts_are_read_as_notes_or_as_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("um\ndois\n\n\ntrês\r\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "um\\ndois"}\n\n{"text": "três"}\n')
    for name in ("a.txt", "a.jsonl"):
        assert read_texts(tmp_path / name, count=9).notes == ("um\ndois", "três")
    assert "dois" not in repr(read_texts(tmp_path / "a.txt", count=9))
    for name, content in (("e.txt", "\n\n"), ("e.jsonl", '{"note": "segredo"}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(SourceError) as error:
            read_texts(tmp_path / name, count=9)
        assert "segredo" not in str(error.value)


def invoke(pack: Path, inputs: Sources, *more: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(parity)
    arguments = [str(pack), f"--base={inputs.base}", f"--adapter={inputs.adapter}", "--threads=1"]
    return CliRunner().invoke(app, [*arguments, *more])


def test_command_shows_a_table_or_one_json_object(pack: Path, inputs: Sources) -> None:
    ended = invoke(pack, inputs, "-q", "-v", "--device", "cpu")
    assert ended.exit_code == 0, ended.output
    assert "f16" in ended.stdout
    assert "passed" in ended.stdout
    assert "reference: layer by layer on CPU" in ended.stdout
    ended = invoke(pack, inputs, "--json", "--device", "cpu")
    document = json.loads((pack / "parity.json").read_text())
    assert json.loads(ended.stdout) == document
    assert document["reference"] == {"device": "CPU", "way": "layers"}
    page = (pack / "parity.html").read_text()
    assert "A referência foi calculada camada por camada (CPU)." in page
    assert "The reference was computed layer by layer (CPU)." in page


def test_reference_in_one_piece_climbs_the_same_ladder(
    pack: Path, inputs: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but on the CPU: what is kept, recorded and shown is what was computed."""
    monkeypatch.setattr(ways, "ON_CPU", replace(ways.ON_CPU, whole=True))
    kept = tmp_path / "kept"
    for _ in range(2):
        result = check_pack(
            pack, texts=TEXTS, sources=inputs, runtime=Runtime(threads=1), device="cpu",
            cache=kept, report=Silent(),
        )  # fmt: skip
        files = {path.name for path in kept.glob("*.npy")}
        monkeypatch.setattr(whole, "compute_logits", None)  # the second time it is not called
    assert result.passed
    assert files
    assert result.document["reference"] == {"device": "CPU", "way": "one piece"}
    assert "com o modelo inteiro na memória (CPU)." in (pack / "parity.html").read_text()


# --- figures


def test_figures_of_equal_logits_are_nothing_and_of_known_ones_are_known() -> None:
    ids = [0, 1, 0]
    logits = np.log(np.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]], dtype=np.float32))
    same = summarize([compare(logits, logits + 3, ids)])
    assert same["kld_max"] < 1e-12
    assert same["top1"] == 1.0
    assert same["ppl_ratio"] == pytest.approx(1.0)
    other = np.log(np.array([[0.25, 0.75]] * 3, dtype=np.float32))
    far = summarize([compare(logits, other, ids)])
    half = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    nine = 0.9 * np.log(0.9 / 0.25) + 0.1 * np.log(0.1 / 0.75)
    assert far["kld_mean"] == pytest.approx((2 * half + nine) / 3)
    assert far["ppl"] == pytest.approx((0.75 * 0.25) ** -0.5)
    assert far["ppl_reference"] == pytest.approx((0.5 * 0.9) ** -0.5)
    assert far["tokens_clear"] == 1
    assert far["top1_clear"] == 0.0


def test_spread_counts_every_position_once_between_its_edges() -> None:
    logits = np.log(np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]], dtype=np.float32))
    other = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], dtype=np.float32))
    distance = compare(logits, other, [0, 1, 0])
    seen = spread([distance, distance])
    assert len(seen.counts) == len(KLD_EDGES) + 1
    assert sum(seen.counts) == 6
    assert seen.counts[0] == 4  # nothing, or float32's noise of it
    [i] = [i for i, n in enumerate(seen.counts) if n == 2]
    assert KLD_EDGES[i - 1] < distance.kld[1] <= KLD_EDGES[i]
    assert seen.quantiles[KLD_QUANTILES.index(0.99)] == pytest.approx(distance.kld[1])


def test_shape_with_tied_embeddings_and_deep_layers_passes(
    tmp_path: Path, tokenizer: bytes
) -> None:
    shape = replace(pico.LLAMA, tied=True, layers=3)
    base = pico.write_model(tmp_path / "b", shape, tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "a", shape)
    run(tmp_path / "p", quants=["f16"], base=base, adapter=adapter)
    [verdict] = check(tmp_path / "p", Sources(str(base), str(adapter))).verdicts
    assert verdict.failed is None


def test_library_imports_nothing_heavy_until_it_works() -> None:
    program = (
        "import sys, medllm_pack.parity.run, medllm_pack.cli.parity; "
        "print({'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
