"""A checkpoint: the tensors of one or several safetensors files, read as one model.

The index of the shards and the shards themselves must agree. Knows nothing of GGUF or adapters,
and leaves to safetensors.py how a file is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from medllm_pack.errors import CheckpointError, shown
from medllm_pack.files import read_small
from medllm_pack.weights.documents import strict_json
from medllm_pack.weights.header import TensorSpec
from medllm_pack.weights.safetensors import Rows, TensorFile, Values

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of one or several safetensors files, read as one model.

    Attributes:
        tensors: by name, in the order in which they lie in the files; reading them in this
            order reads every file once from start to end.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.files = {file.name: file for file in files}
        self.tensors: Mapping[str, TensorSpec] = MappingProxyType(_union(files))

    @classmethod
    def open(cls, paths: Mapping[str, Path]) -> Checkpoint:
        """Open a checkpoint from its files by name: a single file, or an index and its shards.

        Raises:
            CheckpointError: if a file is missing or damaged, or index and shards disagree.
            SourceError: if the index cannot be read.
        """
        if SINGLE in paths:
            return cls([TensorFile(paths[SINGLE], name=SINGLE)])
        if INDEX not in paths:
            raise CheckpointError(f"there is neither {SINGLE} nor {INDEX}")
        index = read_index(paths[INDEX])
        shards = sorted(set(index.values()))
        if missing := [shard for shard in shards if shard not in paths]:
            raise CheckpointError(
                f"{INDEX} names {len(shards)} shards; missing: {', '.join(missing)}. "
                "Download the checkpoint again"
            )
        opened: list[TensorFile] = []
        try:
            for shard in shards:
                opened.append(TensorFile(paths[shard], name=shard))
            checkpoint = cls(opened)
            _check_index(index, checkpoint.tensors)
        except BaseException:
            for file in opened:
                file.close()
            raise
        return checkpoint

    def read(self, name: str, start: int, stop: int) -> Rows:
        """Read rows ``start`` to ``stop`` of a tensor."""
        spec = self.tensors[name]
        return self.files[spec.file].read(spec, start, stop)

    def values(self, rows: Rows) -> Values:
        """Return the exact values of rows that were read."""
        return rows.values()

    def bypass_page_cache(self) -> None:
        """Read straight from the disk from now on, where the file system does it."""
        for file in self.files.values():
            file.bypass_page_cache()

    def digests(self) -> dict[str, tuple[int, str]]:
        """Return size and SHA-256 of every file, by name."""
        return {name: (file.size, file.digest()) for name, file in self.files.items()}

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()


def read_index(path: Path) -> dict[str, str]:
    """Return the weight map of an index: tensor name -> shard file name.

    Raises:
        CheckpointError: if it is no such index, or names a file outside its folder.
        SourceError: if it cannot be read.
    """
    document = strict_json(read_small(path), what=INDEX)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", shard):
            raise CheckpointError(
                f"{INDEX} names the shard {shown(shard)}; only plain *.safetensors names are read"
            )
    return weight_map


def _union(files: Iterable[TensorFile]) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for file in files:
        for spec in file.tensors:
            if spec.name in tensors:
                raise CheckpointError(
                    f"tensor {shown(spec.name)} is in {tensors[spec.name].file} and in {file.name}"
                )
            tensors[spec.name] = spec
    return tensors


def _check_index(index: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> None:
    for name, shard in index.items():
        if name not in tensors or tensors[name].file != shard:
            raise CheckpointError(f"{INDEX} says that {shown(name)} is in {shard}; it is not")
    if extra := tensors.keys() - index.keys():
        raise CheckpointError(f"{INDEX} does not name {shown(min(extra))}, which a shard holds")
