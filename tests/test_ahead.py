"""Work ahead: in order, bounded, and over as soon as something goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from medllm_pack import ahead


def test_results_come_in_the_order_of_the_items() -> None:
    gate = threading.Event()

    def work(n: int) -> int:
        if n == 0:
            gate.wait(5)  # the first is the last to be done
        elif n == 2:
            gate.set()
        return n * n

    assert list(ahead.each(work, range(20), workers=3, name="test")) == [n * n for n in range(20)]


def test_an_item_that_takes_long_holds_nobody_up() -> None:
    gate = threading.Event()

    def work(n: int) -> bool:
        if n == 7:
            gate.set()
        return n > 0 or gate.wait(5)

    assert all(ahead.each(work, range(20), workers=2, name="test"))


def test_only_a_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    results = ahead.each(lambda n: n, items(), workers=2, name="test")
    assert next(results) == 0
    assert len(taken) <= 4
    assert list(results) == list(range(1, 100))


@pytest.mark.parametrize("failing", [0, 7])
def test_what_goes_wrong_ends_it(failing: int) -> None:
    begun: list[int] = []

    def work(n: int) -> int:
        begun.append(n)
        if n == failing:
            raise ValueError(n)
        return n

    with pytest.raises(ValueError, match=str(failing)):
        list(ahead.each(work, range(1000), workers=2, name="test"))
    assert max(begun) <= failing + 4
    assert not [t for t in threading.enumerate() if t.name.startswith("test")]
