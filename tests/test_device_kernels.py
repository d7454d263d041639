"""Kernels for another device against libggml, which decides.

The source that runs on a GPU runs here on the CPU, so its bytes are compared in any test run. What
could still differ on a GPU is closed in on from three sides: only operations whose CUDA form is one
rounding each are used, nothing but the device changes between CPU and GPU, and what a NaN looks
like does not matter. The rest is said by tests that need a GPU, and by the proof before a build.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medllm_pack import files
from medllm_pack.errors import DeviceError, UsageError
from medllm_pack.pack import build as build_module
from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Plan, Request, make_plan
from medllm_pack.progress import Silent
from medllm_pack.quant import ggml, kernels
from medllm_pack.quant.device import arithmetic, door, proof
from medllm_pack.recipe import load_recipe, recipe_path
from tests.test_bad_input import run
from tests.test_kernels import COLUMNS, as_half, corner_cases, importances, wide_cases

Floats = NDArray[np.float32]
NEEDS = door.needs_here()
HAS_GPU = torch.cuda.is_available()

each_need = pytest.mark.parametrize(
    ("kind", "weighted"), NEEDS, ids=[f"{k}-{'importance' if w else 'plain'}" for k, w in NEEDS]
)
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU, or torch is built without CUDA")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads would only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cpu() -> door.Device:
    return door.Device("cpu")


@pytest.fixture(scope="module")
def gpu() -> door.Device:
    return door.Device("cuda")


def assert_same(device: door.Device, rows: Floats, kind: str, weights: Floats | None) -> None:
    found = device.quantize(rows, kind, importance=weights)
    wanted = ggml.quantize(rows, kind, importance=weights)
    differ = np.flatnonzero((found != wanted).reshape(len(rows), -1).any(axis=1))
    assert differ.size == 0, (kind, rows[differ[0]].tolist())


def some_weights(weighted: bool) -> list[Floats | None]:
    random = np.random.default_rng(4)
    return [weights for _, weights in importances(random)] if weighted else [None]


def all_cases(rows_of_each: int) -> Floats:
    cases = corner_cases(np.random.default_rng(4))
    return np.concatenate([rows[:rows_of_each] for _, rows in cases])


# ------------------------------------------------------------------------------ the same source


@each_need
def test_bytes_are_ggmls_on_noise_and_in_corner_cases(
    cpu: door.Device, kind: str, weighted: bool
) -> None:
    noise = as_half(np.random.default_rng(3).standard_normal((40, COLUMNS)) * 0.02)
    rows = np.concatenate([all_cases(2), noise])
    for weights in some_weights(weighted):
        assert_same(cpu, rows, kind, weights)


@each_need
def test_bytes_are_ggmls_for_all_of_float32(cpu: door.Device, kind: str, weighted: bool) -> None:
    rows = np.concatenate([rows[:12] for _, rows in wide_cases(np.random.default_rng(5))])
    for weights in some_weights(weighted)[:1]:
        assert_same(cpu, rows, kind, weights)


@pytest.mark.gpu
@on_gpu
@each_need
def test_bytes_are_ggmls_on_a_gpu(gpu: door.Device, kind: str, weighted: bool) -> None:
    noise = as_half(np.random.default_rng(3).standard_normal((4096, COLUMNS)) * 0.02)
    rows = np.concatenate([all_cases(24), noise])
    for weights in some_weights(weighted):
        assert_same(gpu, rows, kind, weights)


def test_roots_and_quotients_are_the_nearest() -> None:
    bits = np.random.default_rng(1).integers(0, 0x7F800000, 1 << 20).astype(np.uint32)
    x = bits.view(np.float32)
    assert np.array_equal(arithmetic.root(torch.from_numpy(x)).numpy(), np.sqrt(x))
    with np.errstate(all="ignore"):
        wanted = x / x[::-1], np.float32(63) / x, x / np.float32(127)
    y = torch.from_numpy(x)
    found = (
        arithmetic.quotient(y, torch.from_numpy(x[::-1].copy())),
        arithmetic.quotient(63.0, y),
        arithmetic.quotient(y, 127.0),
    )
    for ours, numpys in zip(found, wanted, strict=True):
        assert np.array_equal(ours.numpy().view(np.uint32), numpys.view(np.uint32))


def test_halves_are_those_of_libggml() -> None:
    every = np.arange(0x7C00, dtype=np.int32)
    wide = arithmetic.from_half(torch.from_numpy(every)).numpy()
    assert np.array_equal(wide, every.astype(np.uint16).view(np.float16).astype(np.float32))
    middle = (wide + np.append(wide[1:], np.float32(65536))) / 2
    beside = [np.nextafter(middle, np.float32(limit)) for limit in (-np.inf, np.inf)]
    rest = np.array([3.4e38, 1e-45, 5.9e-8, np.inf], np.float32)
    values = np.concatenate([wide, middle, *beside, rest])
    values = np.concatenate([values, -values])
    halves = arithmetic.to_half(torch.from_numpy(values)).numpy().astype(np.uint16)
    assert halves.tobytes() == ggml.quantize(values[None], "F16").tobytes()


# ------------------------------------------------------------------------------ what is done

# Each rounds at most once in torch's CUDA form, or moves values; none sums in an order of its own.
EXACT = {
    "aten.add.Tensor", "aten.add_.Tensor", "aten.sub.Tensor", "aten.sub_.Tensor",
    "aten.mul.Tensor", "aten.mul_.Tensor", "aten.mul.out", "aten.div.Tensor", "aten.sqrt.default",
    "aten.neg.default", "aten.abs.default", "aten.abs_.default",
    "aten.lt.Scalar", "aten.lt.Tensor", "aten.le.Tensor", "aten.gt.Scalar", "aten.gt.Tensor",
    "aten.eq.Scalar", "aten.ne.Scalar", "aten.ne.Tensor",
    "aten.bitwise_and.Scalar", "aten.bitwise_and.Tensor", "aten.bitwise_or.Scalar",
    "aten.bitwise_or.Tensor", "aten.bitwise_xor.Scalar", "aten.bitwise_not.default",
    "aten.__lshift__.Scalar", "aten.__rshift__.Scalar",
    "aten.where.self", "aten.masked_fill.Scalar", "aten.masked_fill_.Scalar",
    "aten.clamp.default", "aten.clamp_.default",
    "aten.cat.default", "aten.stack.default", "aten.clone.default", "aten._to_copy.default",
    "aten.full_like.default", "aten.new_full.default", "aten.zeros_like.default",
    "aten.repeat.default", "aten.select.int", "aten.slice.Tensor", "aten.unbind.int",
    "aten.view.default", "aten.view.dtype", "aten._unsafe_view.default", "aten.unsqueeze.default",
    "aten.transpose.int", "aten.t.default", "aten.detach.default", "aten.lift_fresh.default",
}  # fmt: skip


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation while it is entered; typed here, because torch does not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


class Watch(Mode):  # type: ignore[no-untyped-call]
    """Write down every operation, and the shapes that a division has."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.devices: set[str] = set()
        self.divided_by_numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        self.operations.append(str(func))
        if "div" in str(func):
            tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dim()]
            self.divided_by_numbers += len(tensors) < 2
        if "clamp" in str(func):
            assert args[0].dtype == torch.int32  # whatever it makes of a NaN
        result = func(*args, **(kwargs or {}))
        self.devices.update(t.device.type for t in tree_leaves(result))
        return result


