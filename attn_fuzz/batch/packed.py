"""A wide call from end to end: run backends on one layout, judge every document, and wait for the device once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.packed_call import Call, run
from attn_fuzz.batch.probes import PROBES
from attn_fuzz.batch.verdicts import COLUMNS, complete, largest_z, other_bits, screened_z
from attn_fuzz.execution.inferred import TIMES, inferred, promises
from attn_fuzz.execution.process import raise_lack_of_memory
from attn_fuzz.oracle.deviations import limit
from attn_fuzz.oracle.symptoms import Crashed, PoisonLeaked, Symptom, WrongSpread, wrong_tensor
from attn_fuzz.oracle.trial import SECOND_SEED
from attn_fuzz.reference.answer import KERNEL_TENSORS
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.screen import SUSPICIOUS, unsupported_reason


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one backend made of one wide call."""

    z: torch.Tensor
    """float64 ``[documents, columns]`` on the CPU: what is wrong with each document, beyond the limit or not."""
    broken: str | None = None
    """What is wrong with the call as a whole, in words: it raised, results are missing, inputs changed."""
    names: tuple[str, ...] = COLUMNS
    """The columns of ``z``."""
    probe: str = ""
    """Which of ``wide.probes.PROBES`` was asked; none for the budgets."""
    symptoms: Mapping[str, type[Symptom]] = dataclasses.field(default_factory=dict)
    """What that probe calls a result that fails it."""

    def failing(self, beyond: float) -> torch.Tensor:
        """bool ``[documents, columns]``; every document where the call as a whole is wrong."""
        return torch.full_like(self.z, True, dtype=torch.bool) if self.broken else self.z > beyond


def words(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['(no message)'])[0][:300]}"


def effective_profile(profile: Profile, case: Case) -> Profile:
    """A profile without what the case does not touch, so that backends which compute alike share a reference pass."""
    if not case.softcap:
        profile = dataclasses.replace(profile, tanh_error=0.0)
    if case.heads == case.kv_heads:
        profile = dataclasses.replace(profile, expands_kv=False)
    return profile


def _attempt(call: Call, backend: Backend, poison: str) -> tuple[dict[str, torch.Tensor], str | None]:
    """(results, what is wrong with the call as a whole)."""
    try:
        found = run(call, backend, poison)
    except UnsupportedCase:
        raise
    except NotImplementedError as refusal:
        raise UnsupportedCase(str(refusal)) from refusal
    except Exception as error:
        raise_lack_of_memory(error)
        return {}, words(error)
    missing = complete(call.case, found, call.inputs)
    return found, f"{', '.join(missing)} missing, or of another shape or dtype" if missing else None


def promised(backend: Backend, device: torch.device) -> tuple[str, ...]:
    """Results that have the same bits every time: as the backend promises or, where it says nothing, as calls tell."""
    repeats = inferred(backend, str(device)).repeats
    return tuple(name for name in KERNEL_TENSORS if repeats(name))


