"""The merge, against PEFT and against exact arithmetic; and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medllm_pack.errors import AdapterError, PlanError
from medllm_pack.pack.half import to_half
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.parity.original import Original
from medllm_pack.recipe import load_recipe
from medllm_pack.weights.adapter_config import parse_config
from medllm_pack.weights.checkpoint import Checkpoint
from medllm_pack.weights.lora import Adapter
from medllm_pack.weights.merged import Merged
from medllm_pack.weights.merging import add_low_rank, round_to_half
from tests import pico


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def merged(model: Path, adapter: Path) -> Merged:
    return Merged(Checkpoint.open(files_of(model)), Adapter.open(files_of(adapter)))


def halves(source: Merged) -> dict[str, NDArray[np.float16]]:
    """Return every matrix as the build rounds it."""
    result = {}
    for name, spec in source.tensors.items():
        if len(spec.shape) == 2:
            rows = source.read(name, 0, spec.rows)
            result[name] = to_half(source.values(rows), rows)
    return result


def peft_merged(model: Path, adapter: Path, dtype: str) -> dict[str, Any]:
    """Return the state dict after PEFT's own merge."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    result = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return dict(result.state_dict())


def ulps(a: NDArray[np.float16], b: NDArray[np.float16]) -> NDArray[np.int64]:
    """Return how many F16 steps lie between two arrays."""

    def ordered(x: NDArray[np.float16]) -> NDArray[np.int64]:
        bits = x.view(np.int16).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    steps: NDArray[np.int64] = np.abs(ordered(a) - ordered(b))
    return steps


