"""The door to torch's CUDA: is there a GPU that computes, and if not, what is missing?

torch is imported when somebody asks, and not before. Knows nothing of what will be computed.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

from medllm_pack.errors import DeviceError

Choice = Literal["auto", "cpu", "cuda"]  # auto: a GPU if there is one that computes

_OTHERWISE = "or use --device cpu"


def require() -> None:
    """Refuse to start if there is no GPU that computes.

    Raises:
        DeviceError: if torch, its CUDA build or a GPU is missing, or if the GPU does not work.
    """
    if reason := missing():
        raise DeviceError(f"{reason}, {_OTHERWISE}")


def chosen(choice: Choice) -> Literal["cpu", "cuda"]:
    """Return the device that a choice means here.

    Raises:
        DeviceError: if a GPU was asked for and there is none that computes.
    """
    if choice == "cuda":
        require()
    return "cpu" if choice == "cpu" or missing() else "cuda"


def missing() -> str | None:
    """Return what is missing, with the remedy; None if nothing is."""
    try:
        import torch
    except ImportError:
        return (
            "torch is not installed, which --device cuda needs; run: "
            "pip install 'medllm-pack[cuda]'"
        )
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch "
            "(https://pytorch.org/get-started/locally)"
        )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        reason = f" ({first_line(told[0].message)})" if told else ""
        return (
            f"torch {torch.__version__} finds no NVIDIA GPU{reason}; see whether nvidia-smi lists "
            "one"
        )
    return _try_out(torch)


def _try_out(torch: Any) -> str | None:
    """Compute one plus one there: a GPU may be older, or newer, than all that torch is built for.

    torch says that it is there all the same.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same, as a warning
            torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:  # torch's name for whatever the driver says
        return (
            f"torch {torch.__version__} does not compute on the GPU: {first_line(error)}; "
            "see nvidia-smi"
        )
    return None


def first_line(text: object) -> str:
    """Return the first line of what a driver says in many."""
    return str(text).strip().partition("\n")[0]
