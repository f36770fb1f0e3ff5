"""The keys of each document in two calls, whose results are merged by their LSEs: as one call over all of them.

Long prompts are attended to part by part, and contexts that are spread over devices by ring: with out and LSE of each
part, ``lse = log(exp(lse_1) + exp(lse_2))`` and ``out = w_1 out_1 + w_2 out_2``, ``w_i = exp(lse_i - lse)``. A part
without keys has an LSE of -inf, and so no weight at all: the other part's output keeps every bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import torch

from attn_fuzz.backends.kernel import MOST_DOCUMENTS
from attn_fuzz.backends.known import issues_below, issues_of
from attn_fuzz.backends.registry import Backend, calls_of
from attn_fuzz.backends.user import UserKernel
from attn_fuzz.oracle.deviations import LIMIT, deviations, limit
from attn_fuzz.oracle.known_answer.compared import Compared
from attn_fuzz.oracle.known_answer.row_index import RowIndex
from attn_fuzz.oracle.known_issues import EFFECTS
from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.case import Case

PART_RESULTS: Final = ("out", "lse")

MERGED: Final = "calls whose keys came in two parts, merged by their LSEs"
"""Of which there is a count."""

Answers = Sequence[Mapping[str, Expected]]


class Partial(NamedTuple):
    """What a part of the keys gives, float64: ``out [rows, heads, value_dim]``, ``lse [rows, heads]``."""

    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, results: Mapping[str, torch.Tensor]) -> Partial:
        return cls(*(results[name].double() for name in PART_RESULTS))


def weights(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(merged LSE, weight of the first part, weight of the second) of two LSEs; rows blind in both have no weight."""
    lse = torch.logaddexp(first, second)
    # Of rows without any key the difference would be NaN.
    base = torch.where(lse == -torch.inf, 0.0, lse)
    return lse, (first - base).exp(), (second - base).exp()


def merged(first: Partial, second: Partial) -> Partial:
    """Both parts as one, in float64."""
    lse, mine, others = weights(first.lse, second.lse)
    return Partial(mine[..., None] * first.out + others[..., None] * second.out, lse)


def merged_answer(
    first: Mapping[str, Expected], second: Mapping[str, Expected], whole: Mapping[str, Expected] | None = None
) -> dict[str, Expected]:
    """What merged parts should be, and how far correct parts stray from it.

    To the first order ``d(out) = w_1 d(out_1) + w_2 d(out_2) + w_1 w_2 (out_1 - out_2) (dL_1 - dL_2)`` with dL the
    errors of the LSEs. Errors of scores move the output and the LSE of a part together, and (a + b)^2 <= 2 a^2 + 2 b^2:
    ``V(out) = 2 (w_1^2 V(out_1) + w_2^2 V(out_2) + (w_1 w_2 (out_1 - out_2))^2 (V(L_1) + V(L_2)))``. The parts' LSEs
    have errors of their own each: ``V(lse) = w_1^2 V(L_1) + w_2^2 V(L_2)``.

    Args:
        first: the answer over the first part of the keys.
        second: that over the others.
        whole: that over all of them, where it is there; what comes of merging both is the same but for 1e-14.
    """
    value = merged(*(Partial(part["out"].value, part["lse"].value) for part in (first, second)))
    if whole is not None:
        value = Partial(whole["out"].value, whole["lse"].value)
    _, mine, others = weights(first["lse"].value, second["lse"].value)
    of_lse = mine.square() * first["lse"].variance + others.square() * second["lse"].variance
    apart = (mine * others)[..., None] * (first["out"].value - second["out"].value)
    variance = mine.square()[..., None] * first["out"].variance + others.square()[..., None] * second["out"].variance
    variance = variance + apart.square() * (first["lse"].variance + second["lse"].variance)[..., None]
    return {"out": Expected(value.out, 2 * variance), "lse": Expected(value.lse, of_lse)}


def cuts_of(case: Case, *, blind: bool) -> tuple[int, ...] | None:
    """How many keys of each document the first part has.

    Non-causal documents are cut in the middle or, where a part may have none of a document's keys, before or behind all
    of them, in turn; causal ones before those that as many queries stand on, since all queries see what is before them.

    Args:
        case: a kernel case.
        blind: whether rows that see no key are taken.

    Returns:
        None where the keys do not come apart: by windows, since there are too few, or where a budget is no bound.
    """
    if case.level != "kernel" or case.window[0] >= 0 or (case.window[1] >= 0 and not case.causal):
        return None
    if limit(case) > LIMIT:
        return None
    pairs = list(zip(case.packed_lengths, case.packed_key_lengths, strict=True))
    cuts = tuple(
        max(keys - queries, 0) if case.causal else _cut(place + case.seed, keys, blind=blind)
        for place, (queries, keys) in enumerate(pairs)
    )
    rest = [keys - cut for (_, keys), cut in zip(pairs, cuts, strict=True)]
    missing = any(q and not (cut and more) for (q, _), cut, more in zip(pairs, cuts, rest, strict=True))
    return cuts if sum(cuts) and sum(rest) and (blind or not missing) else None


