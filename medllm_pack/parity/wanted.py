"""The tensors that a sound GGUF file of the fine-tuned model holds, in float64.

``W + scale · (B·A)`` is computed anew by torch and numpy from the inputs; names come from gguf-py.
Nothing here is the build's code, so that it cannot repeat a mistake of the build.

Memory: what is asked for at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from medllm_pack.parity.original import LowRank, Original, Weights

Floats = NDArray[np.float64]

_CHUNK = 1 << 19  # weights looked at together: some arrays of 4 MiB, which caches hold


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a tensor.

    Attributes:
        base: of the model before fine-tuning.
        added: what the adapter adds, ``scale · (B·A)``; None where it has no pair.
        exact: the sum.
        stored: the sum as a file of an exact type holds it: norms in F32, matrices in F16.
    """

    base: Floats
    added: Floats | None
    exact: Floats
    stored: Floats


class Wanted:
    """Gives rows of every tensor of a model."""

    def __init__(self, original: Original) -> None:
        config = original.transformers_config()
        self.layers = config.num_hidden_layers
        self.pairs = original.pairs
        self._weights = original.weights()
        self._head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        #: GGUF name -> checkpoint name.
        self.sources = _names(self._weights, self.layers, tied=config.tie_word_embeddings)

    def shape(self, source: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the checkpoint."""
        return self._weights.shape(source)

    def groups(self, source: str) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows: whole heads, a few hundred thousand weights."""
        shape = self.shape(source)
        step = shape[0]
        if len(shape) > 1:
            step = max(_CHUNK // shape[1] // self._head_dim, 1) * self._head_dim
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])

    def rows(self, source: str, start: int, stop: int, *, permuted: bool = True) -> Rows:
        """Return some rows.

        Args:
            source: tensor of the checkpoint.
            start: first row.
            stop: row behind the last.
            permuted: whether rows of q and k come in llama.cpp's order.
        """
        tensor = self._weights.rows(source, start, stop)
        base = _float64(tensor)
        added = _added(self.pairs.get(source), start, stop)
        if permuted and source.endswith((".q_proj.weight", ".k_proj.weight")):
            base = _interleave(base, self._head_dim)
            added = None if added is None else _interleave(added, self._head_dim)
        if added is None:
            return Rows(base, None, base, base if _is_half(tensor) else _as_stored(base))
        exact = base + added
        return Rows(base, added, exact, _as_stored(exact))


def as_bfloat(stored: Floats) -> Floats:
    """Round F16 values on to BF16, as llama.cpp does."""
    import torch

    rounded: Floats = torch.from_numpy(stored).float().bfloat16().double().numpy()
    return rounded


def widened(values: NDArray[Any]) -> Floats:
    """Return values in float64, by way of float32, which is several times as fast from F16."""
    return values.astype(np.float32, copy=False).astype(np.float64)


def _names(weights: Weights, layers: int, *, tied: bool) -> dict[str, str]:
    """Return GGUF name -> checkpoint name, by gguf-py's table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    found = {}
    for source in weights:
        name = table.get_name(source, try_suffixes=(".weight",))
        # Rotary frequencies have a name there and are not stored; a tied head is the embedding.
        if name and "rope_freqs" not in name and "rot" not in name.split(".")[-2]:
            found[name] = source
    if tied:
        found.pop("output.weight", None)
    return found


def _float64(tensor: Any) -> Floats:
    import torch

    # torch only for what numpy has not: its threads and those that read tensors side by side would
    # wait for each other.
    values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return widened(values)


def _is_half(tensor: Any) -> bool:
    import torch

    return bool(tensor.dtype == torch.float16 and tensor.ndim > 1)


def _added(pair: LowRank | None, start: int, stop: int) -> Floats | None:
    if pair is None:
        return None
    added: Floats = pair.scale * (pair.b[start:stop].numpy() @ pair.a.numpy())  # (rows, r), (r, in)
    return added


def _interleave(rows: Floats, head_dim: int) -> Floats:
    """Return whole heads in llama.cpp's order: row 2i + j is Hugging Face's i + j · d/2."""
    order = np.arange(len(rows)).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).ravel()
    return rows[order]


def _as_stored(exact: Floats) -> Floats:
    """Round as a sound file does: norms to F32, matrices to F16."""
    if exact.ndim == 1:
        return exact.astype(np.float32).astype(np.float64)
    return widened(exact.astype(np.float16))
