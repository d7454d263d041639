"""Where the reference is computed, and how much of it is there at a time.

On a GPU in one piece if it fits, else layer by layer there, else layer by layer on the CPU. What
fits is arithmetic from shapes, with room; where it was wrong, memory runs out, and the next way is
taken. Knows nothing of transformers.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from medllm_pack import gpu
from medllm_pack.errors import DeviceError
from medllm_pack.gpu import Choice
from medllm_pack.parity import reference, whole
from medllm_pack.parity.nameless import Nameless
from medllm_pack.parity.original import Original
from medllm_pack.progress import Reporter
from medllm_pack.quant.device import DeviceName

Sequences = Sequence[Sequence[int]]

_FLOAT32: Final = 4
# Of the device's memory, beside what the arithmetic below counts: the workspaces of cuBLAS (some
# ten MiB), its kernels, and what the allocator cannot use of its blocks.
_SLACK: Final = 512 << 20
# How cuBLAS says that nothing was left for its workspace: not with torch's error for memory.
_NO_WORKSPACE: Final = "CUBLAS_STATUS_ALLOC_FAILED"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute the reference.

    Attributes:
        device: torch's name of it.
        title: what its maker calls it.
        whole: the model in one piece; else a layer at a time.
    """

    device: DeviceName
    title: str
    whole: bool

    def __str__(self) -> str:
        return f"{'in one piece' if self.whole else 'layer by layer'} on {self.title}"

    def document(self) -> dict[str, str]:
        """Return it as it stands in parity.json."""
        return {"device": self.title, "way": "one piece" if self.whole else "layers"}


ON_CPU: Final = Way("cpu", "CPU", whole=False)


def whole_bytes(*, parameters: int, largest: int, config: Any, longest: int) -> int:
    """Return what the model in one piece takes of a device's memory, at most.

    Args:
        parameters: of the model and its adapter; all become float32.
        largest: parameters of the largest tensor, which is there in its own type, too, when it
            becomes float32.
        config: of the model, as transformers reads it.
        longest: ids of the longest text.
    """
    # States, queries, keys, values and their rotated copies; gate, up, and their product.
    layer: int = longest * (12 * config.hidden_size + 4 * config.intermediate_size)
    # Scores and their softmax, if attention is computed in steps, and the mask.
    attention: int = (2 * config.num_attention_heads + 2) * longest * longest
    logits: int = 2 * longest * config.vocab_size
    return _FLOAT32 * (parameters + largest + layer + attention + logits) + _SLACK


def list_ways(
    choice: Choice, device: DeviceName, title: str, *, needed: int, free: int
) -> tuple[Way, ...]:
    """Return the ways to try, one after the other; there is always one.

    Args:
        choice: what was asked for.
        device: what that means here.
        title: of the device.
        needed: bytes of the device's memory for the model in one piece.
        free: bytes of its memory.
    """
    if device == "cpu":
        return (ON_CPU,)
    ways = [Way(device, title, whole=False)]
    if needed <= free:
        ways.insert(0, Way(device, title, whole=True))
    if choice == "auto":
        ways.append(ON_CPU)
    return tuple(ways)


def first_with_room(
    ways: Sequence[Way], compute: Callable[[Way], list[Path]], *, report: Reporter
) -> tuple[Way, list[Path]]:
    """Compute by the first way that there is memory for; return it and what was computed.

    Raises:
        DeviceError: if a device fails, or its memory runs out on the last way, too.
    """
    for way, following in zip(ways, [*ways[1:], None], strict=True):
        try:
            with _understood(way):
                return way, compute(way)
        except _NoRoomError as error:
            reason = str(error)
        # Only here, where the error is gone, is what its traceback kept: the model.
        _free()
        if following is not None:
            report.notice(f"there is no room for the reference {way} ({reason}); it goes on "
                          f"{following}")  # fmt: skip
    raise DeviceError(
        f"{ways[-1].title} has no room for the reference, not even layer by layer; end what else "
        "uses it, ask for shorter texts with --ctx, or use --device cpu"
    )


