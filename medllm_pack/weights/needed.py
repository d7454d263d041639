"""Which files of a folder or repository are needed, told from their names.

Configuration, tokenizer, texts of the licence, and the weights as safetensors. Pickles are never
among them: they are not opened, not even downloaded. What is no model, or not of the role that was
asked for, is refused before anything is downloaded.

Knows nothing of folders, the Hub or its cache. Opens one file, the index of the shards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal

from medllm_pack.errors import SourceError, shown
from medllm_pack.weights.adapter_config import CONFIG as ADAPTER_CONFIG
from medllm_pack.weights.checkpoint import INDEX, SINGLE, read_index
from medllm_pack.weights.lora import WEIGHTS as ADAPTER_WEIGHTS

# "license": only the texts of a repository whose weights are not read.
Role = Literal["base", "merged", "adapter", "license"]

SMALL_LIMIT = 16 << 20  # what files.read_small accepts

_CONFIG = "config.json"
_SMALL = frozenset(
    {
        _CONFIG, "generation_config.json", "tokenizer.model", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "chat_template.jinja",
        "README.md",
    }
)  # fmt: skip
_LIMITS = {"tokenizer.json": 64 << 20}  # Llama 3's has 17 MB: it is read to say what it is
_LEGAL = ("license", "licence", "notice", "use_policy")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")  # how transformers' Trainer names its folders
_MLX = "adapters.safetensors"  # what mlx_lm.lora writes
_LISTED = 6  # names in a message
_ADAPTER_PICKLE = "load it with PEFT, then save_pretrained writes adapter_model.safetensors"
_MODEL_PICKLE = "load them with transformers, then save_pretrained writes safetensors"


def has_model(role: Role) -> bool:
    """Say whether the weights of a whole model are needed."""
    return role in ("base", "merged")


def config_name(role: Role) -> str:
    """Return the name of the file that says how the weights are meant."""
    return ADAPTER_CONFIG if role == "adapter" else _CONFIG


def is_small(name: str, role: Role) -> bool:
    """Say whether a file other than the weights is needed."""
    if name == ADAPTER_CONFIG:
        return role == "adapter"
    if name in _SMALL:
        return role != "license"
    return name.lower().startswith(_LEGAL) and _is_plain(name)


def _is_plain(name: str) -> bool:
    return name.isprintable() and not set(name) & set("/\\:") and len(name.encode()) <= 255


def check_small(name: str, size: int) -> None:
    """Raise SourceError if a file other than weights is larger than such files are."""
    limit = _LIMITS.get(name, SMALL_LIMIT)
    if not name.endswith((".safetensors", ".gguf")) and size > limit:
        raise SourceError(
            f"{shown(name)} has {size:,} bytes; at most {limit:,} are read from such a file"
        )


def check_names(names: Collection[str], role: Role, where: str) -> None:
    """Refuse what can be refused from the names alone, before anything is downloaded.

    Args:
        names: of all files, needed or not.
        role: what the files are to be.
        where: the source, for messages.

    Raises:
        SourceError: if there are no safetensors for this role, or nothing that explains them.
    """
    if role == "license":
        return
    adapter, model = ADAPTER_WEIGHTS in names, SINGLE in names or INDEX in names
    if role == "adapter" and not adapter:
        if model:
            raise SourceError(f"{where} is a whole model, no adapter; use --merged or --base")
        raise _no_weights(names, where, ADAPTER_WEIGHTS, _ADAPTER_PICKLE)
    if role != "adapter" and not model:
        if adapter:
            raise SourceError(f"{where} is an adapter, no whole model; use --adapter")
        raise _no_weights(names, where, f"{SINGLE} nor {INDEX}", _MODEL_PICKLE)
    config = config_name(role)
    if config not in names:
        raise SourceError(f"{where} has no {config}; without it the weights cannot be understood")


def _no_weights(names: Collection[str], where: str, wanted: str, convert: str) -> SourceError:
    pickles = sorted(
        name
        for name in names
        if name.lower().endswith(_PICKLES) and not name.startswith(_TRAINING_STATE)
    )
    if pickles:
        return SourceError(
            f"{where} has its weights only as pickle: {listed(pickles)}. Pickles can run code and "
            "are never opened; ask its author for safetensors, or convert them where nothing can "
            f"be harmed ({convert})"
        )
    if _MLX in names and wanted == ADAPTER_WEIGHTS:
        return SourceError(
            f"{where} is an adapter of MLX ({_MLX}); merge it with mlx_lm.fuse, put the base's "
            "tokenizer.model beside the result, and build with --merged"
        )
    neither = "neither " if " nor " in wanted else "no "
    return SourceError(
        f"{where} has {neither}{wanted}; it holds {listed(sorted(names))}{_checkpoint_hint(names)}"
    )


def _checkpoint_hint(names: Collection[str]) -> str:
    """Name the last of a trainer's checkpoints, where the folder above them was given."""
    found = [match for name in names if (match := _CHECKPOINT.fullmatch(name))]
    if not found:
        return ""
    last = max(found, key=lambda match: int(match[1]))[0]
    return f". Name one of the checkpoints in it, such as …/{last}"


def weight_names(
    names: Collection[str], role: Role, path_of: Callable[[str], Path]
) -> tuple[str, ...]:
    """Return the index, if there is one, and the weight files; they may not all exist.

    Args:
        names: of all files.
        role: what the files are to be.
        path_of: where the index can be read.

    Raises:
        SourceError: if the index cannot be read.
        CheckpointError: if it is damaged.
    """
    if role == "license":
        return ()
    if role == "adapter":
        return (ADAPTER_WEIGHTS,)
    # The order of transformers: the single file wins, and the shards beside it are left alone.
    if SINGLE in names:
        return (SINGLE,)
    return (INDEX, *sorted(set(read_index(path_of(INDEX)).values())))


def listed(names: Sequence[str]) -> str:
    """Return the names as a message shows them, the first few of many."""
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(shown(name) for name in names[:_LISTED]) or "nothing") + rest
