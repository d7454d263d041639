"""How llama.cpp is run for a check: threads, layers on the GPU, context.

Knows nothing of models; what a build of llama.cpp can do is asked in a worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from medllm_pack.errors import MedllmError, UsageError, shown
from medllm_pack.parity import worker
from medllm_pack.parity.allowance import LOOK_AT_GPU
from medllm_pack.processors import usable
from medllm_pack.quant import ggml

ALL_LAYERS: Final = 1 << 16  # more than any model has; llama.cpp takes what there is
CONTEXT: Final = 256  # ids of a text that are used
LEAST_CONTEXT: Final = 64  # a prompt, and what is written after it


@dataclass(frozen=True, slots=True)
class Runtime:
    """Settings of llama.cpp.

    Attributes:
        threads: on the processor.
        gpu_layers: layers that are computed on the GPU.
        ctx: ids of each text that are used, and llama.cpp's context.
    """

    threads: int = field(default_factory=usable)
    gpu_layers: int = 0
    ctx: int = CONTEXT

    def arguments(self) -> dict[str, Any]:
        """Return what every job that computes is given."""
        return {"threads": self.threads, "gpu_layers": self.gpu_layers}

    def document(self) -> dict[str, Any]:
        """Return what parity.json says: all but the threads, of which no figure depends."""
        every = self.gpu_layers == ALL_LAYERS
        return {"ctx": self.ctx, "gpu_layers": "all" if every else self.gpu_layers}

    def require(self) -> None:
        """Refuse to start if layers should go where nothing can take them.

        Raises:
            MedllmError: with what is missing, and the command that installs a build for GPUs if
                that is.
        """
        if self.gpu_layers == 0:
            return
        facts = worker.call("facts", allowance=LOOK_AT_GPU)
        if not facts.get("gpu"):
            raise MedllmError(f"--gpu-layers: {_missing(str(facts.get('reason', '')))}")


def _missing(reason: str) -> str:
    """Return why llama.cpp computes on no GPU, and what to do about it."""
    if built := ggml.gpu_libraries():
        said = f" ({reason})" if reason else ""
        return (
            f"the installed llama.cpp is built for {', '.join(sorted(built))} and finds no "
            f"GPU{said}; see whether nvidia-smi or rocm-smi lists one, or leave the option out"
        )
    return (
        "the installed llama.cpp is built without support for a GPU; with CUDA's compiler at hand "
        "run: CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-deps --no-cache-dir "
        f"--no-binary llama-cpp-python llama-cpp-python=={ggml.package_version()}"
    )


def layers(text: str | None) -> int:
    """Read ``--gpu-layers``: a number or ``all``.

    Raises:
        UsageError: if it is neither.
    """
    if text == "all":
        return ALL_LAYERS
    if text is None or (text.isascii() and text.isdigit() and int(text) < ALL_LAYERS):
        return int(text or 0)
    raise UsageError(f"--gpu-layers {shown(text)} is neither a number of layers nor 'all'")
