"""A trial: one case on one backend, what came out and what should have."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch

from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.registry import Backend
from attn_fuzz.cases.interfering import interfering_call
from attn_fuzz.execution.calls import EVERYTHING, Asked
from attn_fuzz.execution.inferred import TIMES, InferredCapabilities, inferred, promises
from attn_fuzz.execution.layer_conventions import EVALUATED
from attn_fuzz.execution.observation import Observation, differing
from attn_fuzz.execution.poison import POISONS
from attn_fuzz.execution.runner import LayerRun, LayerRuns, run_kernel, run_layer
from attn_fuzz.ranks.gather import run_ranks
from attn_fuzz.reference.answer import Expected, Inputs, kernel_inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs, layer_answer, layer_inputs
from attn_fuzz.reference.memory import same_bits
from attn_fuzz.reference.monte_carlo import CONFIRMING_SAMPLES, SAMPLES
from attn_fuzz.reference.profile import Profile

# Second value seed of a layout: an error that is a property of the layout shows under both.
SECOND_SEED = 0x9E3779B9


def as_shown(profile: Profile, results: Mapping[str, torch.Tensor]) -> Profile:
    """The profile with the sums that a layer shows: in float32 they are held to it, in its dtype they are not."""
    stored = set(profile.stored_sums)
    for name, got in results.items():
        if name in ("dk", "dv") or name.startswith("d_"):
            (stored.discard if got.dtype == torch.float32 else stored.add)(name)
    return dataclasses.replace(profile, stored_sums=frozenset(stored))


@dataclasses.dataclass
class Trial:
    """A case, what the backend made of it, and what it should have made; checks are functions of this."""

    how: ClassVar[LayerRuns] = LayerRun
    """In which way a layer is run."""

    case: Case
    backend: Backend
    device: torch.device
    poisons: Sequence[str] = POISONS
    touched: list[str] = dataclasses.field(default_factory=list, repr=False)
    """Inputs, metadata or guard margins whose bits any run has changed, in words; shared by trials made from this."""
    counted: Counter[str] = dataclasses.field(default_factory=Counter, repr=False)
    """How often checks asked something of which there is a count, and how it went; shared like ``touched``."""
    interfered: bool | None = None
    """Whether an interfering call runs around the first run; None: as the case's seed says (``interferes``)."""
    hasty: bool = False
    """Whether quick budgets are good enough, as they are for what is not the last word."""
    first_deviations: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)
    """What ``checks.budget.first_deviations`` has computed: several checks ask for the same."""

    @functools.cached_property
    def inputs(self) -> Inputs | LayerInputs:
        """The case's tensors, on the CPU: the reference and all checks run there.

        A narrow case is a few thousand tiny operations. On a GPU that several workers share each of them waits for its
        turn; the GPU is left to what only it can do, running the backend.
        """
        return (kernel_inputs if self.case.level == "kernel" else layer_inputs)(self.case, "cpu")

    @property
    def interferes(self) -> bool:
        """Whether an interfering call runs around the first run.

        Ranks do not keep more between calls than one process does, and two more passes of all their collectives would
        be a third of a case: of those cases, one seed in four, which is none that a shrinker leaves.
        """
        return self.interfered if self.interfered is not None else self.case.all_ranks == 1 or self.case.seed % 4 == 0

    @functools.cached_property
    def observations(self) -> tuple[Observation, ...]:
        """One run per poison; the first around an interfering call, the others alone."""
        interfering = interfering_call(self.case, self.backend, self.device.type) if self.interferes else None
        if self.case.all_ranks > 1:
            assert isinstance(self.inputs, LayerInputs)
            return tuple(self._on_ranks(self.inputs, self.poisons, interfering))
        first, *others = self.poisons
        return (self.observe(first, interfering), *(self.observe(poison) for poison in others))

    def _on_ranks(self, inputs: LayerInputs, poisons: Sequence[str], interfering: Case | None) -> list[Observation]:
        """A run under each poison."""
        observed = run_ranks(self.backend, self.case, inputs, poisons, self.device, interfering)
        self.touched.extend(what for one in observed for what in one.changed)
        return observed

    def observe(self, poison: str, interfering: Case | None = None) -> Observation:
        """A run of its own."""
        return self.observe_with(self.inputs, poison, interfering)

    def observe_with(
        self,
        inputs: Inputs | LayerInputs,
        poison: str,
        interfering: Case | None = None,
        asked: Asked = EVERYTHING,
    ) -> Observation:
        """A run with other tensors than the case's; of autograd only a kernel case can be asked otherwise."""
        if isinstance(inputs, Inputs):
            observed = run_kernel(self.backend, self.case, inputs, poison, self.device, interfering, asked)
        elif self.case.all_ranks > 1:
            return self._on_ranks(inputs, (poison,), interfering)[0]
        else:
            observed = run_layer(self.backend, self.case, inputs, poison, self.device, interfering, type(self).how)
        self.touched.extend(observed.changed)
        return observed

    @functools.cached_property
    def inferred(self) -> InferredCapabilities:
        """What nobody has stated about the backend, found out by trying."""
        return inferred(self.backend, str(self.device))

    def repeats(self, name: str) -> bool:
        """Whether the backend promises the same bits every time for this result."""
        return self.inferred.repeats(name)

    def moves_for(self, name: str, other: Callable[[], Observation]) -> bool:
        """Whether other bits of a result come of what a run does otherwise, and not of chance.

        Where the backend promises its bits, one run says so. Where a few calls of another shape have shown the same
        bits and nobody has promised any, gradients may still be summed up in the order in which blocks happen to
        finish: then this very case has to give the same bits every time, and so has the other run, and other ones.

        Args:
            name: the result, whose bits are not the same in such a run.
            other: makes another run of that kind.
        """
        if not self.repeats(name):
            return False
        if promises(self.backend, str(self.device), name):
            return True
        if name in self._moving:
            return False
        first, *again = (other().results[name] for _ in range(TIMES))
        here = self._settled.results[name]
        return all(same_bits(first, each) for each in again) and not same_bits(first, here)

    def moves_by_itself(self, name: str) -> bool:
        """Whether a result's bits differ between runs of this very case."""
        return name in self._moving

    @functools.cached_property
    def _settled(self) -> Observation:
        """A run by itself, after one that may have had what calls of other shapes have left behind."""
        self.observe(self.poisons[0])
        return self.observe(self.poisons[0])

    @functools.cached_property
    def _moving(self) -> frozenset[str]:
        """Results whose bits differ between runs of this very case."""
        settled = self._settled
        others = (self.observe(self.poisons[0]) for _ in range(2 * TIMES))
        return frozenset(name for other in others for name in differing(settled, other))

    def answer_with(self, samples: int) -> dict[str, Expected]:
        """The reference's answer; ``samples`` matter to layer budgets only."""
        return self.answer_under(self.profile, samples)

    @property
    def stated(self) -> Capabilities:
        """What the backend declares of itself where it runs."""
        return self.backend.kernel.capabilities_on(self.device.type)

    @property
    def profile(self) -> Profile:
        """How the backend computes where it runs."""
        return self.backend.kernel.profile_on(self.device.type)

    def answer_under(self, profile: Profile, samples: int) -> dict[str, Expected]:
        """What the reference would say of a backend that computes in this way."""
        if isinstance(self.inputs, Inputs):
            return kernel_answer(self.case, self.inputs, profile)
        shown, conventions = self._as_shown(profile), self.stated.conventions
        answer = layer_answer(self.case, self.inputs, shown, samples, conventions=conventions)
        goes_back = self.backend.goes_back(self.device.type)
        return answer if goes_back else {name: answer[name] for name in EVALUATED}

    def _as_shown(self, profile: Profile) -> Profile:
        """The profile with the sums that the layer shows."""
        return as_shown(profile, self.observations[0].results)

    @functools.cached_property
    def answer(self) -> dict[str, Expected]:
        return self.answer_with(SAMPLES)

    @functools.cached_property
    def careful_answer(self) -> dict[str, Expected]:
        """The answer with budgets good enough to accuse somebody, as those of kernel cases always are."""
        if self.case.level == "kernel" or self.hasty:
            return self.answer
        return self.answer_with(CONFIRMING_SAMPLES)

    @functools.cached_property
    def second(self) -> Trial:
        """The same layout with other values."""
        other = self.case.replace(seed=self.case.seed ^ SECOND_SEED)
        return dataclasses.replace(self, case=other, interfered=self.interferes)

    def document_of(self, tensor: str, row: int) -> tuple[int | None, int]:
        """(document, row within it) of a tensor's row; parameters have no documents."""
        if tensor.startswith("d_"):
            return None, row
        bounds = self._bounds[self.case.level == "kernel" and tensor in ("dk", "dv")]
        # Of documents that begin there the last one, which has rows.
        index = bisect.bisect_right(bounds, row) - 1
        return (index, row - bounds[index]) if row < bounds[-1] else (None, row)

    @functools.cached_property
    def _bounds(self) -> tuple[list[int], list[int]]:
        """Where documents begin, and where the last one ends, of queries and of keys: asked for every row."""
        lengths = self.case.packed_lengths, self.case.packed_key_lengths
        return tuple(list(itertools.accumulate(each, initial=0)) for each in lengths)  # type: ignore[return-value]
