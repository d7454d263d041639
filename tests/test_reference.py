"""The reference on any device: in one piece or layer by layer the same, and what decides on it.

What runs on a GPU runs here on the CPU; that nothing of it stays elsewhere is told on device meta,
which has shapes and no values. The rest is said by tests that need a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medllm_pack import gpu
from medllm_pack.errors import DeviceError, MedllmError
from medllm_pack.parity import reference, ways, whole, worker
from medllm_pack.parity.allowance import LOOK_AT_GPU
from medllm_pack.parity.nameless import Nameless
from medllm_pack.parity.original import Original, Weights
from medllm_pack.parity.ways import (
    ON_CPU,
    Reference,
    Way,
    first_with_room,
    full_precision,
    list_ways,
    multiplies_in_float32,
    whole_bytes,
)
from medllm_pack.progress import Silent
from tests import pico
from tests.packs import build_pack
from tests.test_bad_input import run
from tests.test_device_kernels import Live, Mode, Watch, on_gpu

SEQUENCES = [[1, *range(260, 300)], [1, 7]]
SHAPES: dict[str, tuple[pico.Pico, dict[str, Any]]] = {
    "llama": (pico.LLAMA, {}),
    "tied": (replace(pico.LLAMA, tied=True), {}),
    "grouped": (pico.MISTRAL, {"sliding_window": None}),
    "window": (pico.MISTRAL, {"sliding_window": 8}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads would only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place() -> Iterator[Nameless]:
    with Nameless() as place:
        yield place


def make(
    folder: Path, name: str = "llama", *, adapter: bool = True, dtype: str = "BF16"
) -> Original:
    shape, changes = SHAPES[name]
    base = pico.write_model(
        folder / "b", shape, dtype=dtype, shards=2, config=shape.config(**changes)
    )
    lora = pico.write_adapter(folder / "a", shape, dtype="F16") if adapter else None
    return Original(listed(base), listed(lora) if lora else None)


def listed(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def load(paths: Sequence[Path]) -> list[NDArray[np.float32]]:
    return [np.load(path) for path in paths]


# --- the same logits


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("adapter", [True, False])
def test_one_piece_gives_what_layers_give(
    tmp_path: Path, place: Nameless, name: str, adapter: bool
) -> None:
    original = make(tmp_path, name, adapter=adapter)
    both = []
    for compute in (whole.compute_logits, reference.compute_logits):
        paths = compute(original, SEQUENCES, place=place, device="cpu", report=Silent())
        both.append(load(paths))
    for one, layers in zip(*both, strict=True):
        # Seen: equal to the bit, for all shapes; the logits' spread is about 0.8.
        np.testing.assert_allclose(one, layers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_one_piece_gives_what_transformers_and_peft_load_themselves(
    tmp_path: Path, place: Nameless, name: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    original = make(tmp_path, name)
    paths = whole.compute_logits(original, SEQUENCES, place=place, device="cpu", report=Silent())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(tmp_path / "a"))
    for found, ids in zip(load(paths), SEQUENCES, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # seen: equal to the bit


@pytest.mark.parametrize("compute", [whole.compute_logits, reference.compute_logits])
def test_no_base_weight_is_decomposed_for_an_adapter_that_is_trained(
    tmp_path: Path, place: Nameless, compute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = make(tmp_path)
    plain = load(compute(original, SEQUENCES, place=place, device="cpu", report=Silent()))
    pico.write_adapter(
        tmp_path / "a", config=pico.adapter_config(init_lora_weights="mica"), dtype="F16"
    )
    monkeypatch.delattr(torch.linalg, "svd")
    mica = load(compute(original, SEQUENCES, place=place, device="cpu", report=Silent()))
    for one, other in zip(plain, mica, strict=True):
        np.testing.assert_array_equal(one, other)


def test_copy_of_the_head_counts_as_peft_loads_it(tmp_path: Path, place: Nameless) -> None:
    """Here it is not the base's, so that it shows; a build refuses that."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = pico.write_model(tmp_path / "b", dtype="BF16")
    head = pico.weights(pico.LLAMA, "F32")["lm_head.weight"] * 1.5
    original = Original(listed(base), listed(pico.write_head_adapter(tmp_path / "a", head)))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(tmp_path / "a"))
    with torch.no_grad():
        expected = model(torch.tensor([SEQUENCES[0]])).logits[0].numpy()
    for compute in (whole.compute_logits, reference.compute_logits):
        paths = compute(original, SEQUENCES[:1], place=place, device="cpu", report=Silent())
        np.testing.assert_allclose(load(paths)[0], expected, rtol=0, atol=1e-5)
    assert set(original.pairs) == {"lm_head.weight"} | {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }


