"""Results of layers kept in their places among all calls'."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.execution.kept_results import Arenas, Kept, lies_in

COUNTS = (3, 2)


@pytest.fixture
def arenas() -> Arenas:
    return Arenas(COUNTS, {"out": (4,)}, {"d_dense": (2, 2)}, torch.device("cpu"))


def filled(arenas: Arenas, index: int, value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A call that hands its output back token by token, in one memory, and has a gradient."""
    kept, given = arenas.of_call(index), torch.empty(1, 4, dtype=dtype)
    parts = []
    for token in range(COUNTS[index]):
        given.fill_(value + token)
        parts.append(kept.part("out", token, token + 1, given))
    live = torch.full((2, 2), value)
    found = {"out": kept.joined("out", parts), **kept.whole({"d_dense": live})}
    live.zero_()
    return found


def test_results_lie_one_behind_another_as_they_were_handed_back(arenas: Arenas) -> None:
    got = [filled(arenas, index, 10.0 * (index + 1)) for index in (0, 1)]
    out = arenas.result("out", [each["out"] for each in got])
    assert out is not None
    assert out[:, 0].tolist() == [10, 11, 12, 20, 21]
    assert lies_in(got[1]["out"], out)
    gradients = arenas.result("d_dense", [each["d_dense"] for each in got])
    assert gradients is not None
    assert gradients[:, 0, 0].tolist() == [10, 20]


def test_calls_in_any_order(arenas: Arenas) -> None:
    got = {index: filled(arenas, index, 10.0 * (index + 1)) for index in (1, 0)}
    out = arenas.result("out", [got[0]["out"], got[1]["out"]])
    assert out is not None
    assert out[:, 0].tolist() == [10, 11, 12, 20, 21]


def test_of_a_call_that_brought_nothing_there_are_zeros(arenas: Arenas) -> None:
    got = filled(arenas, 0, 5.0)
    filled(arenas, 1, 7.0)
    out, gradients = (arenas.result(name, [got[name], None]) for name in ("out", "d_dense"))
    assert out is not None
    assert gradients is not None
    assert out[:, 0].tolist() == [5, 6, 7, 0, 0]
    assert gradients[:, 0, 0].tolist() == [5, 0]


def test_another_dtype_stays_what_it_is(arenas: Arenas) -> None:
    got = [filled(arenas, 0, 5.0), filled(arenas, 1, 7.0, torch.float64)]
    assert [each["out"].dtype for each in got] == [torch.float32, torch.float64]
    assert arenas.result("out", [each["out"] for each in got]) is None


def test_what_fits_nowhere_is_a_copy_of_its_own(arenas: Arenas) -> None:
    kept, wide, unknown = arenas.of_call(0), torch.ones(1, 5), torch.ones(3)
    part = kept.part("out", 0, 1, wide)
    copy = kept.whole({"nothing": unknown})["nothing"]
    for kept_one, given in ((part, wide), (copy, unknown)):
        assert torch.equal(kept_one, given)
        assert not lies_in(kept_one, given)
    assert arenas.result("out", [part, None]) is None


def test_too_few_rows_are_not_all_of_them(arenas: Arenas) -> None:
    kept = arenas.of_call(0)
    part = kept.part("out", 0, 2, torch.ones(2, 4))
    assert kept.joined("out", [part]).shape == (2, 4)


def test_copies_of_their_own() -> None:
    kept, x = Kept(), torch.ones(2, requires_grad=True)
    part, whole = kept.part("out", 0, 2, x), kept.whole({"k": x})["k"]
    for copy in (part, whole):
        assert not copy.requires_grad
        assert not lies_in(copy, x)
    assert kept.joined("out", [part, whole]).tolist() == [1, 1, 1, 1]