def exact(model: Path, adapter: Path, name: str, scale: float) -> NDArray[np.longdouble]:
    """Return W + scale·(B·A) in extended precision, from the files themselves."""
    from safetensors.torch import load_file

    weight = load_file(model / "model.safetensors")[name].double().numpy()
    tensors = load_file(adapter / "adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (tensors[f"{module}.lora_{side}.weight"].double().numpy() for side in "AB")
    wide = (b.astype(np.longdouble), a.astype(np.longdouble))
    total: NDArray[np.longdouble] = weight + np.longdouble(scale) * (wide[0] @ wide[1])
    return total


CASES = [
    (pico.LLAMA, "F16", "float16"),
    (pico.LLAMA, "F32", "float32"),
    (pico.MISTRAL, "BF16", "float32"),
    (pico.MISTRAL, "F16", "float16"),
]


@pytest.mark.parametrize(("shape", "stored", "loaded"), CASES)
def test_merge_equals_pefts_within_one_step_and_is_the_closer(
    tmp_path: Path, tokenizer: bytes, shape: pico.Pico, stored: str, loaded: str
) -> None:
    model = pico.write_model(tmp_path / "m", shape, dtype=stored, tokenizer=tokenizer)
    adapter = pico.write_adapter(tmp_path / "a", shape)
    source = merged(model, adapter)
    reference = peft_merged(model, adapter, loaded)
    targets = set(source.adapter.pairs)
    assert len(targets) == 2 * shape.layers
    for name, ours in halves(source).items():
        theirs = reference[name].half().numpy()
        steps = ulps(ours, theirs)
        if name not in targets:
            np.testing.assert_array_equal(ours, theirs)
            continue
        assert steps.max() <= 1
        true = exact(model, adapter, name, 2.0)
        differ = steps > 0
        ours_off = np.abs(ours[differ].astype(np.longdouble) - true[differ])
        theirs_off = np.abs(theirs[differ].astype(np.longdouble) - true[differ])
        assert (ours_off <= theirs_off).all()


@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("shape", [pico.LLAMA, pico.MISTRAL])
@pytest.mark.parametrize("shards", [1, 3])
def test_merged_tensor_is_the_exact_sum_rounded_once(
    tmp_path: Path, shape: pico.Pico, stored: str, shards: int
) -> None:
    single = pico.write_model(tmp_path / "one", shape, dtype=stored)
    model = pico.write_model(tmp_path / "m", shape, dtype=stored, shards=shards)
    adapter = pico.write_adapter(tmp_path / "a", shape)
    source = merged(model, adapter)
    ours = halves(source)
    for name in source.adapter.pairs:
        true = exact(single, adapter, name, 2.0)
        np.testing.assert_array_equal(ours[name], true.astype(np.float64).astype(np.float16))


def test_sum_is_rounded_to_nearest_with_ties_to_even() -> None:
    """Every sum that lies exactly between two halves goes to the even one."""
    low = np.arange(0x3C00, 0x3C80, dtype=np.uint16).view(np.float16)
    step = Fraction(1, 1024)
    weight = low.reshape(1, -1)
    a = np.ones((1, weight.shape[1]))
    total = add_low_rank(weight, a, np.full((1, 1), float(step / 2)), 1.0)
    rounded = total.astype(np.float16).view(np.uint16)[0]
    expected = [
        bits if bits % 2 == 0 else bits + 1 for bits in low.view(np.uint16).astype(int).tolist()
    ]
    assert rounded.tolist() == expected


def test_rounding_happens_once_not_by_way_of_float32() -> None:
    """A value that two roundings push over a tie: float64 -> F16 must not stop at F32."""
    tie = 1.0 + 2.0**-11  # between 1 and the next half
    value = tie - 2.0**-40  # below the tie; in float32 it becomes the tie, then 1 + 2**-10 or 1
    above = (1.0 + 2.0**-10) + 2.0**-11 - 2.0**-40  # here two roundings would go up to even
    weight = np.zeros((1, 2), dtype=np.float32)
    total = add_low_rank(weight, np.array([[value, above]]), np.ones((1, 1)), 1.0)
    assert total.astype(np.float16).tolist() == [[1.0, 1.0 + 2.0**-10]]
    assert total.astype(np.float32).astype(np.float16)[0, 1] == np.float16(1.0 + 2.0**-9)


def test_rounding_equals_numpys_at_every_half_and_every_tie() -> None:
    """All finite halves, all midpoints between neighbours, and the float64 next to each."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = np.sort(every[np.isfinite(every)].astype(np.float64))
    ties = (every[:-1] + every[1:]) / 2
    edges = [65519.999, 65520.0, 1e300, np.inf, 5e-324, 2**-25, 2**-25 + 2**-60, 0.0, -0.0]
    near = [np.nextafter(ties, 9), np.nextafter(ties, -9), np.array(edges), -np.array(edges)]
    cases: list[Any] = [every, ties, *near]
    for values in cases:
        with np.errstate(over="ignore"):
            expected = values.astype(np.float16)
        np.testing.assert_array_equal(
            round_to_half(values).view(np.uint16), expected.view(np.uint16)
        )


@given(bits=st.lists(st.floats(width=64, allow_nan=False), min_size=1, max_size=50))
@settings(deadline=None)
def test_rounding_equals_numpys_for_any_float64(bits: list[float]) -> None:
    values = np.array(bits)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(round_to_half(values).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 8, 11])
@pytest.mark.parametrize("columns", [1, 7, 256, 300])
def test_sum_adds_its_terms_in_order(rank: int, columns: int) -> None:
    """Against the same sum in Python's own floats, which are never fused or reordered."""
    weight = pico.ramp((3, columns), 1)
    a = pico.ramp((rank, columns), 2).astype(np.float64) * 1.1
    b = pico.ramp((3, rank), 3).astype(np.float64) * 0.9
    got = add_low_rank(weight, a, b, 1.7)
    for i in range(3):
        for j in range(columns):
            total = float(b[i, 0]) * float(a[0, j])
            for k in range(1, rank):
                total += float(b[i, k]) * float(a[k, j])
            assert got[i, j] == float(weight[i, j]) + 1.7 * total


@pytest.mark.parametrize("rows", [1, 7, 64, 256])
def test_merge_is_the_same_in_any_blocks_of_rows(
    llama_folder: Path, llama_adapter: Path, rows: int
) -> None:
    source = merged(llama_folder, llama_adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = source.values(source.read(name, 0, 256))
    parts = [
        source.values(source.read(name, top, min(top + rows, 256))) for top in range(0, 256, rows)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"lora_alpha": 5},
        {"rank_pattern": {"v_proj": 4}},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
        {"target_modules": ["gate_proj", "lm_head"]},
        {"fan_in_fan_out": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*\.(q|v)_proj"},
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"exclude_modules": r".*layers\.0\.self_attn\.v_proj"},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"init_lora_weights": "mica"},
    ],
    ids=lambda changes: next(iter(changes)) + "=" + str(next(iter(changes.values()))),
)
def test_adapter_made_by_peft_merges_as_peft_merges_it(
    tmp_path: Path, llama_folder: Path, changes: dict[str, Any]
) -> None:
    # peft would look for the base on the Hub to see whether the vocabulary grew
    reference = save_by_peft(llama_folder, tmp_path / "a", changes, save_embedding_layers=False)
    source = merged(llama_folder, tmp_path / "a")
    assert source.adapter.n_tensors == 2 * len(source.adapter.pairs)
    changed = 0
    for name, ours in halves(source).items():
        theirs = reference[name].half().numpy()
        assert ulps(ours, theirs).max() <= 1
        changed += name in source.adapter.pairs
    assert changed == len(source.adapter.pairs) > 0