def test_window_and_adapter_count(tmp_path: Path, place: Nameless) -> None:
    """What the tests above compare would otherwise be equal for want of a difference."""
    found = []
    for name, adapter in (("window", True), ("grouped", True), ("window", False)):
        original = make(tmp_path / f"{name}{adapter}", name, adapter=adapter)
        paths = whole.compute_logits(
            original, SEQUENCES[:1], place=place, device="cpu", report=Silent()
        )
        found.append(load(paths)[0])
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert np.abs(found[0] - found[2]).max() > 0.01


@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_adapter_that_peft_would_not_take_whole_is_refused(
    tmp_path: Path, place: Nameless, fault: str
) -> None:
    original = make(tmp_path)
    tensors = pico.adapter_tensors(pico.LLAMA)
    if fault == "missing":
        tensors.popitem()
    else:
        tensors["base_model.model.lm_head.lora_A.weight"] = pico.ramp((8, 256), 1)
    pico.write_adapter(tmp_path / "a", tensors=tensors)
    with pytest.raises(MedllmError, match="PEFT and the adapter's file do not agree on .*lora_"):
        whole.compute_logits(original, [[1]], place=place, device="cpu", report=Silent())


def test_weight_that_is_in_no_file_is_an_error(tmp_path: Path, place: Nameless) -> None:
    tensors = pico.weights(pico.LLAMA, "F16")
    del tensors["model.norm.weight"]
    original = Original(listed(pico.write_model(tmp_path / "b", tensors=tensors)), None)
    with pytest.raises(KeyError, match=r"model\.norm\.weight"):
        whole.compute_logits(original, [[1]], place=place, device="cpu", report=Silent())


# --- another device


META: Any = "meta"  # torch's name of a device that the command does not offer


class Lending(Weights):
    """Looks how many of the weights that were lent are still held when the next is asked for."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        super().__init__(paths)
        self.lent: list[weakref.ref[Any]] = []
        self.held: list[int] = []

    def get(self, name: str) -> Any:
        self.held.append(sum(tensor() is not None for tensor in self.lent))
        tensor = super().get(name)
        self.lent.append(weakref.ref(tensor))
        return tensor


class Loaded(dict[str, Any]):
    """Weights that were read before: safetensors does not read while operations are watched."""

    get = dict.__getitem__  # type: ignore[assignment]


class Given(Original):
    """The original with weights of the test's own, and an adapter that can be on device meta."""

    def __init__(self, original: Original, weights: Any = None) -> None:
        super().__init__(original.model, original.adapter)
        read = original.weights()
        given = Loaded({name: read.get(name) for name in read}) if weights is None else weights
        adapter = original.adapter_file()
        self.__dict__.update(given=given, pairs_read=adapter)  # the class is frozen

    def weights(self) -> Any:
        return self.__dict__["given"]

    def adapter_file(self, device: str = "cpu") -> dict[str, Any]:
        return {key: tensor.to(device) for key, tensor in self.__dict__["pairs_read"].items()}


def test_one_weight_at_a_time_is_in_memory_here(tmp_path: Path) -> None:
    original = make(tmp_path, dtype="F32")
    weights = Lending(original.model)
    whole._load(Given(original, weights), META, Silent())
    assert len(weights.held) == len(list(weights))
    assert set(weights.held) == {0}


def answer(model: Any, length: int) -> torch.Tensor:
    """Return the logits of a model on device meta, where transformers cannot look for a mask."""
    ids = torch.ones(1, length, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, length, length, device="meta")
    logits: torch.Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", SHAPES)
def test_in_one_piece_all_is_computed_on_the_device(tmp_path: Path, name: str) -> None:
    model = whole._load(Given(make(tmp_path, name)), META, Silent())
    with torch.no_grad(), Watch() as watch:
        logits = answer(model, 40)
    assert logits.shape == (1, 40, pico.LLAMA.vocab)
    assert watch.devices == {"meta"}


@pytest.mark.parametrize("name", SHAPES)
def test_layers_are_computed_on_the_device(tmp_path: Path, name: str) -> None:
    original = Given(make(tmp_path, name))
    stack = reference._Stack(original, original.weights(), META)
    stack.adapter = {key: tensor.to("meta") for key, tensor in stack.adapter.items()}
    [states] = stack.embed(SEQUENCES[:1])
    assert states.device.type == "cpu"  # the states of all texts could fill a device
    with torch.device("meta"):
        layer = stack.layer_class(stack.config, 0)
    layer = stack._filled("model.layers.0", layer)
    with torch.no_grad(), Watch() as watch, pytest.raises(NotImplementedError, match="no data"):
        stack._apply(layer, states)  # the way back to the CPU needs values
    assert watch.operations.count("aten.mm.default") >= 7  # all projections, and the adapter's
    assert watch.devices == {"meta"}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("in_one_piece", [True, False])
