"""What changed where nothing may be written: buffers between steps, results after they were handed back."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.execution import observation
from attn_fuzz.execution.observation import HandedBack, Watch


def pair(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows * 2.0).view(rows, 1, 2), torch.ones(rows, 1, 2)


class Shown:
    """A buffer as a layer shows it, which may be another one at every look."""

    def __init__(self, now: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.now = now

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.now


def test_a_buffer_that_grew_is_compared_where_it_was() -> None:
    shown = Shown(pair(3))
    watch = Watch(("k", "v"), shown)
    k, v = shown.now = pair(6)
    assert watch.compare("forward", 3, 6) == []
    k, v = shown.now = torch.cat([k, k]), torch.cat([v, v])
    k[1] = 7.0
    (stray,) = watch.compare("forward of [6, 12]", 6, 12)
    assert (stray.tensor, stray.step, stray.rows, stray.value) == ("k", "forward of [6, 12]", (1,), 7.0)


def test_a_buffer_that_begins_with_nothing_may_be_written() -> None:
    shown = Shown(None)
    watch = Watch(("k", "v"), shown)
    shown.now = pair(2)
    assert watch.compare("forward", 0, 2) == []
    shown.now = None
    assert watch.compare("forward", 0, 0) == []


def test_a_buffer_of_another_width_is_not_compared_row_by_row() -> None:
    shown = Shown(pair(2))
    watch = Watch(("k", "v"), shown)
    k, v = pair(2)
    shown.now = (k.double(), v[..., :1])
    assert watch.compare("forward", 0, 0) == []


def test_a_buffer_that_is_not_watched_is_checked_and_not_compared() -> None:
    shown = Shown(pair(3))
    watch = Watch(("k", "v"), shown, watched=False)
    k, _ = shown.now or pair(3)
    k[1] = 7.0
    assert watch.compare("forward", 0, 0) == watch.settle() == []
    with pytest.raises(TypeError, match="should be two tensors"):
        Watch(("dk", "dv"), lambda: torch.zeros(2, 1, 2), watched=False)  # type: ignore[arg-type, return-value]


def test_what_was_handed_back_is_as_it_was_and_its_change_is_told() -> None:
    given, memory = HandedBack("out"), torch.zeros(3, 2)
    given.add("forward of [0, 3]", memory)
    given.add("forward of [3, 4]", torch.ones(1, 2))
    assert given.changed() == []
    memory[2, 1] = 5.0
    (stray,) = given.changed()
    assert (stray.tensor, stray.step, stray.rows, stray.value) == ("out", "forward of [0, 3]", (2,), 5.0)
    assert torch.equal(given.joined(), torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0]]))


def test_what_is_no_tensor_and_no_pair_of_them_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"the forward of \[0, 1\] should give a tensor, but gave NoneType"):
        HandedBack("out").add("forward of [0, 1]", None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="should be two tensors, dk and dv, or None"):
        Watch(("dk", "dv"), lambda: torch.zeros(2, 1, 2))  # type: ignore[arg-type, return-value]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are not waited for one by one, as on GPUs."""
    monkeypatch.setattr(observation, "waited_for", lambda tensor: True)


@pytest.mark.usefixtures("waiting")
def test_every_look_is_told_in_the_end_with_what_it_saw() -> None:
    k, v = pair(4)
    watch = Watch(("k", "v"), Shown((k, v)))
    k[1] = 7.0
    assert watch.compare("forward of [2, 4]", 2, 4) == []
    k[1] = 8.0
    v[3] = 9.0
    assert watch.compare("backward of [2, 4]", 2, 4) == []
    assert watch.compare("backward of [0, 2]", 0, 0) == []
    told = [(stray.tensor, stray.step, stray.rows, stray.value) for stray in watch.settle()]
    assert told == [("k", "forward of [2, 4]", (1,), 7.0), ("k", "backward of [2, 4]", (1,), 8.0)]
    assert watch.settle() == []


@pytest.mark.usefixtures("waiting")
def test_what_a_buffer_showed_before_it_was_gone_is_told_too() -> None:
    shown = Shown(pair(2))
    watch = Watch(("k", "v"), shown)
    assert shown.now is not None
    shown.now[0][0] = 5.0
    watch.compare("forward", 1, 2)
    shown.now = None
    watch.compare("backward", 0, 0)
    assert [(stray.step, stray.rows) for stray in watch.settle()] == [("forward", (0,))]


@pytest.mark.usefixtures("waiting")
def test_a_result_that_changed_is_told_though_looks_are_not_waited_for() -> None:
    given, memory = HandedBack("out"), torch.zeros(3, 2)
    given.add("forward of [0, 3]", memory)
    assert given.changed() == []
    memory[2, 1] = 5.0
    (stray,) = given.changed()
    assert (stray.rows, stray.value) == ((2,), 5.0)