def save_by_peft(
    model: Path, out: Path, changes: Mapping[str, Any], *, dtype: str = "float32", **saving: Any
) -> dict[str, Any]:
    """Let PEFT save an adapter with values of ours; return what its merge gives."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    wanted: dict[str, Any] = {
        "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    with _peft_warnings():
        adapted = get_peft_model(base, LoraConfig(**wanted | dict(changes)))
        for index, parameter in enumerate(p for n, p in adapted.named_parameters() if "lora_" in n):
            parameter.data = torch.from_numpy(pico.ramp(tuple(parameter.shape), 500 + index))
        adapted.save_pretrained(out, **saving)
        return dict(adapted.merge_and_unload().state_dict())


HEAD = {"target_modules": ["q_proj", "lm_head"]}


@pytest.mark.parametrize(
    ("stored", "loaded"), [("F16", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_head_with_pefts_copy_of_its_weight_merges_as_peft_merges_it(
    tmp_path: Path, stored: str, loaded: str
) -> None:
    """By default PEFT stores the head's own weight too, in the type that it was loaded in."""
    model = pico.write_model(tmp_path / "m", dtype=stored)
    save_by_peft(model, tmp_path / "a", HEAD, dtype=loaded)
    source = merged(model, tmp_path / "a")
    assert source.adapter.n_tensors == 2 * len(source.adapter.pairs) + 1
    reference = peft_merged(model, tmp_path / "a", "float32")
    for name, ours in halves(source).items():
        assert ulps(ours, reference[name].half().numpy()).max() <= 1
    base = pico.weights(pico.LLAMA, stored)["lm_head.weight"].astype(np.float16)
    assert np.mean(halves(source)["lm_head.weight"] != base) > 0.9


def test_copy_of_the_head_that_is_not_the_bases_is_refused(
    tmp_path: Path, llama_folder: Path
) -> None:
    weight = pico.weights(pico.LLAMA, "F16")["lm_head.weight"].astype(np.float32)
    halves(merged(llama_folder, pico.write_head_adapter(tmp_path / "same", weight)))
    other = weight.copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(1))
    for name, copy, dtype in (("other", other, "F32"), ("rounded", weight, "BF16")):
        source = merged(llama_folder, pico.write_head_adapter(tmp_path / name, copy, dtype=dtype))
        with pytest.raises(AdapterError, match=r"base_layer.weight' is not the base's lm_head"):
            halves(source)
    with pytest.raises(AdapterError, match=r"has the shape \(321, 256\), the base's lm_head"):
        merged(
            llama_folder,
            pico.write_head_adapter(tmp_path / "more", np.vstack([weight, weight[:1]])),
        )


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "left out"])
def test_head_that_is_the_embedding_is_not_merged(tmp_path: Path, stored: bool) -> None:
    """Not even where a head lies in the file: a tied model does not read it."""
    config, tensors = pico.LLAMA.config(tie_word_embeddings=True), pico.weights(pico.LLAMA, "F16")
    if not stored:
        del tensors["lm_head.weight"]
    base = pico.write_model(tmp_path / "m", config=config, tensors=tensors)
    adapter = pico.write_head_adapter(tmp_path / "a", tensors["model.embed_tokens.weight"])
    recipe = pico.write_recipe(tmp_path, {"base": base, "adapter": adapter})
    with pytest.raises(PlanError, match="trains lm_head, which in this base is the embedding"):
        make_plan(Request(load_recipe(recipe), tmp_path, tmp_path / "out"))


def _peft_warnings() -> Any:
    import warnings

    caught = warnings.catch_warnings()
    caught.__enter__()
    warnings.simplefilter("ignore")

    class _Context:
        def __enter__(self) -> None: ...

        def __exit__(self, *exc: object) -> None:
            caught.__exit__(None, None, None)

    return _Context()


