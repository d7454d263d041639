"""In which order the matrices of a checkpoint are read.

Inputs lie in the order of names, in files; outputs in the order of layers, the head first. An
output's digest follows only what is complete from its start, and what it cannot follow must be read
back from the disk. So files take turns, each read from its start to its end, and inside a layer
what the outputs have first is read first: then it waits in memory for the digest of its own file.

Knows nothing of bytes. Memory: what waits, at most ``room`` bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from medllm_pack.gguf.layout import Layout
from medllm_pack.weights.header import TensorSpec


def reading_order(
    specs: Iterable[TensorSpec], names: Mapping[str, str], layout: Layout, *, room: int
) -> Iterator[TensorSpec]:
    """Yield every tensor once.

    Args:
        specs: by file, and in a file by offset.
        names: of a tensor of the checkpoint in GGUF; others are left out there.
        layout: of an output; all have their tensors in the same order.
        room: bytes that may wait for the digest of their file.
    """
    at = {slot.name: i for i, slot in enumerate(layout.slots)}
    places = {source: at[name] for source, name in names.items()}
    files = [
        deque(_inside(list(group), names, places, room))
        for _, group in groupby(specs, key=lambda spec: spec.file)
    ]
    while files := [file for file in files if file]:
        # What no output holds is nobody's turn: it comes at once.
        first = min(files, key=lambda file: places.get(file[0].name, -1))
        yield first.popleft()


def _inside(
    specs: Sequence[TensorSpec], names: Mapping[str, str], places: Mapping[str, int], room: int
) -> Iterator[TensorSpec]:
    """Yield the tensors of a file; those of a layer in the outputs' order, if there is room."""
    for layer, group in groupby(specs, key=lambda spec: _layer(names.get(spec.name, ""))):
        inside = list(group)
        wanted = sorted(inside, key=lambda spec: places.get(spec.name, -1))
        yield from wanted if layer and _most_waiting(inside, wanted) <= room else inside


def _layer(name: str) -> str:
    """Return the part of a GGUF name that a layer's tensors share, such as ``blk.0``."""
    return name.rsplit(".", 2)[0] if name.startswith("blk.") else ""


def _most_waiting(inside: Sequence[TensorSpec], wanted: Sequence[TensorSpec]) -> int:
    """Return how many bytes wait at most if a file is read in another order than its own."""
    turn, read, waiting, most = 0, set[str](), 0, 0
    for spec in wanted:
        read.add(spec.name)
        waiting += spec.nbytes
        while turn < len(inside) and inside[turn].name in read:
            waiting -= inside[turn].nbytes
            turn += 1
        most = max(most, waiting)
    return most
