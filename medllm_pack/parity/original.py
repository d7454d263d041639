"""The model that a pack was made from: its files, checked against pack.json, and its weights.

Weights are read with the safetensors library and scales are PEFT's own, so that nothing here can
repeat a mistake of the build. Knows nothing of GGUF. Memory: what is asked for at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from medllm_pack import files
from medllm_pack.errors import MedllmError, SourceError, UsageError, shown
from medllm_pack.progress import Reporter
from medllm_pack.weights.hub import fetch
from medllm_pack.weights.sources import LocalCopy, parse_source

Role = Literal["base", "merged", "adapter"]

_NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors")
_PREFIX = "base_model.model."
_DEFAULT = re.compile(r"(?<=\.lora_[AB])\.default\.weight$")


@dataclass(frozen=True)
class Sources:
    """Where the user says the inputs are; None: as pack.json says."""

    base: str | None = None
    adapter: str | None = None
    merged: str | None = None


@dataclass(frozen=True)
class LowRank:
    """The pair of one module, in float64: it adds ``scale · (B·A)`` to the weight.

    Attributes:
        a: shape (r, in).
        b: shape (out, r).
        scale: as PEFT computes it.
    """

    a: Any
    b: Any
    scale: float


@dataclass(frozen=True)
class Original:
    """The files of base (or merged) weights and of the adapter, by name."""

    model: Mapping[str, Path]
    adapter: Mapping[str, Path] | None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return self._read("config.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json; empty if there is none."""
        return self._read("tokenizer_config.json")

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Ids of the tokens that the JSON files add and the embedding has a row for, by text."""
        added = {entry["content"]: entry["id"] for entry in self._of_tokenizer_json()}
        added |= self._read("added_tokens.json")
        added |= {entry["content"]: int(key) for key, entry in self._of_decoder().items()}
        return {text: id_ for text, id_ in added.items() if id_ < self.config["vocab_size"]}

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The texts among them that are told to be special; added_tokens.json tells nothing."""
        found = {entry["content"] for entry in self._of_tokenizer_json() if entry.get("special")}
        found -= self._read("added_tokens.json").keys()
        found |= {e["content"] for e in self._of_decoder().values() if e.get("special")}
        return frozenset(found & self.added_tokens.keys())

    def _of_tokenizer_json(self) -> list[dict[str, Any]]:
        return self._read("tokenizer.json").get("added_tokens") or []

    def _of_decoder(self) -> dict[str, dict[str, Any]]:
        return self.tokenizer_config.get("added_tokens_decoder") or {}

    def transformers_config(self) -> Any:
        """Return the configuration as transformers reads it."""
        from transformers import AutoConfig

        document = dict(self.config)
        return AutoConfig.for_model(document.pop("model_type"), **document)

    def weights(self) -> Weights:
        """Open the weights of the model."""
        return Weights(self.model)

    def adapter_weights(self) -> dict[str, Any]:
        """Return the adapter's tensors, named as in the base model."""
        tensors = self.adapter_file() if self.adapter else {}
        return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}

    def adapter_file(self, device: str = "cpu") -> dict[str, Any]:
        """Return the adapter's tensors as PEFT names them in a file, on a device."""
        from safetensors.torch import load_file

        assert self.adapter is not None
        tensors: dict[str, Any] = load_file(
            self.adapter["adapter_model.safetensors"], device=device
        )
        # PEFT also reads names that still hold the name of the adapter.
        return {_DEFAULT.sub(".weight", name): tensor for name, tensor in tensors.items()}

    def peft_config(self) -> Any:
        """Return the adapter's configuration as PEFT reads it."""
        from peft import PeftConfig

        assert self.adapter is not None
        config = PeftConfig.from_pretrained(str(self.adapter["adapter_config.json"].parent))
        # All values are in the file; PEFT would decompose every base weight for MiCA's first ones.
        config.init_lora_weights = False
        return config

    @cached_property
    def pairs(self) -> dict[str, LowRank]:
        """The low-rank pair of every weight that the adapter changes, by its name.

        PEFT decides the scales: the adapter is put on a model without memory (device meta).
        """
        if self.adapter is None:
            return {}
        tensors, result = self.adapter_weights(), {}
        for module, scale in _scales(self.transformers_config(), self.peft_config()):
            a, b = (tensors.pop(f"{module}.lora_{side}.weight").double() for side in "AB")
            # A copy of the base's, with which the reference computes (reference.py).
            tensors.pop(f"{module}.base_layer.weight", None)
            result[f"{module}.weight"] = LowRank(a, b, scale)
        if tensors:
            raise MedllmError(f"PEFT has no place for the adapter tensor {shown(min(tensors))}")
        return result

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self.model:
            return {}
        text = files.read_small(self.model[name], limit=64 << 20)  # as the build reads them
        document: dict[str, Any] = json.loads(text)
        return document