def test_logits_of_a_gpu_are_those_of_the_cpu(
    tmp_path: Path, place: Nameless, name: str, in_one_piece: bool
) -> None:
    original = make(tmp_path, name)
    compute = whole.compute_logits if in_one_piece else reference.compute_logits
    found = []
    for device in ("cpu", "cuda"):
        with full_precision():
            paths = compute(
                original, SEQUENCES, place=place, device=device, report=Silent()
            )  # fmt: skip
        found.append(load(paths))
    for here, there in zip(*found, strict=True):
        # TensorFloat-32 would be off by about 1e-3 of the logits' spread, which is about 0.8.
        np.testing.assert_allclose(there, here, rtol=0, atol=5e-5)


# --- what decides

GIB = 1 << 30
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
            "vocab_size": 32000}  # fmt: skip


def needed_by_7b(longest: int) -> int:
    return whole_bytes(
        parameters=6_738_415_616 + 4_194_304, largest=32000 * 4096,
        config=SimpleNamespace(**LLAMA_7B), longest=longest,
    )  # fmt: skip


def test_room_for_a_7b_is_known() -> None:
    weights = 6_742_609_920 * 4
    assert weights / GIB == pytest.approx(25.1, abs=0.05)
    assert 26 * GIB < needed_by_7b(256) < 26.5 * GIB  # fits where 32 GB are, not where 24 are
    assert 28 * GIB < needed_by_7b(2048) < 29 * GIB
    assert needed_by_7b(65536) > 1000 * GIB  # scores of all with all


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [1, 64, 500])
def test_room_is_more_than_what_is_ever_held(tmp_path: Path, name: str, length: int) -> None:
    """Counted on device meta: parameters, and what is made of them on the way to the logits."""
    original = make(tmp_path, name)
    model = whole._load(Given(original), META, Silent())
    with torch.no_grad(), Live() as live:
        answer(model, length)
    room = Reference(original, "cpu", report=Silent())._whole_bytes(length) - ways._SLACK
    # Seen: from 0.54 to 0.87 of it, the least with the longest text.
    assert live.peak < room < 2 * live.peak


@pytest.mark.parametrize(
    ("choice", "free", "expected"),
    [
        ("cuda", 100, ["one piece on GPU", "layers on GPU"]),
        ("cuda", 99, ["layers on GPU"]),
        ("auto", 100, ["one piece on GPU", "layers on GPU", "layers on CPU"]),
        ("auto", 99, ["layers on GPU", "layers on CPU"]),
    ],
)
def test_ways_follow_from_choice_and_memory(
    choice: gpu.Choice, free: int, expected: list[str]
) -> None:
    found = list_ways(choice, "cuda", "GPU", needed=100, free=free)
    assert ["{way} on {device}".format(**way.document()) for way in found] == expected


def test_on_the_cpu_it_is_always_layer_by_layer() -> None:
    for choice in ("auto", "cpu"):
        assert list_ways(choice, "cpu", "CPU", needed=0, free=1 << 60) == (ON_CPU,)


# --- when memory runs out

ON_GPU = Way("cuda", "GPU", whole=True)
LAYERS_ON_GPU = replace(ON_GPU, whole=False)