def _moving(call: Call, backend: Backend, first: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """Documents whose bits differ from one run to the next of the same call, of results that are promised by no one."""
    found = torch.zeros(len(call.case.packed_lengths), dtype=torch.bool, device=call.device)
    if unstated := [name for name in names if not promises(backend, str(call.device), name)]:
        for _ in range(TIMES - 1):
            again, wrong = _attempt(call, backend, "nan")
            if wrong is None:
                found |= other_bits(call.case, first, again, unstated)
    return found


def verdicts(call: Call, backends: Sequence[Backend], *, screened: bool = True, twice: bool = False) -> list[Outcome]:
    """Runs backends on one call and judges every document.

    Args:
        call: a packed call.
        backends: those that take it.
        screened: judge by the fast reference where it can, and by the exact one only what looks suspicious there.
        twice: run it under the second poison too, and hold the bits of both runs against one another.

    Raises:
        UnsupportedCase: when a backend refuses, which its declarations should have said.
        torch.OutOfMemoryError: as it comes.
    """
    count, kind = len(call.case.packed_lengths), call.device.type
    broken: dict[int, str] = {}
    results: list[dict[str, torch.Tensor]] = []
    touched: list[torch.Tensor] = []
    moved = torch.zeros(len(backends), count, dtype=torch.bool, device=call.device)
    for index, backend in enumerate(backends):
        found, wrong = _attempt(call, backend, "nan")
        if wrong is None and twice and (names := promised(backend, call.device)):
            # The second run may write to what the first one handed back.
            found = {name: x.clone() for name, x in found.items()}
            again, wrong = _attempt(call, backend, "finite")
            if wrong is None:
                moved[index] = other_bits(call.case, found, again, names)
                if moved[index].any():
                    moved[index] &= ~_moving(call, backend, found, names)
        if wrong is not None:
            broken[index] = wrong
        results.append(found)
        touched.append(call.changed())
    z = torch.zeros(len(backends), count, len(COLUMNS), dtype=torch.float64, device=call.device)
    alike: dict[Profile, list[int]] = {}
    for index, backend in enumerate(backends):
        if index not in broken:
            profile = effective_profile(backend.kernel.profile_on(kind), call.case)
            alike.setdefault(profile, []).append(index)
    fast: dict[int, Profile] = {}
    for profile, members in alike.items():
        fits = screened and unsupported_reason(call.case, profile, call.device) is None
        judge = screened_z if fits else largest_z
        z[members] = judge(call.case, call.inputs, profile, [results[index] for index in members])
        fast |= dict.fromkeys(members, profile) if fits else {}
    z[..., COLUMNS.index("bits")] = torch.where(moved, torch.inf, 0.0)
    # The one transfer: everything before it was only queued.
    packed = torch.cat([z.flatten(1), torch.stack(touched)[:, None].double()], 1).cpu()
    changed = packed[:, -1].bool().tolist()
    for index in range(len(backends)):
        # Inputs are shared: whoever came first after a change did it.
        if changed[index] and not any(changed[:index]):
            broken.setdefault(index, "an input or its guard margin changed")
    judged = packed[:, :-1].view(len(backends), count, -1)
    for index, profile in fast.items():
        # What the fast reference finds suspicious is for the exact one to say; on clean calls it is not asked.
        documents = (judged[index, :, :-1] > SUSPICIOUS * limit(call.case)).any(1).nonzero()[:, 0].tolist()
        if documents:
            exact = largest_z(call.case, call.inputs, profile, [results[index]], documents=documents)
            judged[index, documents, :-1] = exact[0, documents, :-1].cpu()
    return [Outcome(judged[index], broken.get(index)) for index in range(len(backends))]


def probe_verdict(case: Case, backend: Backend, device: torch.device, name: str = "keys") -> Outcome:
    """What a probe says of every document of a call, and inputs intact; which keys took part where it has no inputs.

    Args:
        case: a kernel case.
        backend: what runs it.
        device: where.
        name: one of ``wide.probes.PROBES``.

    Raises:
        UnsupportedCase: as ``verdicts`` does.
        torch.OutOfMemoryError: as it comes.
    """
    profile = effective_profile(backend.kernel.profile_on(device.type), case)
    probe = PROBES[name](case, device, profile)
    if probe is None:
        return probe_verdict(case, backend, device)
    call = Call.of(case, device, probe.inputs)
    found, wrong = _attempt(call, backend, "nan")
    count = len(case.packed_lengths)
    z = torch.zeros(count, len(KERNEL_TENSORS), dtype=torch.float64, device=device)
    if wrong is None:
        z = probe.deviations(found)
    packed = torch.cat([z.flatten(), call.changed()[None].double()]).cpu()
    if packed[-1]:
        wrong = wrong or "an input or its guard margin changed"
    return Outcome(packed[:-1].view(z.shape), wrong, KERNEL_TENSORS, name, probe.symptoms)


@dataclasses.dataclass(frozen=True)
class PackedFailure:
    """A wide call that one backend fails, under two value seeds."""

    case: Case
    documents: tuple[int, ...]
    """Places in the call, worst first."""
    symptom: type[Symptom]
    message: str


def _named(case: Case, outcome: Outcome, failing: torch.Tensor, documents: Sequence[int]) -> tuple[type[Symptom], str]:
    """The symptom of a failing call, and one sentence on it."""
    count = len(case.packed_lengths)
    if outcome.broken is not None:
        return Crashed, f"a call of {count} documents: {outcome.broken}"
    first = documents[0]
    # An element outside its budget says more than its row does.
    elements = failing[first] & torch.tensor(["-" not in name for name in outcome.names])
    said = elements if elements.any() else failing[first]
    column = int(torch.where(said, outcome.z[first], -1.0).argmax())
    name, z = outcome.names[column], outcome.z[first, column].item()
    place = f"document {first} ({case.packed_lengths[first]} queries, {case.packed_key_lengths[first]} keys)"
    rest = f"{len(documents)} of {count} documents wrong"
    if outcome.probe:
        return outcome.symptoms[name], f"{name} of {place} is not what the probe {outcome.probe!r} makes of it; {rest}"
    if name == "bits":
        return PoisonLeaked, f"results of {place} change with the contents of memory that nobody has written; {rest}"
    if name.endswith("-rows"):
        return WrongSpread, f"{name.removesuffix('-rows')} of {place}: a row as a whole is off ({z:.3g}); {rest}"
    return wrong_tensor(name), f"{name} of {place}: z = {z:.3g}; {rest}"


def confirmed(case: Case, outcome: Outcome, judge: Callable[[Case], Outcome]) -> PackedFailure | None:
    """Whether a case that one seed fails is failed under a second value seed too, and by which documents.

    Args:
        case: what was run.
        outcome: what came of it.
        judge: runs another case on the same backend, in the same way.
    """
    beyond = limit(case)
    failing = outcome.failing(beyond)
    if not failing.any():
        return None
    # What a probe says exactly needs no second value seed.
    certain = outcome.z.isinf() & bool(outcome.probe)
    if outcome.broken is None and (failing & ~certain).any():
        failing &= certain | judge(case.replace(seed=case.seed ^ SECOND_SEED)).failing(beyond)
    worst = torch.where(failing, outcome.z, -1.0).amax(1)
    order = worst.argsort(descending=True, stable=True)
    documents = tuple(order[: int(failing.any(1).sum())].tolist())
    if not documents:
        return None
    return PackedFailure(case, documents, *_named(case, outcome, failing, documents))


def confirmed_failure(call: Call, backend: Backend, outcome: Outcome, *, twice: bool = False) -> PackedFailure | None:
    """``confirmed`` for a packed call."""

    def judge(case: Case) -> Outcome:
        (second,) = verdicts(Call.of(case, call.device), [backend], twice=twice)
        return second

    return confirmed(call.case, outcome, judge)


def examine_wide(case: Case, backend: Backend, device: torch.device, *, twice: bool = False) -> PackedFailure | None:
    """The wide verdict on one case and one backend by the budget: None for a clean one."""
    call = Call.of(case, device)
    (outcome,) = verdicts(call, [backend], twice=twice)
    return confirmed_failure(call, backend, outcome, twice=twice)


def examine_probe(case: Case, backend: Backend, device: torch.device, name: str = "keys") -> PackedFailure | None:
    """The wide verdict by a probe."""

    def judge(again: Case) -> Outcome:
        return probe_verdict(again, backend, device, name)

    return confirmed(case, judge(case), judge)
