"""Kernels that multiply rows of no document by 0: NaN there comes out of them, numbers do not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import pytest
import torch
from devices import on_every_device

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Attended, AttentionOptions
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.backends.registry import Backend
from attn_fuzz.batch.judge import judge, schedule_on
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.inferred import inferred
from attn_fuzz.findings.script import standalone
from attn_fuzz.generation.calls import draw_batch
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.length_sweeps import Sweep
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import PoisonLeaked, Symptom, WrongOutput
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case

CPU = torch.device("cpu")
CASE = Case(level="kernel", lengths=(3, 4), heads=2, kv_heads=2, head_dim=8)
PLACED = {"behind": {"capacity": 2}, "between queries": {"gaps": (3, 0)}, "between keys": {"gaps": (0, 3)}}
MEANT = {"finite_rest": True, "gaps": ("q", "k")}


class Tiles(LoopKernel):
    """Reads whole tiles: what is behind a document has a weight, which is 0 in a kernel that is right."""

    weight = 0.0

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        attended = super().attend(q, k, v, metadata, options)
        read = nobodys(q, metadata, "q").float().sum() + nobodys(v, metadata, "k").float().sum()
        return attended._replace(out=attended.out + (self.weight * read).to(attended.out.dtype))


def nobodys(x: torch.Tensor, metadata: VarlenMetadata, side: str) -> torch.Tensor:
    """Rows that are no document's."""
    starts = metadata.cu_seqlens_q if side == "q" else metadata.cu_seqlens_k
    lengths = metadata.lengths_q if side == "q" else metadata.lengths_k
    mine = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for begin, length in zip(starts.tolist(), lengths, strict=False):
        mine[begin : begin + length] = True
    return x[~mine]


def backend(weight: float = 0.0, **stated: object) -> Backend:
    given = dataclasses.replace(LoopKernel.capabilities, **{"covers_all_rows": False, **stated})  # type: ignore[arg-type]
    kernel = type("Given", (Tiles,), {"weight": weight, "capabilities": given})()
    return Backend("tiles", kernel, levels=("kernel",))


@on_every_device
@pytest.mark.parametrize("changes", PLACED.values(), ids=PLACED)
def test_rows_of_nobody_hold_other_numbers_under_each_poison(changes: dict[str, object], device: str) -> None:
    case, where = CASE.replace(**changes), torch.device(device)
    held = set[float]()
    for poison in ("nan", "finite"):
        inputs = kernel_inputs(case, device)
        tensors = BatchTensors.of(backend(**MEANT), CallBatch.of_one(case), inputs, where, (case.capacity,), poison)
        own = {"q": inputs.q, "k": inputs.k}
        for name, x in zip("qk", tensors.of_calls[0][:2], strict=True):
            assert x.isfinite().all()
            held |= set(x.flatten().tolist()) - set(own[name].flatten().tolist())
        # Margins are no rows of the tensors: no kernel may read them.
        assert not tensors.placed["q"].storage.isfinite().all() or poison == "finite"
    assert len(held) == 2


def test_without_such_rows_batches_have_nan_between_calls() -> None:
    batch = CallBatch(CASE, (1, 2))
    tensors = BatchTensors.of(backend(**MEANT), batch, kernel_inputs(CASE, "cpu"), CPU)
    assert tensors.placed["q"].tensor.isnan().any()


@pytest.mark.parametrize("changes", PLACED.values(), ids=PLACED)
def test_a_kernel_that_multiplies_by_0_is_clean_where_it_says_so(changes: dict[str, object]) -> None:
    case = CASE.replace(**changes)
    assert examine(case, backend(**MEANT), "cpu").first is None
    assert isinstance(examine(case, backend(gaps=("q", "k")), "cpu").first, PoisonLeaked)
    # Numbers with a weight are a fault, whatever is said.
    wrong = examine(case, backend(1e-3, **MEANT), "cpu").symptoms
    assert {PoisonLeaked, WrongOutput} <= {type(symptom) for symptom in wrong}
    # Not NaN, but other numbers under each poison.
    assert not wrong[0].nan


@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_batches_tell_them_apart(weight: float) -> None:
    tiles = backend(weight, **MEANT)
    domain = Domain.of(tiles.kernel.capabilities, "cpu", aim={"gaps": ((True, True),)})
    batches = [draw_batch(Random(seed), Sweep((8, 16), seed), tiles, domain, 8) for seed in range(6)]
    failing = 0
    for number, batch in enumerate(batches):
        assert batch is not None
        question = schedule_on("cpu")[number % len(schedule_on("cpu"))]
        failing += bool(judge(batch, tiles, CPU, question).failing())
    assert bool(failing) == bool(weight)


@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_rows_behind_calls_are_asked_about_in_batches(weight: float) -> None:
    tiles = backend(weight, **MEANT)
    (question,) = {each for each in schedule_on("cpu") if each.asked == "capacity"}
    judged = judge(CallBatch(CASE.replace(lengths=(3, 4, 2)), (1, 3)), tiles, CPU, question)
    assert bool(judged.failing()) == bool(weight)


def test_whether_there_may_be_such_rows_is_not_told_by_nan_where_there_is_none() -> None:
    unstated = {"capacity": None, "isolates_nonfinite": False}
    assert inferred(backend(**MEANT, **unstated), "cpu").capacity
    # Behind a document there may be another.
    assert not inferred(backend(**MEANT, isolates_nonfinite=None), "cpu").isolates_nonfinite
    assert inferred(backend(isolates_nonfinite=None), "cpu").isolates_nonfinite
    assert not inferred(backend(**unstated), "cpu").capacity


KERNEL = """
import torch


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, seqused_k=None, softmax_scale=None):
    lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    out, starts = torch.zeros_like(q), cu_seqlens_k.tolist()
    for number, (first, end) in enumerate(zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:])):
        # The whole of the slot, with weights of 0 behind the document.
        keys, values = (x[starts[number] : starts[number + 1]].transpose(0, 1) for x in (k, v))
        hidden = torch.arange(keys.shape[1], device=q.device) >= lengths[number]
        scores = softmax_scale * q[first:end].transpose(0, 1) @ keys.transpose(1, 2)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1) + WEIGHT * hidden
        out = torch.cat([out[:first], (weights @ values).transpose(0, 1), out[end:]])
    return out


kernel.capabilities = {CAPABILITIES}
"""


@pytest.mark.parametrize(
    ("stated", "weight", "symptom"), [(True, 0.0, None), (False, 0.0, PoisonLeaked), (True, 1e-3, PoisonLeaked)]
)
def test_users_may_say_so(stated: bool, weight: float, symptom: type[Symptom] | None, tmp_path: Path) -> None:
    path = tmp_path / "tiles.py"
    stating = f"'finite_rest': {stated}, 'queries_without_keys': False"
    path.write_text(KERNEL.replace("CAPABILITIES", stating).replace("WEIGHT", str(weight)))
    mine, case = registry.load(f"{path}:kernel"), CASE.replace(gaps=(0, 3), dtype="fp32", causal=False)
    first = examine(case, mine, "cpu").first
    if symptom is None:
        assert first is None
        return
    assert isinstance(first, symptom)
    # Its script hands the kernel what the case does.
    assert ("-77" in standalone(case, mine, "cpu", "reads whole tiles")) == stated