def run_kernel(kind: str, weighted: bool, device: str) -> Watch:
    block = 32 if kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1") else 256
    x = torch.zeros(block, 3, device=device)
    watch = Watch()
    with watch:
        door._kernel(kind, weighted)(x, torch.ones_like(x) if weighted else None)
    return watch


@each_need
def test_only_operations_with_one_rounding_are_used(kind: str, weighted: bool) -> None:
    watch = run_kernel(kind, weighted, "cpu")
    assert set(watch.operations) - EXACT - {"aten.ones_like.default"} == set()
    # On CUDA that would be a product with its reciprocal.
    assert "aten.div.Tensor" in watch.operations
    assert watch.divided_by_numbers == 0


@each_need
def test_another_device_does_what_the_cpu_does(kind: str, weighted: bool) -> None:
    # Meta tensors have a device and a shape and no values: nothing may be made elsewhere, and no
    # step may look at a value.
    on_cpu = run_kernel(kind, weighted, "cpu")
    elsewhere = run_kernel(kind, weighted, "meta")
    assert elsewhere.operations == on_cpu.operations
    assert (on_cpu.devices, elsewhere.devices) == ({"cpu"}, {"meta"})


class OtherNans(Mode):  # type: ignore[no-untyped-call]
    """Give every NaN the bits that NVIDIA gives it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if tensor.dtype == torch.float32:
                tensor.view(torch.int32).masked_fill_(tensor != tensor, 0x7FFFFFFF)
        return result


@each_need
def test_bytes_do_not_depend_on_what_a_nan_looks_like(
    cpu: door.Device, kind: str, weighted: bool
) -> None:
    rows = all_cases(1)
    for weights in some_weights(weighted)[::3]:  # even, zero for whole sub-blocks, huge
        with OtherNans():
            found = cpu.quantize(rows, kind, importance=weights)
        assert np.array_equal(found, ggml.quantize(rows, kind, importance=weights))


class Live(Mode):  # type: ignore[no-untyped-call]
    """Add up the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            self.seen[storage._cdata] = (storage._weak_ref(), storage.nbytes())
        self.seen = {
            key: held
            for key, held in self.seen.items()
            if not torch.UntypedStorage._expired(held[0])
        }
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))
        return result


