"""The reducer by itself, on tuples of numbers: what it tries, in which order, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from attn_fuzz.reduction.reduce import Deadline, Pass, reduce

Numbers = tuple[int, ...]

NEVER = Deadline(float("inf"))


def without_one(numbers: Numbers) -> Iterator[Numbers]:
    for place in range(len(numbers)):
        yield (*numbers[:place], *numbers[place + 1 :])


def one_less(numbers: Numbers) -> Iterator[Numbers | None]:
    for place, number in enumerate(numbers):
        yield (*numbers[:place], number - 1, *numbers[place + 1 :]) if number else None


def one_more(numbers: Numbers) -> Iterator[Numbers]:
    for place, number in enumerate(numbers):
        yield (*numbers[:place], number + 1, *numbers[place + 1 :])


def short_then_small(numbers: Numbers) -> tuple[int, Numbers]:
    return len(numbers), numbers


class Asked:
    """Says what fails, and remembers what it was asked."""

    def __init__(self, answer: Callable[[Numbers], bool]) -> None:
        self.answer = answer
        self.tried: list[Numbers] = []

    def __call__(self, numbers: Numbers) -> bool:
        self.tried.append(numbers)
        return self.answer(numbers)


def reduced(start: Numbers, fails: Asked, *passes: Pass[Numbers], deadline: Deadline = NEVER) -> Numbers:
    return reduce(start, passes, fails, short_then_small, deadline)


def test_every_pass_is_run_until_none_is_of_use() -> None:
    # The last number can become less only once it is alone: in the second round.
    fails = Asked(lambda numbers: bool(numbers) and (numbers[-1] == 2 or numbers == (1,)))
    assert reduced((1, 5, 2), fails, one_less, without_one) == (1,)
    assert len(fails.tried) == len(set(fails.tried))
    assert (1, 5, 2) not in fails.tried


def test_what_is_not_simpler_is_not_even_tried() -> None:
    fails = Asked(lambda numbers: True)
    assert reduced((2, 2), fails, one_more) == (2, 2)
    assert fails.tried == []
    # Nor does a pass undo what another has reached, though it would fail as well.
    assert reduced((2, 2), fails, one_more, one_less) == (0, 0)


def test_what_fails_is_gone_on_with_where_it_was_found() -> None:
    """Of a hundred numbers the last one stays: the first ones are not looked at again each time that one goes."""
    fails = Asked(lambda numbers: 7 in numbers)
    assert reduced((*[1] * 50, 7, *[2] * 49), fails, without_one) == (7,)
    assert len(fails.tried) < 110


@pytest.mark.parametrize("attempts", [0, 1, 5])
def test_the_deadline_leaves_the_best_so_far(attempts: int) -> None:
    fails = Asked(lambda numbers: sum(numbers) >= 20)
    deadline = Deadline(attempts - 0.5, lambda: float(len(fails.tried)))
    small = reduced((9, 9, 9), fails, one_less, deadline=deadline)
    assert len(fails.tried) == attempts
    assert small == min([(9, 9, 9), *fails.tried])


def test_a_deadline_is_so_many_seconds_from_now_by_its_clock() -> None:
    now = 5.0
    deadline = Deadline.after(2.0, lambda: now)
    assert not deadline.passed()
    now = 7.1
    assert deadline.passed()


def test_what_raises_is_not_swallowed() -> None:
    def broken(numbers: Numbers) -> bool:
        raise ValueError("a mistake of the harness")

    with pytest.raises(ValueError, match="a mistake of the harness"):
        reduced((3,), Asked(broken), one_less)
