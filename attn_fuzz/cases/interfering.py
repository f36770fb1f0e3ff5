"""An interfering call: another case whose tensors have the same shapes, run around the case under test.

What a backend keeps between calls (plans, compiled variants, metadata, rotary tables, buffers) is often keyed on shapes
alone. An interfering call runs before the case's forward, and another between its forward and backward, so what they
leave behind is met by the case, whose results are checked. In half of the cases there is one only, whose forward
comes before the case's and whose backward comes before the case's too, as pipelines have it (``crossing``): what
keeps the contexts of all calls on one stack takes back the wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator

from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.smaller import clipped, with_lengths
from attn_fuzz.reference.case import Case, CaseError

_OTHER_SEED = 0x5BD1E995


def crossing(case: Case) -> bool:
    """Whether the interfering call is taken back before the case, too, and not gone when the case begins.

    One bit of the seed says so. The second value seed leaves it as it is, a shrinker tries it both ways, and neither a
    interfering call's strides nor which cases on ranks have one depend on it.
    """
    return bool(case.seed & 4)


def _turned(values: tuple[int, ...]) -> tuple[int, ...]:
    return (*values[1:], values[0])


def turned(case: Case) -> Case:
    """Other values, and each document as long as the one after it was: all that a host knows of a call stays the same.

    Args:
        case: a kernel case.
    """
    keys = None if case.key_lengths is None else _turned(case.key_lengths)
    return case.replace(seed=case.seed ^ _OTHER_SEED, lengths=_turned(case.lengths), key_lengths=keys)


def _candidates(case: Case) -> Iterator[dict[str, object]]:
    """Changes of a case that keep its shapes, most different first."""
    lengths: dict[str, object] = {"seed": case.seed ^ _OTHER_SEED, "lengths": _turned(case.lengths)}
    if case.key_lengths is not None:
        # Keys move on by another step, so that documents are not merely renamed.
        lengths["key_lengths"] = _turned(_turned(case.key_lengths))
    scale = {"scale": 2 * case.softmax_scale}
    window = {"window": (1, case.window[1]) if case.window[0] != 1 else (2, case.window[1])}
    softcap = {"softcap": 10.0 if case.softcap else 0.0}
    # Strides are left alone every other time: what is pooled may well be keyed on them.
    memory = {"memory": "fused" if case.memory == "contiguous" else "contiguous"} if case.seed % 2 else {}
    rotary = {"rotary_theta": 300.0 if case.rotary_theta != 300.0 else 10000.0} if case.level == "layer" else {}
    everything = {**lengths, **scale, **window, **softcap, **memory, **rotary}
    yield everything
    yield {**everything, "window": case.window}
    yield {**lengths, **scale, **rotary}
    yield {**lengths, **rotary}
    yield {"seed": case.seed ^ _OTHER_SEED, **scale, **window, **memory, **rotary}
    yield {"seed": case.seed ^ _OTHER_SEED, **rotary}


def interfering_call(case: Case, backend: Backend, device: str) -> Case | None:
    """The most different case of the same shapes that the backend takes, or None.

    Args:
        case: the case under test.
        backend: what runs it.
        device: ``cpu`` or ``cuda``.
    """
    for changes in _candidates(case):
        try:
            other = case.replace(**changes)
        except CaseError:
            continue
        if backend.refusal(other, device) is None:
            return other
    return None


def another_layout(case: Case, backend: Backend, device: str) -> Case | None:
    """A kernel case of fewer and shorter documents and other values that a backend takes, or of longer ones, or None.

    Args:
        case: all of whose options it has.
        backend: what runs it.
        device: ``cpu`` or ``cuda``.
    """
    count, queries, keys = len(case.lengths), max(case.lengths), max(case.packed_key_lengths)
    rest = with_lengths(case, case.lengths[:-1], range(count - 1), case.key_lengths and case.key_lengths[:-1])
    some = [each for each in (rest, case) if each is not None]
    shorter = [clipped(each, max(queries // 2, 2), max(keys // 2, 2)) for each in some]
    longer = with_lengths(case, [length + 1 for length in case.lengths], range(count), case.key_lengths)
    own = case.lengths, case.key_lengths
    others = [
        other.replace(seed=case.seed ^ _OTHER_SEED)
        for other in (*shorter, rest, longer)
        if other is not None and any(other.lengths) and (other.lengths, other.key_lengths) != own
    ]
    # What is compiled for a single row is compiled for nothing else.
    others.sort(key=lambda other: min(sum(other.packed_lengths), sum(other.packed_key_lengths)) < 2)
    return next((other for other in others if backend.refusal(other, device) is None), None)
