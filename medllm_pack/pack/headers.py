"""Whether the headers of the weights hold what config.json promises.

Every tensor of a LLaMA must be there in its shape, and no other. Opens the weights, reads their
headers, and closes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from medllm_pack import files
from medllm_pack.errors import AdapterError, CheckpointError, PlanError, shown
from medllm_pack.gguf import llama
from medllm_pack.pack.inputs import Inputs
from medllm_pack.weights.adapter_config import AdapterConfig
from medllm_pack.weights.checkpoint import Checkpoint
from medllm_pack.weights.documents import strict_json
from medllm_pack.weights.header import DType
from medllm_pack.weights.merged import TIED, Merged


@dataclass(frozen=True)
class Headers:
    """What the headers say.

    Attributes:
        adapter: the adapter's configuration; None if merged weights are packed.
        adapter_tensors: tensors of the adapter.
        adapter_pairs: matrices that it changes.
        stored: types in which the matrices are stored.
        notices: decisions that the user should know.
    """

    adapter: AdapterConfig | None = None
    adapter_tensors: int = 0
    adapter_pairs: int = 0
    stored: frozenset[DType] = frozenset()
    notices: tuple[str, ...] = ()


def read_config(inputs: Inputs) -> llama.LlamaConfig:
    """Read config.json.

    Raises:
        CheckpointError: if there is none, or it is not a LLaMA's.
    """
    path = inputs.model_paths.get("config.json")
    if path is None:
        raise CheckpointError("there is no config.json; is this the folder of a model?")
    return llama.parse_config(strict_json(files.read_small(path), what="config.json"))


def read_headers(inputs: Inputs, config: llama.LlamaConfig) -> Headers:
    """Read the headers of the weights and compare them with the configuration.

    Raises:
        CheckpointError: if a file is damaged.
        AdapterError: if the adapter does not fit.
        PlanError: with every tensor that is missing, of another shape, or unknown.
    """
    with closing(inputs.open()) as source:
        problems = list(_problems(source, config))
        if problems:
            raise PlanError("weights", problems)
        if config.tied and isinstance(source, Merged) and llama.HEAD in source.adapter.pairs:
            raise AdapterError(TIED)
        ignored = [n for n in source.tensors if llama.is_ignored(n, tied=config.tied)]
        notices = [f"{n} is left out: the embeddings are tied" for n in ignored if n == llama.HEAD]
        stored = frozenset(spec.dtype for spec in source.tensors.values() if len(spec.shape) > 1)
        if not isinstance(source, Merged):
            return Headers(stored=stored, notices=tuple(notices))
        adapter = source.adapter
        if adapter.config.fan_in_fan_out:
            notices.append("fan_in_fan_out is set and ignored, as PEFT does for linear layers")
        return Headers(
            adapter.config, adapter.n_tensors, len(adapter.pairs), stored, tuple(notices)
        )


def _problems(source: Checkpoint | Merged, config: llama.LlamaConfig) -> Iterator[str]:
    expected = {tensor.source: tensor for tensor in llama.tensors(config)}
    for name, tensor in expected.items():
        spec = source.tensors.get(name)
        if spec is None:
            yield f"tensor {name} is missing"
        elif spec.shape != tensor.shape:
            yield f"tensor {name} has the shape {spec.shape}, config.json promises {tensor.shape}"
    for name in source.tensors:
        if name not in expected and not llama.is_ignored(name, tied=config.tied):
            yield f"tensor {shown(name)} is not part of a LLaMA; nothing is left out in silence"
