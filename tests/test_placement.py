"""Bounds looser than the longest document, rows between documents, rows far apart, and 65,537 documents."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from devices import on_every_device

from attn_fuzz.backends import crowd, registry
from attn_fuzz.backends.gap_arguments import GapArguments
from attn_fuzz.backends.kernel import BackendUnavailable, Capabilities, UnsupportedCase
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.campaign.crowds import takes_crowds
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.compact import compact
from attn_fuzz.cases.simpler import simpler_options
from attn_fuzz.cases.smaller import fewer_documents, one_shorter
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.calls import run_batch
from attn_fuzz.execution.runner import run_kernel
from attn_fuzz.findings.script import standalone
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.drawing import few_cases
from attn_fuzz.oracle.checks import PROBES
from attn_fuzz.oracle.examine import examine
from attn_fuzz.oracle.symptoms import PoisonLeaked
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import FAR_MEMORIES, Case, CaseError
from attn_fuzz.reference.far_memory import FAR, FarMemory
from attn_fuzz.reference.memory import bits

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CASE = Case(level="kernel", lengths=(3, 0, 4), key_lengths=(5, 2, 4), heads=4, kv_heads=2, head_dim=8)
PLACED = {
    "loose": {"loose_max_seqlen": (3, 70)},
    "gaps of queries": {"gaps": (2, 0)},
    "gaps of keys": {"gaps": (0, 3)},
    "all": {"gaps": (1, 17), "loose_max_seqlen": (1, 0), "capacity": 5, "lse_gradient": True, "memory": "mixed"},
    **{memory: {"memory": memory, "gaps": (1, 2)} for memory in FAR_MEMORIES},
}
FAULTS = {
    "P01": {"loose_max_seqlen": (1, 0)},
    "P02": {"lengths": (0, 2), "loose_max_seqlen": (1, 0)},
    "P03": {"lengths": (3,), "head_dim": 2, "loose_max_seqlen": (0, 1)},
    "P04": {"loose_max_seqlen": (31, 0)},
    "P05": {"gaps": (0, 1)},
    "P06": {"gaps": (0, 1)},
    "P07": {"window": (0, -1), "gaps": (0, 1)},
    "P08": {"lengths": (0, 1), "gaps": (1, 0)},
    "P09": {"lengths": (1, 0)},
    "P10": {"lengths": (2,), "memory": "far_rows"},
    "P11": {"lengths": (2,), "memory": "far_rows"},
    "P12": {"lengths": (2,), "heads": 2, "memory": "far_heads"},
    "P13": {"lengths": (2,), "memory": "far_base"},
}

KERNELS = """
import torch


def _attend(q, k, v, sides, scale):
    out, end = [], 0
    for (begin, queries), (first, keys) in zip(*sides):
        rows, seen = q[begin : begin + queries].transpose(0, 1), slice(first, first + keys)
        scores = scale * rows @ k[seen].permute(1, 2, 0)
        weighted = scores.softmax(-1) @ v[seen].transpose(0, 1) if keys else torch.zeros_like(rows)
        out += [q.new_zeros(begin - end, *q.shape[1:]), weighted.transpose(0, 1)]
        end = begin + queries
    return torch.cat([*out, q.new_zeros(len(q) - end, *q.shape[1:])])


def used(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, seqused_k=None, softmax_scale=None):
    lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    sides = zip(cu_seqlens_q.tolist(), cu_seqlens_q.diff().tolist()), zip(cu_seqlens_k.tolist(), lengths.tolist())
    return _attend(q, k, v, sides, softmax_scale)


def padded(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, cu_seqlens_q_padded, cu_seqlens_kv_padded,
    softmax_scale=None,
):
    starts, sums = (cu_seqlens_q_padded, cu_seqlens_kv_padded), (cu_seqlens_q, cu_seqlens_k)
    sides = [zip(begin.tolist(), each.diff().tolist()) for begin, each in zip(starts, sums)]
    return _attend(q, k, v, sides, softmax_scale)