@each_need
def test_memory_on_the_device_is_bounded(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.zeros((64, 1024), np.float32)
    monkeypatch.setattr(door, "CHUNK_WEIGHTS", rows.size)
    device = door.Device("cpu")
    with Live() as live:
        device.quantize(rows, kind, importance=np.ones(1024, np.float32) if weighted else None)
    assert rows.nbytes < live.peak <= door.BYTES_A_WEIGHT * rows.size


# ------------------------------------------------------------------------------ the door


def test_long_inputs_are_cut_into_chunks(cpu: door.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = all_cases(1)
    wanted = ggml.quantize(rows, "Q8_0")
    for chunk in (1, COLUMNS, 5 * COLUMNS + 1):
        monkeypatch.setattr(door, "CHUNK_WEIGHTS", chunk)
        assert np.array_equal(door.Device("cpu").quantize(rows, "Q8_0"), wanted)
    assert cpu.quantize(rows[:0], "Q8_0").size == 0


def test_threads_may_share_a_device(cpu: door.Device) -> None:
    parts = np.split(all_cases(2)[:48], 12)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rows: cpu.quantize(rows, "Q6_K").tobytes(), parts))
    assert found == [ggml.quantize(rows, "Q6_K").tobytes() for rows in parts]


@pytest.mark.parametrize("kind", ["IQ4_XS", "F16", "TQ2_0"])
def test_types_without_a_kernel_here_go_to_the_cpu(cpu: door.Device, kind: str) -> None:
    rows = all_cases(1)
    assert np.array_equal(cpu.quantize(rows, kind), ggml.quantize(rows, kind))


def test_what_does_not_fit_is_refused(cpu: door.Device) -> None:
    rows = np.zeros((2, 256), np.float32)
    with pytest.raises(ValueError, match="importance"):
        cpu.quantize(rows, "Q4_K", importance=np.zeros(255, np.float32))
    with pytest.raises(ValueError, match="blocks of 256"):
        cpu.quantize(rows[:, :255], "Q4_K")


class Reciprocals(Mode):  # type: ignore[no-untyped-call]
    """Divide as a GPU does that multiplies by the reciprocal: off by one bit now and then."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        if str(func) == "aten.div.Tensor":
            return args[0] * torch.reciprocal(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0"])
def test_a_device_that_rounds_otherwise_is_refused(cpu: door.Device, kind: str) -> None:
    with Reciprocals(), pytest.raises(DeviceError, match=f"{kind} otherwise.*--device cpu"):
        proof.prove(cpu, [(kind, False)])


def test_a_device_with_llama_cpps_bytes_is_accepted(cpu: door.Device) -> None:
    cpu.prepare([("Q8_0", False), ("Q8_0", True), ("Q5_0", False), ("F16", False)])


def plan_of(out: Path) -> Plan:
    path = recipe_path("tiny")
    variants = ("q8_0", "q4_k_m")
    request = Request(load_recipe(path), path.parent, out, variants=variants)
    return make_plan(request, report=Silent())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: files.sha256(path) for path in folder.iterdir()}


def test_a_pack_does_not_depend_on_the_device(
    tmp_path: Path, cpu: door.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(plan_of(tmp_path / "kernels"))
    monkeypatch.setattr(build_module, "_quantizer", lambda *_: cpu.quantize)
    build(plan_of(tmp_path / "device"))
    assert digests(tmp_path / "kernels") == digests(tmp_path / "device")


@pytest.mark.gpu
@on_gpu
def test_a_pack_made_on_a_gpu_is_the_same(tmp_path: Path) -> None:
    build(plan_of(tmp_path / "cpu"))
    build(plan_of(tmp_path / "cuda"), device="cuda")
    assert digests(tmp_path / "cpu") == digests(tmp_path / "cuda")


# ------------------------------------------------------------------------------ refusals


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("command", ["build", "plan"])
def test_a_missing_gpu_is_named_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        [command, "tiny", "--device", "cuda", "--out", str(tmp_path / "p")], capsys
    )
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "torch" in err
    assert "--device cpu" in err
    assert not (tmp_path / "p").exists()


def test_a_missing_torch_is_named_with_the_extra_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.argv = ['medllm-pack', 'build', 'tiny', '--device', 'cuda', '--out', sys.argv[1]]\n"
        "from medllm_pack.cli.app import main\nmain()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "p")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install 'medllm-pack[cuda]'" in done.stderr


def test_the_switch_to_libggml_and_a_device_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(kernels.SWITCH, "ggml")
    door.require("cpu")
    with pytest.raises(UsageError, match="MEDLLM_KERNELS"):
        door.require("cuda")
