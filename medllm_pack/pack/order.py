"""In which order the matrices of a checkpoint are read.

Inputs lie in the order of names, in files; outputs in the order of layers, the head first. An
output's digest follows only what is complete from its start, and what it cannot follow must be read
back from the disk. So files take turns, and each is read in the order of the outputs; what is read
before its turn waits for the digest of its own file. In the order of names layer 2 comes after
layer 19, so that a quarter of a 7B waits, in the page cache. Where memory is too short for that, or
less would be read back than would wait, a file is read from its start to its end, and only inside a
layer what the outputs have first is read first.

Reads nothing; knows names, places and sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from medllm_pack.gguf.layout import Layout
from medllm_pack.weights.header import TensorSpec


def reading_order(
    specs: Iterable[TensorSpec],
    names: Mapping[str, str],
    layouts: Sequence[Layout],
    *,
    room: int,
    cache: int,
) -> Iterator[TensorSpec]:
    """Yield every tensor once.

    Args:
        specs: by file, and in a file by offset.
        names: of a tensor of the checkpoint in GGUF; others are left out there.
        layouts: of the outputs; all have their tensors in the same order.
        room: bytes that may wait in memory for the digest of their file.
        cache: bytes that may wait in the page cache.
    """
    at = {slot.name: i for i, slot in enumerate(layouts[0].slots)}
    places = {source: at[name] for source, name in names.items()}
    written = {
        source: sum(layout.slots[place].nbytes for layout in layouts)
        for source, place in places.items()
    }
    files = []
    for _, group in groupby(specs, key=lambda spec: spec.file):
        inside = list(group)
        stored = {spec.name: spec.nbytes for spec in inside}
        # What no output holds is nobody's turn: it comes at once.
        wanted = sorted(inside, key=lambda spec: places.get(spec.name, -1))
        by_layer = list(_by_layer(inside, names, places, stored, room))
        most, _ = _waiting(inside, wanted, stored)
        _, read_back = _waiting(wanted, by_layer, written)
        if most <= room:
            files.append(deque(wanted))
        elif most <= cache and most < read_back:
            files.append(deque(wanted))
            cache -= most  # files may wait at the same time
        else:
            files.append(deque(by_layer))
    while files := [file for file in files if file]:
        first = min(files, key=lambda file: places.get(file[0].name, -1))
        yield first.popleft()


def _by_layer(
    specs: Sequence[TensorSpec],
    names: Mapping[str, str],
    places: Mapping[str, int],
    stored: Mapping[str, int],
    room: int,
) -> Iterator[TensorSpec]:
    """Yield the tensors of a file; those of a layer in the outputs' order, if there is room."""
    for layer, group in groupby(specs, key=lambda spec: _layer(names.get(spec.name, ""))):
        inside = list(group)
        wanted = sorted(inside, key=lambda spec: places.get(spec.name, -1))
        yield from wanted if layer and _waiting(inside, wanted, stored)[0] <= room else inside


def _layer(name: str) -> str:
    """Return the part of a GGUF name that a layer's tensors share, such as ``blk.0``."""
    return name.rsplit(".", 2)[0] if name.startswith("blk.") else ""


def _waiting(
    turns: Sequence[TensorSpec], order: Sequence[TensorSpec], sizes: Mapping[str, int]
) -> tuple[int, int]:
    """Return how many bytes wait for their turn if they come in an order: at most, and in all.

    Args:
        turns: whose turn is when.
        order: the same tensors as they come.
        sizes: bytes by name; what is not there has none.
    """
    turn, come, waiting, most, total = 0, set[str](), 0, 0, 0
    for spec in order:
        come.add(spec.name)
        size = sizes.get(spec.name, 0)
        total += size if spec.name != turns[turn].name else 0
        waiting += size
        while turn < len(turns) and turns[turn].name in come:
            waiting -= sizes.get(turns[turn].name, 0)
            turn += 1
        most = max(most, waiting)
    return most, total