def ignores(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, seqused_k=None, softmax_scale=None):
    return used(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale)


def anything(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    return used(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


def untold(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    return q


untold.capabilities = {"gaps": ["q"]}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gaps") / "kernels.py"
    path.write_text(KERNELS)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gaps": (1,)}, "gaps is"),
        ({"gaps": (-1, 0)}, "gaps is"),
        ({"loose_max_seqlen": (0, -2)}, "loose_max_seqlen is"),
        ({"gaps": (1 << 24, 0)}, "between documents included"),
        ({"level": "layer", "key_lengths": None, "gaps": (1, 0)}, "gaps belongs to kernel cases"),
        ({"level": "layer", "key_lengths": None, "memory": "far_rows"}, "memory far_rows belongs to kernel cases"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, object], words: str) -> None:
    with pytest.raises(CaseError, match=words):
        CASE.replace(**changes)


def test_a_case_says_it_in_json() -> None:
    case = CASE.replace(gaps=(1, 2), loose_max_seqlen=(0, 7))
    assert Case.from_json(case.to_json()) == case
    assert {"gaps", "loose_max_seqlen"}.isdisjoint(CASE.to_dict())


def test_tensors_do_not_depend_on_where_they_lie() -> None:
    placed = kernel_inputs(CASE.replace(gaps=(1, 2), loose_max_seqlen=(0, 7), memory="far_rows"), "cpu")
    for name, x in kernel_inputs(CASE, "cpu").named.items():
        assert torch.equal(bits(x), bits(placed.named[name]))


@on_every_device
def test_rows_between_documents_are_poison(device: str) -> None:
    case = CASE.replace(gaps=(2, 3), capacity=1)
    tensors = BatchTensors(CallBatch.of_one(case), kernel_inputs(case, device), torch.device(device), (1,))
    q, k, *_ = tensors.of_calls[0]
    own = [*range(3), *range(7, 11)]
    assert len(q) == 7 + 3 * 2 + 1
    assert q.isnan().flatten(1).all(1).nonzero()[:, 0].tolist() == [row for row in range(len(q)) if row not in own]
    assert len(k) == 11 + 3 * 3 + 1
    metadata = tensors.metadata[0]
    assert metadata.cu_seqlens_q.tolist() == [0, 5, 7, 13]
    assert metadata.seqused_q is not None
    assert metadata.seqused_q.tolist() == [3, 0, 4]
    assert metadata.seqused_k is not None
    assert metadata.seqused_k.tolist() == [5, 2, 4]
    assert not tensors.changed()
    metadata.seqused_k[0] = 4
    assert tensors.changes() == ["seqused_k"]


def test_bounds_are_as_loose_as_they_are_said_to_be() -> None:
    metadata = VarlenMetadata(lengths_q=(3, 4), lengths_k=(5, 1), device=CPU, loose_max_seqlen=(2, 30))
    assert (metadata.max_seqlen_q, metadata.max_seqlen_k) == (6, 35)
    assert metadata.seqused_q is metadata.seqused_k is None
    assert metadata.used("k").tolist() == [5, 1]


@on_every_device
def test_batches_have_gaps_in_every_call(device: str) -> None:
    case = CASE.replace(lengths=(3, 0, 4, 2), key_lengths=(5, 2, 4, 2), gaps=(2, 3), loose_max_seqlen=(1, 1))
    backend, where = registry.load("loop"), torch.device(device)
    batch, inputs = CallBatch(case, (1, 3, 4)), kernel_inputs(case, device)
    got = run_batch(BatchTensors(batch, inputs, where, (0, 2, 0)), backend, "nan")
    assert not got.broken
    assert [len(tail) for name, tail in got.tails[1] if name in ("out", "dk")] == [2 * 2 + 2, 2 * 3 + 2]
    together = run_kernel(backend, case, inputs, "nan", where).results
    for name, x in got.results.items():
        assert x.shape == together[name].shape
        assert torch.allclose(x.cpu(), together[name], atol=1e-5), name


@pytest.fixture
def gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One test at a time has half of a GPU's memory, whichever workers share it."""
    with (tmp_path_factory.getbasetemp().parent / "gigabytes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_available():
            # What this process has freed it keeps, and the next one may be another.
            gc.collect()
            torch.cuda.empty_cache()


@on_every_device
@pytest.mark.usefixtures("gigabytes")
@pytest.mark.parametrize("changes", PLACED.values(), ids=PLACED)
def test_the_loop_is_clean_wherever_rows_lie(changes: dict[str, object], device: str) -> None:
    assert examine(CASE.replace(**changes), registry.load("loop"), device).symptoms == ()


@pytest.mark.parametrize(("fault", "changes"), FAULTS.items())
def test_faults_of_placement_need_it(fault: str, changes: dict[str, object]) -> None:
    case = Case(level="kernel", **{"lengths": (1,), "head_dim": 1, **changes})  # type: ignore[arg-type]
    backend, probes = registry.load(f"fault:{fault}"), PROBES if fault == "P03" else ()
    assert examine(case, backend, "cpu", probes=probes).first is not None
    assert examine(case, registry.load("loop"), "cpu", probes=probes).first is None
    plain = case.replace(gaps=(0, 0), loose_max_seqlen=(0, 0), memory="contiguous")
    if plain != case:
        assert examine(plain, backend, "cpu", probes=probes).first is None


def test_what_no_backend_declares_is_refused() -> None:
    plain = Capabilities()
    pairs = [(3, 5), (0, 2), (4, 4)]
    assert plain.refusal(CASE, "cpu", pairs) is None
    assert plain.refusal(CASE.replace(loose_max_seqlen=(0, 1)), "cpu", pairs) == (
        "a max_seqlen that exceeds the longest document"
    )
    assert plain.refusal(CASE.replace(gaps=(0, 1)), "cpu", pairs) == "gaps between documents of k"
    assert Capabilities(gaps=("k",)).refusal(CASE.replace(gaps=(1, 1)), "cpu", pairs) == "gaps between documents of q"
    assert plain.refusal(CASE.replace(memory="far_base"), "cpu", pairs) == "memory layout far_base"


def test_more_documents_than_a_grid_takes_are_refused_by_who_takes_no_crowds() -> None:
    crowded = Case(level="kernel", lengths=(1,) * 65536, head_dim=8)
    fits = crowded.replace(lengths=(1,) * 65535)
    for takes in (True, None, False):
        said = Capabilities(crowds=takes).refusal(crowded, "cpu", [(1, 1)])
        assert said == ("more than 65,535 documents" if takes is False else None)
        assert Capabilities(crowds=takes).refusal(fits, "cpu", [(1, 1)]) is None


@pytest.mark.parametrize(("name", "kind"), [("sdpa_dense_efficient", "cuda"), ("sdpa_dense", "cuda")])
def test_masks_of_more_entries_than_32_bits_count_are_refused(name: str, kind: str) -> None:
    capabilities = registry.load(name).kernel.capabilities_on(kind)
    long = Case(level="kernel", lengths=(1 << 16,), head_dim=8)
    assert capabilities.refusal(long, kind, [(1 << 16, 1 << 16)]) is None
    longer = long.replace(lengths=((1 << 16) + 1,))
    assert capabilities.refusal(longer, kind, [((1 << 16) + 1,) * 2]) == "more than 4,294,967,296 entries of a mask"  # type: ignore[list-item]
    # Of all kernels of a CPU no such thing is known.
    assert registry.load("sdpa_dense").kernel.capabilities_on("cpu").refusal(longer, "cpu", [(1, 1)]) is None


def test_a_signature_tells_of_gaps(kernels: str) -> None:
    sides = {
        name: registry.load(f"{kernels}:{name}").kernel.capabilities.gaps for name in ("used", "padded", "anything")
    }
    assert sides == {"used": ("k",), "padded": ("q", "k"), "anything": ()}
    with pytest.raises(BackendUnavailable, match="no argument seqused_q"):
        registry.load(f"{kernels}:untold")
    with_any = GapArguments.of(lambda **options: options, ("k",))
    metadata = VarlenMetadata(lengths_q=(1,), lengths_k=(2,), device=CPU, gaps=(0, 3))
    assert {name: x.tolist() for name, x in with_any.given(metadata).items()} == {"seqused_k": [2]}


ALONE = CASE.replace(causal=False, kv_heads=4)
"""Of what kernels here take."""


@pytest.mark.parametrize(("name", "gaps"), [("used", (0, 3)), ("padded", (1, 2)), ("padded", (0, 0))])
def test_kernels_from_outside_are_told_of_gaps(kernels: str, name: str, gaps: tuple[int, int]) -> None:
    case = ALONE.replace(gaps=gaps, loose_max_seqlen=(5, 1))
    assert examine(case, registry.load(f"{kernels}:{name}"), "cpu", probes=()).symptoms == ()


def test_who_does_not_look_reads_rows_of_nobody(kernels: str) -> None:
    backend = registry.load(f"{kernels}:ignores")
    verdict = examine(ALONE.replace(gaps=(0, 1)), backend, "cpu", probes=())
    assert type(verdict.first) is PoisonLeaked
    assert examine(ALONE, backend, "cpu", probes=()).symptoms == ()


@on_every_device
@pytest.mark.usefixtures("gigabytes")
@pytest.mark.parametrize("memory", FAR_MEMORIES)
def test_far_memory_is_far_and_watched(memory: str, device: str) -> None:
    shapes = {"q": (5, 3, 8), "k": (4, 2, 8)}
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    room = FarMemory(memory, shapes, torch.bfloat16, torch.device(device))
    values = {name: torch.randn(shape).bfloat16().to(device) for name, shape in shapes.items()}
    placed = {name: room.place(name, x, torch.nan) for name, x in values.items()}
    for name, item in placed.items():
        x = item.tensor
        last = x.storage_offset() + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        # Of a GPU's memory there is less: of few heads the last one of the keys is nearer there.
        assert last >= FAR or (device, memory, name) == ("cuda", "far_heads", "k")
        assert torch.equal(x, values[name])
        assert item.changed() is None
        assert x.data_ptr() % 128 == 0
    placed["q"].storage[-1, 0] = 1.0
    assert placed["q"].changed() == "guard margins"
    placed["k"].tensor[-1, -1, -1] += 1
    assert placed["k"].changed() == "values"


def test_where_there_is_no_room_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("attn_fuzz.reference.far_memory._room", no_room)
    case = CASE.replace(memory="far_rows")
    with pytest.raises(UnsupportedCase, match="more than there is"):
        run_kernel(registry.load("loop"), case, kernel_inputs(case, "cpu"), "nan", CPU)


def test_compact_takes_back_what_is_promised() -> None:
    case = CASE.replace(gaps=(1, 1), loose_max_seqlen=(2, 2), memory="far_rows")
    assert compact(case, ("max_seqlen",)) == case.replace(loose_max_seqlen=(0, 0))
    assert compact(case, ("gaps", "far")) == case.replace(gaps=(0, 0), memory="contiguous")
    assert compact(CASE.replace(memory="mixed"), ("far",)).memory == "mixed"


def test_simpler_ones_come_first() -> None:
    offered = list(simpler_options(CASE.replace(gaps=(17, 0), loose_max_seqlen=(0, 5), memory="far_rows")))
    for changes in ({"gaps": (0, 0)}, {"gaps": (1, 0)}, {"loose_max_seqlen": (0, 0)}, {"memory": "contiguous"}):
        assert any(all(getattr(each, name) == value for name, value in changes.items()) for each in offered if each)


@pytest.mark.slow
def test_only_what_is_taken_is_drawn() -> None:
    def drawn(capabilities: Capabilities) -> list[Case]:
        found: list[Case] = []
        few_cases("kernel", Domain.of(capabilities, "cpu"), 3, lambda case: found.append(case), 150)
        return found

    plain = drawn(Capabilities())
    assert {case.gaps for case in plain} == {case.loose_max_seqlen for case in plain} == {(0, 0)}
    some = drawn(Capabilities(gaps=("k",), loose_max_seqlen=True, far_memories=("far_rows",)))
    assert {case.gaps[0] for case in some} == {0}
    assert len({case.gaps for case in some}) > 2
    assert len({case.loose_max_seqlen for case in some}) > 3
    assert {case.memory for case in some} & set(FAR_MEMORIES) <= {"far_rows"}


def test_documents_at_once_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(level="kernel", lengths=(2,) * 6, key_lengths=(3,) * 6, heads=4, kv_heads=2, head_dim=8)
    case = case.replace(lse_gradient=True)
    inputs, backend = kernel_inputs(case, "cpu"), registry.load("loop")
    apart = run_kernel(backend, case, inputs, "nan", CPU).results
    monkeypatch.setattr(crowd, "CROWD", 6)
    together = run_kernel(backend, case, inputs, "nan", CPU).results
    for name, x in apart.items():
        assert torch.allclose(x, together[name], atol=1e-6), name


def test_of_thousands_that_are_alike_few_are_tried() -> None:
    case = Case(level="kernel", lengths=(1,) * 5000)
    assert len(list(fewer_documents(case))) < 20
    assert len(list(one_shorter(case))) == 1


def test_crowds_are_for_kernels_that_are_quick() -> None:
    domain = Domain.of(Capabilities(crowds=None), "cpu")
    assert takes_crowds(CASE, domain, lambda case: 1e-5 * len(case.lengths))
    assert not takes_crowds(CASE, domain, lambda case: 1e-3 * len(case.lengths))
    assert not takes_crowds(CASE, domain, lambda case: 1e-8 * len(case.lengths) ** 2)
    assert not takes_crowds(CASE, Domain.of(Capabilities(), "cpu"), lambda case: 0.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_thousands_are_not_waited_for_where_hundreds_tell(device: str) -> None:
    asked = []

    def seconds(case: Case) -> float:
        asked.append(len(case.lengths))
        return 0.05 + 1e-3 * len(case.lengths)

    assert not takes_crowds(CASE, Domain.of(Capabilities(crowds=None), device), seconds)
    assert max(asked) < 1000
    assert takes_crowds(CASE, Domain.of(Capabilities(crowds=None), device), lambda case: 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["P14", "P15"])
def test_65537_documents_are_counted(fault: str) -> None:
    case = Case(level="kernel", lengths=(1,) * 65537, head_dim=1)
    assert examine(case, registry.load(f"fault:{fault}"), "cpu", ("nan",), probes=()).first is not None
    assert examine(case, registry.load("loop"), "cpu", ("nan",), probes=()).first is None


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "statuses"), [("P05", {"fault:P05": 1, "loop": 0}), ("P10", {"fault:P10": 1})])
def test_a_script_lays_rows_out_so(fault: str, statuses: dict[str, int], tmp_path: Path) -> None:
    case = Case(level="kernel", **{"lengths": (1,), "head_dim": 1, **FAULTS[fault]})  # type: ignore[arg-type]
    text = standalone(case, registry.load(f"fault:{fault}"), "cpu", "It is wrong.")
    for name, status in statuses.items():
        path = tmp_path / "script.py"
        path.write_text(text.replace(f"fault:{fault}", name))
        assert (
            subprocess.run(
                [sys.executable, path], check=False, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
            ).returncode
            == status
        )