REFUSED: dict[str, Mapping[str, Any]] = {
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora_bias.*train one without$": {"lora_bias": True},
    "activated.*train a plain one$": {"alora_invocation_tokens": [9]},
    "QALoRA.*train a plain one$": {"use_qalora": True},
    "Arrow.*name one of them$": {"arrow_config": {"top_k": 2}},
    "Megatron.*merge it with PEFT": {"megatron_config": {"tp_size": 2}},
    "LoftQ.*merge it with PEFT": {"loftq_config": {"loftq_bits": 4}},
    "single tokens.*merge it with PEFT": {"trainable_token_indices": [3]},
    "replicates.*layers repeated": {"layer_replication": [[0, 2]]},
    "target_parameters.*merge it with PEFT": {"target_parameters": ["experts.w"]},
    "rewrites the base": {"init_lora_weights": "pissa"},
    "rewrites the base weights; merge it with PEFT": {"init_lora_weights": "olora"},
    "pissa_niter_4.*convert it where": {"init_lora_weights": "pissa_niter_4"},
    "corda.*convert it where": {"init_lora_weights": "corda"},
    "not known here; with a version of PEFT that knows it": {"use_something_new": True},
    "'kasa_config', which is not known here": {"kasa_config": {"beta": 0.1}},
    "'some_factor', which is not known here": {"some_factor": 0},
    "neither true nor false": {"use_rslora": 1},
    "not an object": {"alpha_pattern": [1]},
    "peft_type 'IA3'.*merge it with PEFT": {"peft_type": "IA3"},
    "has no peft_type": {"peft_type": None},
    "ranks from.*merge it with PEFT": {"r": 100000},
    "lora_alpha": {"lora_alpha": "16"},
    "not a finite number": {"lora_alpha": float("inf")},
    "plain name.*merge it with PEFT": {"rank_pattern": {r".*\.q_proj": 4}},
    "not a list of names": {"target_modules": 5},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        parse_config(pico.adapter_config(**REFUSED[reason]))


def broken(tmp_path: Path, change: str) -> Path:
    """Write an adapter with one fault."""
    tensors = pico.adapter_tensors(pico.LLAMA)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    match change:
        case "no B":
            del tensors[f"{first}B.weight"]
        case "rank":
            tensors[f"{first}A.weight"] = pico.ramp((4, 256), 1)
            tensors[f"{first}B.weight"] = pico.ramp((256, 4), 2)
        case "ranks differ":
            tensors[f"{first}A.weight"] = pico.ramp((4, 256), 1)
        case "width":
            tensors[f"{first}A.weight"] = pico.ramp((8, 512), 1)
        case "other model":
            for side, size in (("A", (8, 256)), ("B", (256, 8))):
                name = f"base_model.model.model.layers.40.self_attn.q_proj.lora_{side}.weight"
                tensors[name] = pico.ramp(size, 3)
        case "embedding":
            tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = pico.ramp((8, 320), 4)
        case "magnitude":
            tensors[f"{first}magnitude_vector"] = pico.ramp((256,), 5)
        case "bias":
            tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = pico.ramp((256,), 5)
        case "head":
            tensors["base_model.model.lm_head.base_layer.weight"] = pico.ramp((320, 256), 6)
        case "hole":
            for side in "AB":
                del tensors[f"base_model.model.model.layers.1.self_attn.v_proj.lora_{side}.weight"]
        case "no target":
            tensors = {name: value for name, value in tensors.items() if "v_proj" not in name}
        case "prefix":
            tensors = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
        case "other name":
            tensors = {k.replace(".weight", ".sft.weight"): v for k, v in tensors.items()}
        case "one size":
            tensors[f"{first}A.weight"] = pico.ramp((8 * 256,), 1)
        case "empty":
            tensors[f"{first}A.weight"] = np.zeros((0,), np.float32)
        case "zero":
            tensors |= {k: v * 0 for k, v in tensors.items() if "lora_B" in k}
        case "NaN":
            tensors[f"{first}A.weight"][0, 0] = np.nan
    return pico.write_adapter(tmp_path / change, tensors=tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no B", "layers.0.self_attn.q_proj' has no lora_B"),
        ("rank", "has rank 4, its configuration says 8"),
        ("ranks differ", "A has rank 4, B has rank 8"),
        ("width", r"shape \(256, 512\), the base has \(256, 256\)"),
        ("other model", "layers.40.self_attn.q_proj' is not in the base model .2 layers."),
        ("embedding", "lora_embedding_A"),
        ("magnitude", "magnitude_vector"),
        ("bias", "q_proj.bias' is a trained bias"),
        ("head", "lm_head.base_layer.weight' is a whole weight that replaces the base's"),
        ("hole", "no tensors for 'model.layers.1.self_attn.v_proj'"),
        ("no target", "names the target 'v_proj'"),
        ("prefix", "not what PEFT stores .* save it again with save_pretrained"),
        ("other name", "not what PEFT stores"),
        ("one size", "not what PEFT stores"),
        ("empty", "is empty; a sharded model"),
        ("zero", "every pair in .* is zero"),
        ("NaN", "NaN or infinity"),
    ],
)
def test_adapter_that_does_not_fit_names_the_tensor(
    tmp_path: Path, llama_folder: Path, change: str, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        halves(merged(llama_folder, broken(tmp_path, change)))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("key", "value", "passed_over"),
    [
        ("target_modules", ["q_proj"], {"0.self_attn.v_proj", "1.self_attn.v_proj"}),
        ("exclude_modules", ["layers.1.self_attn.v_proj"], {"1.self_attn.v_proj"}),
        ("layers_to_transform", [0], {"1.self_attn.q_proj", "1.self_attn.v_proj"}),
    ],
)
def test_pair_that_peft_passes_over_by_the_configuration_is_refused(
    tmp_path: Path, llama_folder: Path, key: str, value: list[Any], passed_over: set[str]
) -> None:
    from safetensors.torch import load_file

    adapter = pico.write_adapter(tmp_path / "a", config=pico.adapter_config(**{key: value}))
    theirs = peft_merged(llama_folder, adapter, "float32")
    same = {
        name.removeprefix("model.layers.").removesuffix(".weight")
        for name, weight in load_file(llama_folder / "model.safetensors").items()
        if name.endswith(("q_proj.weight", "v_proj.weight")) and weight.float().equal(theirs[name])
    }
    assert same == passed_over
    with pytest.raises(AdapterError, match=f"{min(same)}.* but {key} in adapter_config.json"):
        merged(llama_folder, adapter)


