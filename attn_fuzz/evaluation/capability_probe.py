"""What a backend takes, found out by asking: one small case for each capability, beyond what it declares too.

Every case runs in a child process: a crash costs one answer. What is declared is asked as it is declared, for what is
asked about a case makes cases of its own, such as with half of the keys; the rest, and what an adapter refuses all the
same, with the declaration set aside (``unrestricted:NAME``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import FLOAT_DTYPES, Capabilities
from attn_fuzz.campaign.isolated import Ended, Isolated, Subject
from attn_fuzz.campaign.limit_questions import GROUPED_VALUES
from attn_fuzz.reference.case import FAR_MEMORIES, MEMORIES, Case, CaseError

LENGTHS: Final = (5, 33, 16)
HEAD_DIMS: Final = (1, 5, 8, 16, 24, 32, 64, 80, 96, 128, 192, 256, 320, 512)
VALUE_DIMS: Final = ((64, 32), (64, 128), (192, 128), (576, 512))
"""(head_dim, head_dim_v)."""

GROUPS: Final = ((16, 1), (71, 1), (128, 128))
"""(heads, kv_heads)."""

RIGHT: Final = "right"

_REFUSED: Final = "refused"
"""How an answer begins that is none to what was asked."""

_SECONDS: Final = 60.0
_COMPILING_SECONDS: Final = 150.0


@dataclasses.dataclass(frozen=True)
class Probe:
    """One question."""

    name: str
    stated: bool
    """What the backend's declaration says."""
    case: Case


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer."""

    probe: str
    stated: bool
    measured: str
    """``right``, or how it is not: ``refused: ...``, ``wrong: ...``, ``crashed``, ``hung``."""

    @property
    def differs(self) -> bool:
        """Whether statement and measurement disagree."""
        return self.stated != (self.measured == RIGHT)


def base_case(capabilities: Capabilities) -> Case:
    """A case as plain as the backend allows."""
    if compiled := capabilities.configurations or capabilities.compiled_first:
        # Grouped heads are asked about apart.
        chosen = compiled[0]
        options: dict[str, Any] = {**chosen._asdict(), "window": (-1, -1)}
    else:
        dims = capabilities.head_dims or tuple(
            dim
            for dim in (64, *HEAD_DIMS)
            if dim <= capabilities.max_head_dim and dim % capabilities.head_dim_multiple == 0
        )
        options = {"dtype": capabilities.dtypes[-1], "head_dim": dims[0], "heads": 2, "kv_heads": 2}
        options["causal"] = capabilities.causal
    return Case(level="kernel", lengths=LENGTHS, **options)


def _questions(base: Case, stated: Capabilities) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """(name, whether it is declared, changes of the base case)."""
    left_window = stated.window and stated.causal
    compiles = bool(stated.configurations or stated.compiled_first)
    free = not stated.causal_needs_equal_lengths
    free_here = free or not base.causal
    yield "plain", True, {}
    yield "layer", True, {"level": "layer", "hidden": 16, "cuts": (3, 20) if stated.causal and free else (5, 38)}
    for dtype in FLOAT_DTYPES:
        # What compiles for minutes is asked about what it declares.
        if not compiles or dtype == base.dtype:
            yield f"dtype {dtype}", dtype in stated.dtypes, {"dtype": dtype}
    for dim in HEAD_DIMS:
        if not compiles or dim == base.head_dim:
            fits = dim <= stated.max_head_dim and dim % stated.head_dim_multiple == 0
            yield f"head_dim {dim}", fits and dim in (stated.head_dims or HEAD_DIMS), {"head_dim": dim}
    for pair in VALUE_DIMS if not compiles else ():
        changes = {"head_dim": pair[0], "head_dim_v": pair[1]}
        yield f"head_dim {pair[0]}, values {pair[1]}", _takes_values(stated, *pair), changes
    yield "grouped heads", stated.gqa, {"heads": 4, "kv_heads": 2}
    for heads, kv_heads in GROUPS if not compiles else ():
        taken = stated.gqa or heads == kv_heads
        yield f"{heads} heads over {kv_heads}", taken, {"heads": heads, "kv_heads": kv_heads}
    yield (
        GROUPED_VALUES,
        stated.gqa and stated.gqa_head_dims_v and _takes_values(stated, *VALUE_DIMS[0]),
        {"heads": 4, "kv_heads": 2, "head_dim": VALUE_DIMS[0][0], "head_dim_v": VALUE_DIMS[0][1]},
    )
    yield "causal", stated.causal, {"causal": True}
    yield "non-causal", stated.noncausal, {"causal": False}
    yield "causal, more keys than queries", stated.causal and free, {"causal": True, "key_lengths": (9, 40, 16)}
    yield (
        "causal, more queries than keys",
        stated.causal and free and stated.queries_without_keys,
        {"causal": True, "key_lengths": (3, 33, 16)},
    )
    yield "non-causal, more keys than queries", stated.noncausal, {"causal": False, "key_lengths": (9, 40, 16)}
    yield "documents without keys", stated.queries_without_keys and free_here, {"key_lengths": (5, 0, 16)}
    yield (
        "documents without queries",
        stated.keys_without_queries and free_here,
        {
            "lengths": (5, 0, 16),
            "key_lengths": LENGTHS,
        },
    )
    yield "empty documents", stated.empty_documents, {"lengths": (5, 0, 16)}
    yield "window, causal", left_window, {"causal": True, "window": (7, -1)}
    both = stated.window and stated.noncausal and not stated.window_needs_causal
    yield "window, non-causal", both, {"causal": False, "window": (7, 3)}
    yield "softcap", stated.softcap, {"softcap": 20.0}
    yield "scale", stated.scale, {"scale": 0.25}
    yield "gradient of the LSE", bool(stated.lse_gradient), {"lse_gradient": True}
    for memory in (*MEMORIES, *FAR_MEMORIES):
        yield f"memory {memory}", memory in (*stated.memories, *stated.far_memories), {"memory": memory}
    yield "rows beyond the last document", stated.capacity is not False, {"capacity": 17}
    yield "max_seqlen above the longest document", stated.loose_max_seqlen, {"loose_max_seqlen": (70, 130)}
    for side, gaps in (("q", (3, 0)), ("k", (0, 3))):
        yield f"gaps between documents of {side}", side in stated.gaps, {"gaps": gaps}


def _takes_values(stated: Capabilities, head_dim: int, head_dim_v: int) -> bool:
    """Whether values of another head_dim than keys are declared."""
    case = Case(level="kernel", lengths=LENGTHS, head_dim=head_dim, head_dim_v=head_dim_v)
    return stated.head_dims_v is not None and stated.channels_refused(case) is None


def probes(capabilities: Capabilities) -> list[Probe]:
    """All questions to a backend."""
    base = base_case(capabilities)
    found = []
    for name, stated, changes in _questions(base, capabilities):
        try:
            found.append(Probe(name, stated, base.replace(**changes)))
        except CaseError:
            # The plain case of this backend has no such variant.
            continue
    return found


Tell = Callable[[str, Answer], None]
"""Called with the name of a backend and each answer, as it comes."""


class Probing:
    """Asks backends everything, a few at a time.

    Args:
        device: ``cpu`` or ``cuda``.
        tell: hears of each answer, in the thread that has it.
    """

    def __init__(self, device: str, tell: Tell) -> None:
        self.answers: dict[str, list[Answer]] = {}
        """By backend; what was answered before an interruption stays."""
        self.interrupted = False
        self._device, self._tell = device, tell
        self._children: list[Isolated] = []

    def ask(self, names: Sequence[str], workers: int) -> None:
        """Asks those. Ctrl-C ends it, and loses no answer.

        Args:
            names: backends.
            workers: how many at a time.

        Raises:
            NoDevice: where no process can use the device.
        """
        self.answers |= {name: [] for name in names}
        with ThreadPoolExecutor(workers) as pool:
            asked = [pool.submit(self._ask, name) for name in names]
            try:
                for each in asked:
                    each.result()
            except KeyboardInterrupt:
                self._end()
            except BaseException:
                self._end()
                raise

    def _ask(self, name: str) -> None:
        if self.interrupted:
            return
        capabilities = registry.load(name).kernel.capabilities_on(self._device)
        compiles = bool(capabilities.configurations or capabilities.compiles or capabilities.layouts)
        seconds = _COMPILING_SECONDS if compiles else _SECONDS
        as_declared, free = (Isolated(Subject(each, self._device), seconds) for each in (name, registry.ANY + name))
        self._children += [as_declared, free]
        try:
            for probe in probes(capabilities):
                measured = as_declared.answer(probe.case) if probe.stated else _REFUSED
                if measured.startswith(_REFUSED):
                    measured = free.answer(probe.case)
                answer = Answer(probe.name, probe.stated, measured)
                self.answers[name].append(answer)
                self._tell(name, answer)
        except Ended:
            return
        finally:
            as_declared.close()
            free.close()

    def _end(self) -> None:
        self.interrupted = True
        for child in self._children:
            child.end()
