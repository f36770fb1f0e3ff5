"""A wide call from end to end: run backends on one layout, judge every document, and wait for the device once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from attn_fuzz.checks.budget import limit
from attn_fuzz.symptoms import Crashed, Symptom, wrong_tensor
from attn_fuzz.trial import SECOND_SEED
from attn_fuzz.wide.call import Call, run
from attn_fuzz.wide.judge import complete, largest_z, screened_z
from backends.kernel import UnsupportedCase
from backends.registry import Backend
from reference.answer import KERNEL_TENSORS
from reference.case import Case
from reference.profile import Profile
from reference.screen import SUSPICIOUS, takes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one backend made of one wide call."""

    z: torch.Tensor
    """float64 ``[documents, 5]`` on the CPU: largest deviation per document and tensor (``KERNEL_TENSORS``)."""
    broken: str | None = None
    """What is wrong with the call as a whole, in words: it raised, results are missing, inputs changed."""
    names: tuple[str, ...] = KERNEL_TENSORS
    """The columns of ``z``."""

    def failing(self, beyond: float) -> torch.Tensor:
        """bool ``[documents, 5]``; every document where the call as a whole is wrong."""
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


def verdicts(call: Call, backends: Sequence[Backend], *, screened: bool = True) -> list[Outcome]:
    """Runs backends on one call and judges every document.

    Args:
        call: a packed call.
        backends: those that take it.
        screened: judge by the fast reference where it can, and by the exact one only what looks suspicious there.

    Raises:
        UnsupportedCase: when a backend refuses, which its declarations should have said.
        torch.OutOfMemoryError: as it comes.
    """
    count, kind = len(call.case.packed_lengths), call.device.type
    broken: dict[int, str] = {}
    results: list[dict[str, torch.Tensor]] = []
    touched: list[torch.Tensor] = []
    for index, backend in enumerate(backends):
        try:
            found = run(call, backend)
        except (UnsupportedCase, NotImplementedError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            broken[index] = words(error)
            found = {}
        else:
            if missing := complete(call.case, found, call.inputs):
                broken[index] = f"{', '.join(missing)} missing, or of another shape or dtype"
        results.append(found)
        touched.append(call.changed())
    z = torch.zeros(len(backends), count, len(KERNEL_TENSORS), dtype=torch.float64, device=call.device)
    alike: dict[Profile, list[int]] = {}
    for index, backend in enumerate(backends):
        if index not in broken:
            profile = effective_profile(backend.kernel.profile_on(kind), call.case)
            alike.setdefault(profile, []).append(index)
    fast: dict[int, Profile] = {}
    for profile, members in alike.items():
        fits = screened and takes(call.case, profile, call.device) is None
        judge = screened_z if fits else largest_z
        z[members] = judge(call.case, call.inputs, profile, [results[index] for index in members])
        fast |= dict.fromkeys(members, profile) if fits else {}
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
        documents = (judged[index] > SUSPICIOUS * limit(call.case)).any(1).nonzero()[:, 0].tolist()
        if documents:
            exact = largest_z(call.case, call.inputs, profile, [results[index]], documents=documents)
            judged[index, documents] = exact[0, documents].cpu()
    return [Outcome(judged[index], broken.get(index)) for index in range(len(backends))]


@dataclasses.dataclass(frozen=True)
class Suspicion:
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
    column = int(torch.where(failing[first], outcome.z[first], -1.0).argmax())
    name = outcome.names[column]
    return wrong_tensor(name), (
        f"{name} of document {first} ({case.packed_lengths[first]} queries, {case.packed_key_lengths[first]} keys): "
        f"z = {outcome.z[first, column].item():.3g}; {len(documents)} of {count} documents wrong"
    )


def suspected(case: Case, outcome: Outcome, judge: Callable[[Case], Outcome]) -> Suspicion | None:
    """Whether a case that one seed fails is failed under a second value seed too, and by which documents.

    Args:
        case: what was run.
        outcome: what came of it.
        judge: runs another case on the same backend.
    """
    beyond = limit(case)
    failing = outcome.failing(beyond)
    if not failing.any():
        return None
    if outcome.broken is None:
        failing &= judge(case.replace(seed=case.seed ^ SECOND_SEED)).failing(beyond)
    worst = torch.where(failing, outcome.z, -1.0).amax(1)
    order = worst.argsort(descending=True, stable=True)
    documents = tuple(order[: int(failing.any(1).sum())].tolist())
    if not documents:
        return None
    return Suspicion(case, documents, *_named(case, outcome, failing, documents))


def suspicion(call: Call, backend: Backend, outcome: Outcome) -> Suspicion | None:
    """``suspected`` for a packed call."""

    def judge(case: Case) -> Outcome:
        (second,) = verdicts(Call.of(case, call.device), [backend])
        return second

    return suspected(call.case, outcome, judge)


def examine_wide(case: Case, backend: Backend, device: torch.device) -> Suspicion | None:
    """The wide verdict on one case and one backend: None for a clean one."""
    call = Call.of(case, device)
    (outcome,) = verdicts(call, [backend])
    return suspicion(call, backend, outcome)