class Notices(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


class Held:
    """Something large; here only to see when it is gone."""


@dataclass
class Full:
    """A computation that runs out of memory on some devices, while it holds something."""

    ways: Sequence[Way]
    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nx")
    held: weakref.ref[Held] | None = None

    def __call__(self, way: Way) -> list[Path]:
        assert self.held is None or self.held() is None, "what the last way held is still there"
        model = Held()
        self.held = weakref.ref(model)
        if way in self.ways:
            raise type(self.error)(*self.error.args)  # a new one: an error keeps its frames
        return [Path("a")]


def test_next_way_is_taken_when_memory_runs_out_and_what_was_held_is_freed_first() -> None:
    report = Notices()
    compute = Full([ON_GPU, LAYERS_ON_GPU])
    way, paths = first_with_room([ON_GPU, LAYERS_ON_GPU, ON_CPU], compute, report=report)
    assert (way, paths) == (ON_CPU, [Path("a")])
    assert report.texts == [
        "there is no room for the reference in one piece on GPU (CUDA out of memory. Tried to "
        "allocate 9 GiB); it goes on layer by layer on GPU",
        "there is no room for the reference layer by layer on GPU (CUDA out of memory. Tried to "
        "allocate 9 GiB); it goes on layer by layer on CPU",
    ]


def test_library_without_workspace_is_out_of_memory_too() -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    way, _ = first_with_room([ON_GPU, ON_CPU], Full([ON_GPU], error), report=Silent())
    assert way == ON_CPU


def test_no_way_with_room_is_one_line_with_what_to_do() -> None:
    with pytest.raises(DeviceError, match="GPU has no room .*--ctx, or use --device cpu"):
        first_with_room([LAYERS_ON_GPU], Full([LAYERS_ON_GPU]), report=Silent())


def test_failure_of_a_device_is_one_line_and_no_reason_to_go_on() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")
    with pytest.raises(DeviceError) as raised:
        first_with_room([ON_GPU, ON_CPU], Full([ON_GPU], error), report=Silent())
    assert str(raised.value) == (
        "GPU failed: CUDA error: an illegal memory access was encountered; see nvidia-smi, "
        "or use --device cpu"
    )


def test_mistake_on_the_cpu_stays_what_it_is() -> None:
    error = RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size mismatch"):
        first_with_room([ON_CPU], Full([ON_CPU], error), report=Silent())


# --- precision


class Precision(Silent):
    """Notes the precision of products while it is told of steps."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, bool]] = set()

    def step(self, name: str, *, total_bytes: int | None = None) -> None:
        matmul = torch.backends.cuda.matmul
        self.seen.add((torch.get_float32_matmul_precision(), matmul.allow_tf32))


def test_products_are_in_full_float32_whatever_was_set(tmp_path: Path, place: Nameless) -> None:
    report = Precision()
    reference_ = Reference(make(tmp_path), "cpu", report=report)
    torch.set_float32_matmul_precision("medium")
    try:
        reference_.plan(SEQUENCES)
        reference_.logits(SEQUENCES, place=place)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert report.seen == {("highest", False)}


class TensorFloat(Mode):  # type: ignore[no-untyped-call]
    """Multiply as TensorFloat-32 does: what goes in is rounded to ten bits."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        if str(func) == "aten.mm.default":
            bits = [(tensor.view(torch.int32) + (1 << 12)) & ~0x1FFF for tensor in args]
            args = [tensor.view(torch.float32) for tensor in bits]
        return func(*args, **(kwargs or {}))


def test_device_that_rounds_products_is_told_from_one_that_does_not() -> None:
    assert multiplies_in_float32("cpu")
    with TensorFloat():
        assert not multiplies_in_float32("cpu")


@pytest.mark.gpu
@on_gpu
def test_gpu_multiplies_in_float32_when_torch_is_told() -> None:
    with full_precision():
        assert multiplies_in_float32("cuda")


def test_containers_that_turn_tf32_on_do_not_matter() -> None:
    program = (
        "import torch; from medllm_pack.parity.ways import full_precision\n"
        "before = torch.backends.cuda.matmul.allow_tf32\n"
        "with full_precision(): print(before, torch.backends.cuda.matmul.allow_tf32)"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "True False\n", done.stderr


# --- the command


@pytest.mark.skipif(gpu.missing() is None, reason="there is a GPU")
def test_missing_gpu_is_named_before_any_work(
    built_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in built_pack.iterdir()}
    code, out, err = run(["parity", str(built_pack), "--device", "cuda"], capsys)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "torch" in err
    assert "--device cpu" in err
    assert {path.name for path in built_pack.iterdir()} == before


@pytest.mark.skipif(gpu.missing() is None, reason="there is a GPU")
def test_without_a_gpu_auto_means_the_cpu() -> None:
    assert (gpu.chosen("auto"), gpu.chosen("cpu")) == ("cpu", "cpu")


@pytest.mark.gpu
@on_gpu
def test_whole_ladder_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not worker.call("facts", allowance=LOOK_AT_GPU)["gpu"]:
        pytest.skip("the installed llama.cpp finds no GPU, or was built without support for one")
    pack = build_pack(tmp_path / "p", quants=["f32", "f16", "q8_0", "q4_k_m"])
    arguments = [str(pack), "--gpu-layers", "all", "--device", "cuda", "--no-cache"]
    code, _, err = run(["parity", *arguments], capsys)
    assert code == 0, err
    document = json.loads((pack / "parity.json").read_text())
    assert document["reference"] == {"device": torch.cuda.get_device_name(), "way": "one piece"}
    assert [variant["passed"] for variant in document["variants"]] == [True] * 4