def test_adapter_for_some_layers_only_is_no_hole(tmp_path: Path, llama_folder: Path) -> None:
    tensors = {k: v for k, v in pico.adapter_tensors(pico.LLAMA).items() if "layers.1." in k}
    config = pico.adapter_config(layers_to_transform=[1])
    source = merged(
        llama_folder, pico.write_adapter(tmp_path / "a", config=config, tensors=tensors)
    )
    assert sorted(source.adapter.pairs) == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    ]


def test_what_is_off_in_a_newer_peft_changes_nothing() -> None:
    """PEFT writes every key that it knows, and what is not used as null, false or empty."""
    off: dict[str, Any] = {"a": None, "b": False, "c": [], "d": {}, "e": ""}
    assert parse_config(pico.adapter_config(**off)) == parse_config(pico.adapter_config())


def test_names_with_the_adapters_own_are_read_as_peft_reads_them(
    tmp_path: Path, llama_folder: Path, llama_adapter: Path
) -> None:
    tensors = pico.adapter_tensors(pico.LLAMA)
    renamed = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    named = pico.write_adapter(tmp_path / "a", tensors=renamed)
    ours = halves(merged(llama_folder, named))
    reference = peft_merged(llama_folder, named, "float32")
    for name, expected in halves(merged(llama_folder, llama_adapter)).items():
        np.testing.assert_array_equal(ours[name], expected)
        assert ulps(expected, reference[name].half().numpy()).max() <= 1
    original = Original(files_of(llama_folder), files_of(named))
    assert original.pairs.keys() == merged(llama_folder, named).adapter.pairs.keys()


def test_missing_adapter_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(pico.adapter_config()))
    with pytest.raises(AdapterError, match="adapter_model.safetensors"):
        Adapter.open(files_of(tmp_path))


def test_targets_of_a_pattern_are_the_kinds_of_its_tensors(
    tmp_path: Path, llama_adapter: Path
) -> None:
    config = pico.adapter_config(target_modules=r".*\.(q|v)_proj")
    folder = pico.write_adapter(tmp_path / "a", config=config)
    adapter = Adapter.open(files_of(folder))
    assert adapter.config.targets == ("q_proj", "v_proj")
    assert adapter.config.targets == Adapter.open(files_of(llama_adapter)).config.targets