class Weights:
    """Tensors of a checkpoint by name, read with the safetensors library.

    A file is opened for each read: what stays mapped would count as memory of this process.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._places: dict[str, Path] = {}
        for name, path in paths.items():
            if name.endswith(".safetensors"):
                with _open(path) as file:
                    self._places |= dict.fromkeys(file.keys(), path)

    def get(self, name: str) -> Any:
        """Return a whole tensor in its own type."""
        with _open(self._places[name]) as file:
            return file.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Any:
        """Return some rows of a tensor in its own type."""
        with _open(self._places[name]) as file:
            return file.get_slice(name)[start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        with _open(self._places[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def require_extra() -> None:
    """Refuse to start without the libraries of the reference.

    Raises:
        MedllmError: with the command that installs them.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise MedllmError(
            f"parity needs {', '.join(missing)}; run: pip install 'medllm-pack[parity]'"
        )


def find_original(manifest: Mapping[str, Any], sources: Sources, *, report: Reporter) -> Original:
    """Bring the inputs of a pack and compare every file with pack.json.

    Raises:
        UsageError: if an input was a folder and no option says where it is now.
        SourceError: if a file is missing or is not the one that the pack was made from.
    """
    entries = {entry["role"]: entry for entry in manifest["inputs"]}
    given = {"base": sources.base, "adapter": sources.adapter, "merged": sources.merged}
    for role, source in given.items():
        if source and role not in entries:
            raise UsageError(f"--{role}: the pack was made from {' and '.join(entries)}")
    found = {role: _bring(entry, given[role], report=report) for role, entry in entries.items()}
    return Original(found.get("base") or found["merged"], found.get("adapter"))


def _bring(entry: Mapping[str, Any], given: str | None, *, report: Reporter) -> Mapping[str, Path]:
    role = entry["role"]
    if given is None and entry["source"] == "folder":
        raise UsageError(
            f"the pack was made from a folder of {role} weights; say where it is: --{role} DIR"
        )
    recorded = f"{entry['source']}@{entry['revision']}" if entry["revision"] else entry["source"]
    copy = fetch(parse_source(given or recorded), role=role, report=report)
    report.step(f"comparing {role}", total_bytes=sum(file["size"] for file in entry["files"]))
    _compare(copy, entry["files"], role, report=report)
    return {file["name"]: copy.files[file["name"]].path for file in entry["files"]}


def _compare(
    copy: LocalCopy, recorded: Sequence[Mapping[str, Any]], role: str, *, report: Reporter
) -> None:
    for file in recorded:
        local = copy.files.get(file["name"])
        if local is None:
            raise SourceError(
                f"{role}: {shown(copy.source)} lacks {shown(file['name'])}, which the pack was "
                "made from"
            )
        digest = files.sha256(local.path, advance=report.advance)
        if digest != file["sha256"]:
            raise SourceError(
                f"{role}: {shown(file['name'])} is not the file that the pack was made from "
                f"(SHA-256 {digest[:12]}…, pack.json says {str(file['sha256'])[:12]}…); "
                f"name the right one with --{role}, or build again"
            )


def _scales(config: Any, lora: Any) -> Iterator[tuple[str, float]]:
    """Yield every module that PEFT puts a pair on, with PEFT's scale."""
    import torch
    from peft import inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
        inject_adapter_in_model(lora, skeleton)
    for name, module in skeleton.named_modules():
        if hasattr(module, "scaling") and hasattr(module, "lora_A"):
            yield name, float(module.scaling["default"])
