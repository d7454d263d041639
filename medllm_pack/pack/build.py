"""The build: one pass over the weights, every variant written on the way.

Blocks of rows are read in the order of the outputs where memory allows (order.py); every byte is
read once from the disk, and hashed when its turn comes. Each block gets the adapter, is rounded
once to F16, and the same block goes to every variant at its planned offset. One thread reads, as
many as were asked for compute, and some write, so that nobody who computes waits for the disk.

Memory: a few blocks, and what waits for its digest, whatever the size of the model; where there is
plenty, the page cache beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medllm_pack import ahead, files, memory, processors
from medllm_pack.errors import CheckpointError, GGUFError, WriteError, shown
from medllm_pack.gguf import llama
from medllm_pack.gguf.layout import Slot
from medllm_pack.gguf.reader import read_gguf
from medllm_pack.known import Known
from medllm_pack.pack import manifest, papers
from medllm_pack.pack.half import finite, to_half
from medllm_pack.pack.order import reading_order
from medllm_pack.pack.output import KEPT_BYTES, Output
from medllm_pack.pack.plan import Plan
from medllm_pack.pack.variants import PlannedFile
from medllm_pack.pack.writers import Writers
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.quant import ggml, kernels
from medllm_pack.quant.device import DeviceName
from medllm_pack.weights.checkpoint import Checkpoint
from medllm_pack.weights.header import TensorSpec
from medllm_pack.weights.merged import Merged
from medllm_pack.weights.safetensors import WAITING_BYTES, Rows

_NORMS = 16 << 20  # more than the norms of any model take while they wait
BLOCK_WEIGHTS = 2 << 20  # weights in a block: 4 MiB in F16, 8 MiB in F32, 16 MiB while merging

_WRITERS = 3  # threads, which wait for the disk most of the time

Source = Checkpoint | Merged
Digests = Mapping[str, tuple[int, str]]  # file name -> size, SHA-256


class Quantizer(Protocol):
    """What quantizes rows to a type, with llama.cpp's bytes."""

    def __call__(
        self, rows: NDArray[np.float32], kind: str, *, importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Return the bytes; see :func:`medllm_pack.quant.kernels.quantize`."""


@dataclass(frozen=True)
class Built:
    """A finished pack.

    Attributes:
        folder: where it is.
        manifest: the content of pack.json.
    """

    folder: Path
    manifest: manifest.Document


def build(
    plan: Plan,
    *,
    threads: int | None = None,
    device: DeviceName = "cpu",
    report: Reporter = SILENT,
) -> Built:
    """Build a pack.

    Args:
        plan: from :func:`~medllm_pack.pack.plan.make_plan`, with all weights at hand.
        threads: processors to keep busy; those this process may use if None. The bytes do
            not depend on it.
        device: where to quantize. The bytes do not depend on it: a device proves itself first.
        report: listener.

    Raises:
        CheckpointError: if a weight is NaN, infinite or too large for F16 or for the type that it
            is quantized to, or an input changed.
        AdapterError: if the adapter holds NaN, or a copy of the head that is not the base's.
        DeviceError: if the device is missing, fails, or does not give llama.cpp's bytes.
        WriteError: if the output could not be written; nothing is left behind.
    """
    threads = threads or processors.usable()
    out = plan.request.out
    quantize = _quantizer(plan, device, report)
    with files.new_folder(out, replace=plan.request.replace) as folder, files.translated(out):
        inputs, digests = _stream(plan, folder, quantize, threads=threads, report=report)
        _compare_with_hub(plan, inputs)
        for file in plan.files:
            _check_header(folder, file)
        document = manifest.describe(plan, inputs=inputs, digests=digests)
        papers.write(
            plan, folder, document, {name: digest for name, (_, digest) in digests.items()}
        )
    known = Known()
    for name, (_, sha256) in digests.items():
        known.made(out / name, sha256)
    return Built(out, document)


@dataclass(frozen=True)
class _Target:
    """Where the rows of one tensor go in one file."""

    output: Output
    slot: Slot

    def put(self, start: int, data: NDArray[np.uint8]) -> None:
        """Write rows from ``start`` on, already in the slot's type."""
        self.output.write(self.slot.offset + start * self.slot.row_bytes, data)


class _Encoded:
    """A block of rows in every type that is asked for, each made once.

    Variants share types: the Q6_K tensors of a Q4_K_M and a Q5_K_M file are the same bytes.
    """

    def __init__(
        self,
        name: str,
        halves: NDArray[np.float16],
        importance: NDArray[np.float32] | None,
        quantize: Quantizer,
    ) -> None:
        self.name = name
        self.importance = importance
        self.quantize = quantize
        self.made = {"F16": _bytes(halves)}
        self.halves = halves

    def __getitem__(self, kind: str) -> NDArray[np.uint8]:
        if kind not in self.made:
            self.made[kind] = self._make(kind)
        return self.made[kind]

    def _make(self, kind: str) -> NDArray[np.uint8]:
        if kind == "F32":
            # llama.cpp quantizes from the F16 file: rounding to F16 comes first here too.
            return _bytes(kernels.widen(self.halves))
        wide = self["F32"].view(np.float32).reshape(self.halves.shape)
        data = self.quantize(wide, kind, importance=self.importance)
        if not ggml.is_sound(data, kind):
            # Finite weights can get here by an importance matrix; llama-quantize refuses it, too.
            raise CheckpointError(
                f"tensor {self.name} has a scale in {kind} that is NaN or infinite: its weights or "
                "its importance matrix are too large; choose another variant or matrix"
            )
        return data


def _bytes(values: NDArray[np.float16] | NDArray[np.float32]) -> NDArray[np.uint8]:
    return values.view(np.uint8).reshape(-1)


class _Converter:
    """What is done to a block of rows between reading and writing. Used by those who compute."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        outputs: Mapping[str, Output],
        quantize: Quantizer,
        writers: Writers,
    ) -> None:
        self.writers = writers
        self.source = source
        self.quantize = quantize
        self.head_dim = plan.config.head_dim
        self.tensors = {tensor.source: tensor for tensor in llama.tensors(plan.config)}
        self.importance = plan.importance.weights if plan.importance else {}
        self.targets = {
            tensor.source: tuple(
                _Target(output, output.layout.by_name[tensor.name]) for output in outputs.values()
            )
            for tensor in self.tensors.values()
        }

    def __call__(self, rows: Rows) -> int:
        """Convert a block and hand it to who writes; return the bytes that were read for it."""
        tensor = self.tensors.get(rows.spec.name)
        if tensor is not None:
            if len(tensor.shape) == 1:
                self._put_vector(rows)
            else:
                self._put_matrix(rows, tensor)
        return rows.data.size

    def _put_vector(self, rows: Rows) -> None:
        # llama.cpp keeps norms in F32, whatever the file's type.
        exact = _bytes(finite(self.source.values(rows), rows).astype(np.float32))
        for target in self.targets[rows.spec.name]:
            target.put(0, exact)

    def _put_matrix(self, rows: Rows, tensor: llama.Tensor) -> None:
        halves = to_half(self.source.values(rows), rows)
        if tensor.heads is not None:
            halves = llama.interleave(halves, self.head_dim)
        importance = self.importance.get(tensor.name)
        encoded = _Encoded(tensor.name, halves, importance, self.quantize)
        for target in self.targets[rows.spec.name]:
            self.writers.submit(target.put, rows.start, encoded[target.slot.type])


def memory_bytes(files: int, *, threads: int) -> int:
    """Return the peak memory of a build of LLaMA-2-7B's width, roughly; measured in docs/log.md.

    Args:
        files: GGUF files written at once.
        threads: as for :func:`build`.
    """
    # The interpreter with numpy and numba; for every worker a block as it is merged, rounded and
    # widened, and as much again while one changes to the next; blocks read ahead; what waits for
    # the digest of an input; for every file what waits to be written and for its digest, and two
    # buffers; a window a writer.
    working = (threads + 1) * BLOCK_WEIGHTS * 22 + (threads + 2) * BLOCK_WEIGHTS * 2
    a_file = _room(1, threads) * BLOCK_WEIGHTS * 3 // 2 + KEPT_BYTES + (8 << 20)
    return (170 << 20) + WAITING_BYTES + working + files * a_file + _WRITERS * (4 << 20)


def _room(files: int, threads: int) -> int:
    """Return how many pieces may wait to be written: of every worker's block, and of one more."""
    return files * (threads + 1)


def _quantizer(plan: Plan, device: DeviceName, report: Reporter) -> Quantizer:
    """Return what quantizes, with all that has to be compiled for the pass."""
    needs, narrowing = _kinds(plan), bool(plan.stored - {"F16"})
    if plan.adapter is not None:
        report.step("preparing the merge")
        import_module("medllm_pack.weights.merging")
    kernels.warm_up(
        needs if device == "cpu" else (),
        widening=plan.adapter is not None and "F16" in plan.stored,
        narrowing=narrowing,
        report=report,
    )
    if device == "cpu":
        return kernels.quantize
    from medllm_pack.quant.device import door  # imports torch

    door.require(device)
    chosen = door.Device(device)
    chosen.prepare(needs, report=report)
    return chosen.quantize


def _stream(
    plan: Plan, folder: Path, quantize: Quantizer, *, threads: int, report: Reporter
) -> tuple[Digests, Digests]:
    """Fill all outputs; return size and digest of every file read and of every file written."""
    with ExitStack() as stack:
        source = stack.enter_context(closing(plan.inputs.open()))
        outputs = {
            file.file: stack.enter_context(closing(Output(folder / file.file, file.layout)))
            for file in plan.files
        }
        cache = memory.available() // 2
        if plan.bytes_to_read > cache:
            source.bypass_page_cache()  # what is smaller may be in the page cache already
        names = {tensor.source: tensor.name for tensor in llama.tensors(plan.config)}
        layouts = [file.layout for file in plan.files]
        specs = list(
            reading_order(
                source.tensors.values(), names, layouts, room=WAITING_BYTES - _NORMS, cache=cache
            )
        )
        report.step("building", total_bytes=sum(spec.nbytes for spec in specs))
        blocks = _blocks(source, specs, head_dim=plan.config.head_dim)
        with Writers(threads=_WRITERS, room=_room(len(outputs), threads)) as writers:
            convert = _Converter(plan, source, outputs, quantize, writers)
            for read in ahead.each(convert, blocks, workers=threads, name="block"):
                report.advance(read)
            report.step("finishing")
        inputs = source.digests()
        written = {name: (out.layout.size, out.finish()) for name, out in outputs.items()}
    return inputs, written


def _kinds(plan: Plan) -> set[tuple[str, bool]]:
    """Return every type that will be quantized to, and whether with an importance matrix."""
    weights = plan.importance.weights if plan.importance else {}
    return {
        (slot.type, slot.name in weights)
        for file in plan.files
        for slot in file.layout.slots
        if slot.type not in ("F16", "F32")
    }


def _compare_with_hub(plan: Plan, inputs: Digests) -> None:
    """Refuse weights of which the Hub states another digest than was read."""
    for copy in (plan.inputs.model, plan.inputs.adapter):
        for file in copy.files.values() if copy else ():
            if file.sha256 and file.name in inputs and inputs[file.name][1] != file.sha256:
                raise CheckpointError(
                    f"{shown(file.name)} in the cache is not what {shown(copy and copy.source)} "
                    f"holds (SHA-256 {inputs[file.name][1][:12]}…, stated {file.sha256[:12]}…); "
                    f"delete {shown(file.path)} and build again"
                )


def _blocks(source: Source, specs: Sequence[TensorSpec], *, head_dim: int) -> Iterator[Rows]:
    """Read every tensor in blocks of rows that hold whole heads.

    The norms come first, some hundred kilobytes: they are scattered over the outputs, whose digests
    could not follow the writing otherwise.
    """
    for spec in specs:
        if spec.rows == 1:
            yield source.read(spec.name, 0, 1)
    for spec in specs:
        step = max(BLOCK_WEIGHTS // spec.shape[-1] // head_dim, 1) * head_dim
        for start in range(0, spec.rows if spec.rows > 1 else 0, step):
            yield source.read(spec.name, start, min(start + step, spec.rows))


def _check_header(folder: Path, file: PlannedFile) -> None:
    """Read the header of what was written with the strict reader."""
    try:
        found = read_gguf(folder / file.file)
    except GGUFError as error:
        raise WriteError(f"{error}; the disk did not keep what was written") from error
    if found.tensors != file.layout.slots:
        raise WriteError(f"{file.file} does not hold the planned tensors; the disk is not reliable")
