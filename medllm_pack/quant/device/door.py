"""The door to a device: torch is imported here, when a device was asked for, and not before.

A :class:`Device` takes rows and returns bytes as :func:`medllm_pack.quant.kernels.quantize` does;
types without a kernel here go there. One block of rows is on the device at a time, whatever the
number of threads: they share it through a lock, and its memory is bounded by ``CHUNK_WEIGHTS``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from medllm_pack import gpu
from medllm_pack.errors import DeviceError, UsageError
from medllm_pack.gguf.layout import row_bytes
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.quant import kernels
from medllm_pack.quant.device import DeviceName

CHUNK_WEIGHTS = 2 << 20  # what a build hands over at once
BYTES_A_WEIGHT = 64  # on the device, at most, while a chunk is quantized: 128 MiB in all
_OTHERWISE = "or use --device cpu"

# (type, with importance) -> module and function. Q8_0 has no use for an importance matrix.
_KERNELS = {
    ("Q4_K", False): "scale_min", ("Q4_K", True): "scale_min",
    ("Q5_K", False): "scale_min", ("Q5_K", True): "scale_min",
    ("Q2_K", False): "scale_min", ("Q2_K", True): "scale_min",
    ("Q6_K", False): "scale", ("Q6_K", True): "scale",
    ("Q3_K", False): "scale", ("Q3_K", True): "scale",
    ("Q8_0", False): "simple", ("Q8_0", True): "simple",
    ("Q4_0", False): "simple", ("Q4_1", False): "simple",
    ("Q5_0", False): "simple", ("Q5_1", False): "simple",
}  # fmt: skip


def needs_here() -> tuple[tuple[str, bool], ...]:
    """Return the types, and whether with an importance matrix, that have a kernel here."""
    return tuple(_KERNELS)


def require(name: DeviceName) -> None:
    """Refuse a device that cannot be used here, before any work is done.

    Raises:
        DeviceError: if torch, its CUDA build or a GPU is missing, or if the GPU does not work.
        UsageError: if MEDLLM_KERNELS asks for libggml, which has no device.
    """
    if name == "cpu":
        return
    if kernels.is_switched_off():
        raise UsageError(
            f"{kernels.SWITCH}=ggml leaves everything to libggml, which quantizes on the CPU; "
            f"unset it, {_OTHERWISE}"
        )
    gpu.require()


class Device:
    """A device that quantizes. Safe to share between threads.

    Args:
        name: torch's name of it. ``cpu`` runs the same source there, which is what tests do; it is
            slower than :mod:`medllm_pack.quant.kernels`.

    Attributes:
        title: what its maker calls it.
    """

    def __init__(self, name: DeviceName) -> None:
        import torch

        self.name, self.torch = name, torch
        self.title = "CPU" if name == "cpu" else str(self.torch.cuda.get_device_name())
        self._lock = threading.Lock()
        # Pinned, so that copies need no other staging; one, whatever the number of threads.
        self._staging = self._translated(
            lambda: self.torch.empty(CHUNK_WEIGHTS, pin_memory=name != "cpu")
        )

    def prepare(self, needs: Iterable[tuple[str, bool]], *, report: Reporter = SILENT) -> None:
        """Prove the types that will be needed, and compile CPU kernels for those without one here.

        Raises:
            DeviceError: if the device's bytes are not llama.cpp's.
        """
        from medllm_pack.quant.device.proof import prove

        here = sorted(need for need in needs if need in _KERNELS)
        kernels.warm_up([need for need in needs if need not in _KERNELS], report=report)
        if here:
            report.step(f"proving kernels on {self.title}")
            prove(self, here)

    def quantize(
        self, rows: NDArray[np.float32], kind: str, *, importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Quantize rows to a ggml type; see :func:`medllm_pack.quant.kernels.quantize`.

        Raises:
            DeviceError: if the device fails, for want of memory for example.
        """
        if (kind, importance is not None) not in _KERNELS:
            return kernels.quantize(rows, kind, importance=importance)
        if importance is not None and importance.shape != rows.shape[1:]:
            raise ValueError(f"importance {importance.shape} does not fit rows of {rows.shape[1:]}")
        size = row_bytes(kind, rows.shape[1])
        out = np.empty((rows.shape[0], size), dtype=np.uint8)
        step = max(CHUNK_WEIGHTS // rows.shape[1], 1)
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step]
            with self._lock:
                found = self._translated(partial(self._run, part, kind, importance))
            out[start : start + step] = found.reshape(-1, size)
        return out.reshape(-1)

    def _run(
        self, rows: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None
    ) -> NDArray[np.uint8]:
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        kernel = _kernel(kind, importance is not None)
        with self.torch.inference_mode():
            x = self._moved(rows).view(-1, block).t().contiguous()
            found = kernel(x, self._spread(importance, kind, block, rows.shape[0]))
            data: NDArray[np.uint8] = found.to(self.torch.uint8).t().contiguous().cpu().numpy()
        return data

    def _moved(self, rows: NDArray[np.float32]) -> Any:
        if rows.size > CHUNK_WEIGHTS:  # a single row that is longer than a chunk
            return self.torch.from_numpy(rows.reshape(-1).copy()).to(self.name)
        staged = self._staging[: rows.size]
        np.copyto(staged.numpy().reshape(rows.shape), rows)
        return staged.to(self.name, non_blocking=True)

    def _spread(
        self, importance: NDArray[np.float32] | None, kind: str, block: int, rows: int
    ) -> Any:
        """Return the importance of every weight, shaped as the weights are."""
        if importance is None or kind == "Q8_0":
            return None
        columns = self.torch.from_numpy(np.array(importance, np.float32)).to(self.name)
        return columns.view(-1, block).t().repeat(1, rows)

    def _translated(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except self.torch.OutOfMemoryError as error:
            room = BYTES_A_WEIGHT * CHUNK_WEIGHTS >> 20
            raise DeviceError(
                f"{self.title} has no room for {room} MiB; end what else uses it, {_OTHERWISE}"
            ) from error
        except RuntimeError as error:  # torch's name for whatever the driver says
            raise DeviceError(
                f"{self.title} failed: {gpu.first_line(error)}; see nvidia-smi, {_OTHERWISE}"
            ) from error


def _kernel(kind: str, weighted: bool) -> Callable[[Any, Any], Any]:
    from medllm_pack.quant.device import scale, scale_min, simple

    modules = {"scale": scale, "scale_min": scale_min, "simple": simple}
    kernel: Callable[[Any, Any], Any] = getattr(modules[_KERNELS[kind, weighted]], kind.lower())
    return kernel
