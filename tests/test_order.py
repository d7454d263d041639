"""The order of reading: that of the outputs, as far as what waits then has room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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


def outputs_of(shape: Shape, bits: float = 16) -> list[Layout]:
    """Return a layout in llama.cpp's order: what is outside of blocks, then blocks by number."""
    sizes = {names_of(shape)[spec.name]: spec.nbytes for spec in specs_of(shape, ALL)}

    def place(name: str) -> tuple[int, str]:
        parts = name.split(".")
        return (int(parts[1]) if parts[0] == "blk" else -1, name)

    slots = (Slot(n, (1,), "F16", 0, int(sizes[n] * bits / 16)) for n in sorted(sizes, key=place))
    return [Layout(b"", tuple(slots), 0)]


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
    order = list(reading_order(specs, names_of(shape), outputs_of(shape), room=ROOM, cache=0))
    assert sorted(order, key=lambda spec: spec.name) == sorted(specs, key=lambda spec: spec.name)
    assert waiting(order) <= ROOM


def test_without_page_cache_a_7b_is_read_as_its_outputs_lie_but_for_layers_out_of_turn() -> None:
    shape = SHAPES["7b"]
    names, layouts = names_of(shape), outputs_of(shape)
    order = list(reading_order(specs_of(shape, 10**10), names, layouts, room=ROOM, cache=0))
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


@pytest.mark.parametrize(("most", "cache"), [(10**10, 34 * 10**8), (ALL, 4 * 10**9)])
def test_where_the_page_cache_has_room_outputs_are_filled_from_start_to_end(
    most: int, cache: int
) -> None:
    shape = SHAPES["7b"]
    names, layouts = names_of(shape), outputs_of(shape)
    specs = list(specs_of(shape, most))
    order = list(reading_order(specs, names, layouts, room=ROOM, cache=cache))
    assert [names[spec.name] for spec in order] == [slot.name for slot in layouts[0].slots]
    assert ROOM < waiting(order) <= cache
    less = reading_order(specs, names, layouts, room=ROOM, cache=waiting(order) // 2)
    assert waiting(list(less)) <= ROOM


def test_few_bytes_are_rather_read_back_than_kept_in_the_page_cache() -> None:
    """Layers 10 to 23 of a 7B: 3.2 GB of an input wait, or 1.6 of a small output are read back."""
    shape = SHAPES["7b"]
    specs, names, small = list(specs_of(shape, 10**10)), names_of(shape), outputs_of(shape, 4.8)
    one = reading_order(specs, names, small, room=ROOM, cache=ALL)
    assert waiting(list(one)) <= ROOM
    three = reading_order(specs, names, small * 3, room=ROOM, cache=ALL)
    assert [names[spec.name] for spec in three] == [slot.name for slot in small[0].slots]


def test_files_share_the_page_cache() -> None:
    """Two files that both begin with a layer whose turn is late: there is room for one of them."""
    shape = Shape(24, 2048, 5632, 32, 32, vocab=2000)
    names, layouts = names_of(shape), outputs_of(shape)
    specs = []
    for spec in specs_of(shape, ALL):
        even = "layers" in spec.name and int(spec.name.split(".")[2]) % 2 == 0
        specs.append(replace(spec, file=f"{even:d}"))
    specs.sort(key=lambda spec: (spec.file, spec.offset))
    both = list(reading_order(specs, names, layouts, room=0, cache=ALL))
    one = list(reading_order(specs, names, layouts, room=0, cache=waiting(both) - 1))
    assert 0 < waiting(one) < waiting(both)


def test_without_room_a_file_is_read_as_it_lies() -> None:
    shape = SHAPES["7b"]
    specs = list(specs_of(shape, ALL))
    order = reading_order(specs, names_of(shape), outputs_of(shape), room=100 << 20, cache=0)
    assert list(order) == specs


def test_files_take_turns_and_what_no_output_holds_comes_at_once() -> None:
    shape = Shape(12, 64, 128, 4, 4, vocab=96)
    specs = [TensorSpec(f"{file}.rotary", "F32", (8,), f"{file}", 0) for file in range(2)]
    for number, spec in enumerate(specs_of(shape, ALL)):  # even and odd layers, each in its file
        file = sum(map(int, spec.name.split(".")[2:3])) % 2 if "layers" in spec.name else 0
        specs.append(TensorSpec(spec.name, "F16", spec.shape, f"{file}", 1000 + number * 10**6))
    specs.sort(key=lambda spec: (spec.file, spec.offset))
    names, layouts = names_of(shape), outputs_of(shape)
    order = list(reading_order(specs, names, layouts, room=0, cache=0))
    assert {spec.name for spec in order[:2]} == {"0.rotary", "1.rotary"}
    blocks = [names[s.name].split(".")[1] for s in order[2:] if "layers" in s.name]
    assert list(dict.fromkeys(blocks))[:3] == ["0", "1", "10"]