def _cut(turn: int, keys: int, *, blind: bool) -> int:
    """How many of a document's keys are in the first part."""
    middle = keys // 2
    return (middle, 0, middle, keys)[turn % 4] if blind else middle


@dataclasses.dataclass(frozen=True)
class Parts:
    """Two parts of a kernel case's keys: all queries see the first, and what they see of the second is as it was."""

    whole: Case
    cuts: tuple[int, ...]
    """How many keys of each document are in the first part (``cuts_of``)."""

    @classmethod
    def of(cls, case: Case, *, blind: bool) -> Parts | None:
        """The parts of a case, or None where its keys do not come apart."""
        cuts = cuts_of(case, blind=blind)
        return None if cuts is None else cls(case, cuts)

    @classmethod
    def taken(cls, case: Case, backend: Backend, device: str) -> Parts | None:
        """The parts of a case that a backend takes both of, and is known to be wrong on neither.

        Args:
            case: whose keys come apart.
            backend: that is asked for both parts.
            device: its kind, ``cpu`` or ``cuda``.
        """
        stated = backend.kernel.capabilities_on(device)
        # What torch compiles would be compiled once more for each part.
        if case.level != "kernel" or backend.kernel.compiled:
            return None
        # Parts of a crowd are not all of one size any more, and take what goes by documents a minute.
        if len(case.packed_lengths) > MOST_DOCUMENTS:
            return None
        # Of what compiles for shapes parts have no more of them than there are layouts.
        parts = cls.of(case, blind=stated.queries_without_keys and not stated.layouts)
        if parts is None or any(backend.refusal(each, device) is not None for each in parts.cases):
            return None
        return None if any(_known(each, backend, device) for each in parts.cases) else parts

    @property
    def cases(self) -> tuple[Case, Case]:
        """Both parts: the second is causal where the whole is, which has the last query on the last key as before."""
        plain = self.whole.replace(lse_gradient=False)
        rest = tuple(keys - cut for keys, cut in zip(plain.packed_key_lengths, self.cuts, strict=True))
        first = plain.replace(key_lengths=self.cuts, causal=False, window=(-1, -1))
        return first, plain.replace(key_lengths=rest)

    def inputs(self, drawn: Inputs) -> tuple[Inputs, Inputs]:
        """The tensors of both parts, of those of the whole."""
        places = RowIndex(self.whole, drawn.k.device)
        mine = places.key_position < self._cuts(drawn.k.device)[places.key_owner]
        first, second = (Inputs(drawn.q, drawn.k[side], drawn.v[side], drawn.dout) for side in (mine, ~mine))
        return first, second

    def _cuts(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.cuts).to(device)

    def compared(self, results: Sequence[Mapping[str, torch.Tensor]], answers: Answers) -> Iterator[Compared]:
        """What both parts gave, merged, beside the answer over all keys.

        Args:
            results: of both parts.
            answers: over each part, and over all keys where that is there.
        """
        parts = [Partial.of(each) for each in results]
        expected, got = merged_answer(*answers), merged(*parts)
        places = RowIndex(self.whole, got.out.device)
        moved = self._moved(places, got.out.to(results[0]["out"].dtype), results)
        for name, values in zip(PART_RESULTS, got, strict=True):
            z = deviations(self.whole, values, expected[name])
            beyond = torch.where(moved, torch.inf, z) if name == "out" else z
            yield Compared(name, places.owner, places.position, values, expected[name].value, beyond)

    def _moved(
        self, places: RowIndex, out: torch.Tensor, results: Sequence[Mapping[str, torch.Tensor]]
    ) -> torch.Tensor:
        """bool: elements of a merged output, in its dtype, that a part without keys has moved."""
        cuts = self._cuts(out.device)
        none = (cuts == 0)[places.owner], (cuts == places.key_lengths)[places.owner]
        first, second = ((out != results[other]["out"]) & here[:, None, None] for other, here in zip((1, 0), none))
        return first | second


def _known(case: Case, backend: Backend, device: str) -> bool:
    """Whether a known issue makes a part's results wrong, as queries without keys do that the whole has not."""
    calls = calls_of(case)
    below = issues_below(device, case, calls) if isinstance(backend.kernel, UserKernel) else ()
    issues = (*issues_of(backend.name, device, case, calls), *below)
    return any(not EFFECTS[issue.id].tensors.isdisjoint(PART_RESULTS) for issue in issues)