class _NoRoomError(Exception):
    """Memory of a device ran out."""


@contextmanager
def _understood(way: Way) -> Iterator[None]:
    """Tell what a device says of itself apart: no memory, or a failure."""
    import torch

    try:
        yield
    except RuntimeError as error:  # torch's name for whatever the driver says
        said = gpu.first_line(error)
        if isinstance(error, torch.OutOfMemoryError) or _NO_WORKSPACE in str(error):
            raise _NoRoomError(said) from error
        if way.device == "cpu":
            raise
        raise DeviceError(
            f"{way.title} failed: {said}; see nvidia-smi, or use --device cpu"
        ) from error


def _free() -> None:
    """Give back to the device what nobody uses: llama.cpp, in its own process, may want it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used


class Reference:
    """The reference of a model, and the way it is computed.

    Args:
        original: the model and its adapter.
        choice: where it is computed.
        report: listener.

    Attributes:
        way: the one that is planned, and once something was computed the one that it took.
    """

    def __init__(self, original: Original, choice: Choice, *, report: Reporter) -> None:
        self.original, self.choice, self.report = original, choice, report
        self._device = gpu.chosen(choice)
        self._ways: tuple[Way, ...] = (ON_CPU,)
        self.way = ON_CPU

    def plan(self, sequences: Sequences) -> None:
        """Decide on the way for these sequences, or some of them."""
        if self._device == "cuda":
            import torch

            title, (free, _) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
            needed = self._whole_bytes(max(map(len, sequences), default=0))
            self._ways = list_ways(self.choice, "cuda", title, needed=needed, free=free)
        self.way = self._ways[0]

    def logits(self, sequences: Sequences, *, place: Nameless) -> list[Path]:
        """Write the logits after every id of every sequence into files; return them.

        Raises:
            DeviceError: if the device fails, has no room for a layer, or rounds products.
        """
        compute = partial(self._compute, sequences, place)
        with full_precision():
            self.way, paths = first_with_room(self._ways, compute, report=self.report)
        _free()
        return paths

    def _compute(self, sequences: Sequences, place: Nameless, way: Way) -> list[Path]:
        if way.device == "cuda" and not multiplies_in_float32("cuda"):
            raise DeviceError(
                f"{way.title} rounds float32 to fewer bits in products, though torch asks for all; "
                "unset NVIDIA_TF32_OVERRIDE, or use --device cpu"
            )
        compute = whole.compute_logits if way.whole else reference.compute_logits
        return compute(
            self.original, sequences, place=place, device=way.device, name=f"reference {way}",
            report=self.report,
        )  # fmt: skip

    def _whole_bytes(self, longest: int) -> int:
        weights = self.original.weights()
        sizes = [math.prod(weights.shape(name)) for name in weights]
        adapter = sum(tensor.numel() for tensor in self.original.adapter_weights().values())
        return whole_bytes(
            parameters=sum(sizes) + adapter, largest=max(sizes),
            config=self.original.transformers_config(), longest=longest,
        )  # fmt: skip


@contextmanager
def full_precision() -> Iterator[None]:
    """Let float32 be float32 while the block runs.

    TensorFloat-32 multiplies with 10 bits of the mantissa, as many as F16 has: its error would be
    as large as what rounding the weights to F16 does, which is what parity has to tell from a
    fault. torch leaves it off, but the containers of NVIDIA turn it on with
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE. In attention torch's fused kernel multiplies float32 as three
    such products (CUTLASS: OpMultiplyAddFastF32), which keeps nearly all bits.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiplies_in_float32(device: str) -> bool:
    """Say whether a device multiplies matrices with all bits of float32, not with TF32's."""
    import torch

    # A bit that TensorFloat-32's ten do not reach, times one.
    x = torch.full((256, 256), 1 + 2.0**-12, device=device)
    return bool(torch.equal(x @ torch.eye(256, device=device), x))
