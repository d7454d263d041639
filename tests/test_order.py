"""The order of reading: near that of the outputs, each file from its start, little that waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.make_checkpoint import SHAPES, Shape
from medllm_pack.gguf import llama
from medllm_pack.gguf.layout import Layout, Slot
from medllm_pack.pack.order import reading_order
from medllm_pack.weights.header import TensorSpec

ROOM = 144 << 20
ALL = 10**12


def specs_of(shape: Shape, most: int) -> Iterator[TensorSpec]:
    """Yield the tensors of shards, as a checkpoint has them."""
    for number, shard in enumerate(shape.shards(most)):
        offset = 1000
        for name, size in shard:
            spec = TensorSpec(name, "F16", size, f"{number}", offset)
            offset += spec.nbytes
            yield spec


def names_of(shape: Shape) -> dict[str, str]:
    config = llama.parse_config(shape.config())
    return {tensor.source: tensor.name for tensor in llama.tensors(config)}


def outputs_of(shape: Shape) -> Layout:
    """Return a layout in llama.cpp's order: what is outside of blocks, then blocks by number."""

    def place(name: str) -> tuple[int, str]:
        parts = name.split(".")
        return (int(parts[1]) if parts[0] == "blk" else -1, name)

    names = sorted(names_of(shape).values(), key=place)
    return Layout(b"", tuple(Slot(name, (1,), "F16", 0, 2) for name in names), 0)


def waiting(order: list[TensorSpec]) -> int:
    """Return how many bytes wait at most for the digest of their file."""
    turns: dict[str, list[TensorSpec]] = {}
    for spec in sorted(order, key=lambda spec: spec.offset):
        turns.setdefault(spec.file, []).append(spec)
    read, most = set[str](), 0
    for spec in order:
        read.add(spec.name)
        for turn in turns.values():
            while turn and turn[0].name in read:
                turn.pop(0)
        left = {spec.name for turn in turns.values() for spec in turn}
        most = max(most, sum(spec.nbytes for spec in order if spec.name in read & left))
    return most


@pytest.mark.parametrize("most", [10**10, ALL, 2 * 10**9])
@pytest.mark.parametrize("name", ["7b", "mistral-7b", "1b"])
def test_every_tensor_comes_once_and_little_waits(name: str, most: int) -> None:
    shape = SHAPES[name]
    specs = list(specs_of(shape, most))
    order = list(reading_order(specs, names_of(shape), outputs_of(shape), room=ROOM))
    assert sorted(order, key=lambda spec: spec.name) == sorted(specs, key=lambda spec: spec.name)
    assert waiting(order) <= ROOM


def test_a_7b_as_it_is_published_is_read_as_its_outputs_lie() -> None:
    shape = SHAPES["7b"]
    names, layout = names_of(shape), outputs_of(shape)
    order = list(reading_order(specs_of(shape, 10**10), names, layout, room=ROOM))
    found = [names[spec.name] for spec in order if len(spec.shape) > 1]
    assert found[:9] == [
        "output.weight", "token_embd.weight", "blk.0.attn_k.weight", "blk.0.attn_output.weight",
        "blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight",
        "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight",
    ]  # fmt: skip
    blocks = [int(name.split(".")[1]) for name in found if name.startswith("blk.")]
    # The first file ends with layer 23 and is sorted by name.
    assert list(dict.fromkeys(blocks)) == [
        0, 1, *range(10, 20), 2, *range(20, 24), *range(3, 10), *range(24, 32),
    ]  # fmt: skip


def test_without_room_a_file_is_read_as_it_lies() -> None:
    shape = SHAPES["7b"]
    specs = list(specs_of(shape, ALL))
    assert list(reading_order(specs, names_of(shape), outputs_of(shape), room=100 << 20)) == specs


def test_files_take_turns_and_what_no_output_holds_comes_at_once() -> None:
    shape = Shape(12, 64, 128, 4, 4, vocab=96)
    specs = [TensorSpec(f"{file}.rotary", "F32", (8,), f"{file}", 0) for file in range(2)]
    for number, spec in enumerate(specs_of(shape, ALL)):  # even and odd layers, each in its file
        file = sum(map(int, spec.name.split(".")[2:3])) % 2 if "layers" in spec.name else 0
        specs.append(TensorSpec(spec.name, "F16", spec.shape, f"{file}", 1000 + number * 10**6))
    specs.sort(key=lambda spec: (spec.file, spec.offset))
    names, layout = names_of(shape), outputs_of(shape)
    order = list(reading_order(specs, names, layout, room=ROOM))
    assert {spec.name for spec in order[:2]} == {"0.rotary", "1.rotary"}
    blocks = [names[s.name].split(".")[1] for s in order[2:] if "layers" in s.name]
    assert list(dict.fromkeys(blocks))[:3] == ["0", "1", "10"]
