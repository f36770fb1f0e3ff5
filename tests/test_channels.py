"""Values of another head_dim than keys, head dimensions that few tests have, large groups: drawn, answered, refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import islice
from random import Random

import pytest
import torch
from devices import needs_cuda
from doubles import double

from attn_fuzz import adapters, assert_attention
from attn_fuzz.adapters.call import AdaptedKernel
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import Capabilities, Configuration
from attn_fuzz.backends.kernels.loop import LoopKernel
from attn_fuzz.backends.loop import Loop
from attn_fuzz.backends.output import MisshapenResult, require_output
from attn_fuzz.batch.judge import judge
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.order import simplicity
from attn_fuzz.cases.simpler import narrower
from attn_fuzz.coverage.aims import aim_at
from attn_fuzz.coverage.allowed import Space
from attn_fuzz.generation.configurations import in_order
from attn_fuzz.generation.domain import EVERY_HEAD_DIM, HEAD_GROUPS, MANY_HEADS, Domain
from attn_fuzz.generation.drawing import few_cases
from attn_fuzz.generation.length_sweeps import Sweep, draw_case, draw_options
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reference.answer import kernel_answer, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.values import draw

CPU = torch.device("cpu")
LOOP = LoopKernel.capabilities
CASE = Case(level="kernel", lengths=(5, 33), key_lengths=(9, 40), heads=4, kv_heads=2, head_dim=8, head_dim_v=24)
GROUPED = "values of another head_dim than keys with grouped heads"


def domain(capabilities: Capabilities = LOOP, **aim: tuple[object, ...]) -> Domain:
    return Domain.of(capabilities, "cpu", aim=aim)


def test_as_many_channels_as_keys_is_the_default() -> None:
    assert CASE.replace(head_dim_v=8) == CASE.replace(head_dim_v=None)
    assert (CASE.value_dim, CASE.replace(head_dim_v=None).value_dim) == (24, 8)
    assert Case.from_json(CASE.to_json()) == CASE


def test_tensors_have_the_channels_of_their_own_side_and_the_others_their_bits() -> None:
    drawn, plain = kernel_inputs(CASE, "cpu"), kernel_inputs(CASE.replace(head_dim_v=None), "cpu")
    assert torch.equal(drawn.q, plain.q)
    assert torch.equal(drawn.k, plain.k)
    assert torch.equal(drawn.v[..., :8], plain.v)
    assert drawn.dout.shape == (38, 4, 24)
    answer = kernel_answer(CASE, drawn, Profile())
    assert {name: each.value.shape[-1] for name, each in answer.items()} == {
        **{"out": 24, "lse": 4, "dq": 8, "dk": 8, "dv": 24}
    }


def test_channels_beyond_512_are_no_other_heads() -> None:
    case = Case(level="kernel", lengths=(3,), heads=3, kv_heads=3, head_dim=576)
    wide = draw(case, "k", 3, 576, "cpu")
    assert torch.equal(wide[..., :512], draw(case, "k", 3, 512, "cpu"))
    assert len({tuple(column.tolist()) for column in wide.flatten(1).T}) == 3 * 576


@pytest.mark.parametrize("dims", [(1, 3), (3, 1), (32, 16)])
def test_a_correct_kernel_is_clean(dims: tuple[int, int]) -> None:
    """By all checks, with gradients of the LSE, odd strides and rows behind the documents."""
    case = CASE.replace(
        head_dim=dims[0], head_dim_v=dims[1], memory="mixed", capacity=2, lse_gradient=True, dtype="bf16"
    )
    for name in ("loop", "backup"):
        backend = registry.load(name)
        plain = case if name == "loop" else case.replace(capacity=0, lse_gradient=False)
        assert examine(plain, backend, "cpu").symptoms == ()


@pytest.mark.parametrize("fault", ["D01", "D02", "D03", "D04"])
def test_a_wrong_one_is_not(fault: str) -> None:
    backend = registry.load(f"fault:{fault}")
    assert examine(CASE, backend, "cpu").first is not None
    # Nor in a batch.
    batch = CallBatch(CASE, (1, 2))
    assert (judge(batch, backend, CPU).z > 10).any()
    assert not (judge(batch, registry.load("loop"), CPU).z > 10).any()


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("D05", {"head_dim": 264}),
        ("D06", {"head_dim": 136}),
        ("D07", {"heads": 17, "kv_heads": 1, "head_dim": 8}),
        ("D08", {"heads": 66, "kv_heads": 33, "head_dim": 8}),
    ],
)
def test_wide_heads_and_many_of_them_show_what_others_do_not(fault: str, changes: dict[str, int]) -> None:
    case = Case(level="kernel", lengths=(3,), key_lengths=(5,))
    assert examine(case.replace(**changes), registry.load(f"fault:{fault}"), "cpu").first is not None
    assert examine(case, registry.load(f"fault:{fault}"), "cpu").first is None


@pytest.mark.parametrize("fault", ["D09", "D10"])
def test_rows_from_2048_on_are_drawn_in_batches(fault: str) -> None:
    """A call of a batch with such a document, as a campaign draws it."""
    backend = registry.load(f"fault:{fault}")
    drawn = (draw_case(Random(seed), Sweep((16, 32), seed), backend, domain(LOOP), 8) for seed in range(200))
    long = [case for case in drawn if case is not None and max(case.lengths) > 2048]
    assert len(long) >= 5
    causal = next(case for case in long if case.causal and case.heads * case.head_dim <= 64)
    assert (judge(CallBatch.of_one(causal), backend, CPU).z > 10).any()


# What is taken.


@pytest.mark.parametrize(
    ("capabilities", "pair", "refused"),
    [
        ({}, (16, 32), "values of another head_dim than keys"),
        ({"head_dims_v": True}, (16, 32), None),
        ({"head_dims_v": None}, (16, 32), None),
        ({"head_dims_v": True, "max_head_dim": 16}, (16, 32), "head_dim_v 32, above 16"),
        ({"head_dims_v": True, "head_dim_multiple": 8}, (16, 12), "head_dim_v 12, no multiple of 8"),
        ({"head_dims_v": True, "head_dims": (16,)}, (16, 32), "head_dim_v 32, only 16"),
        ({"head_dims_v": ((192, 128),), "head_dims": (64,)}, (192, 128), None),
        ({"head_dims_v": ((192, 128),), "head_dims": (64,)}, (128, 192), "head_dim 128 with head_dim_v 192"),
        ({"head_dims_v": True, "gqa_head_dims_v": False}, (16, 32), GROUPED),
        ({"head_dims_v": None, "gqa_head_dims_v": False}, (16, 32), GROUPED),
        ({"head_dims_v": ((192, 128),), "gqa_head_dims_v": False}, (192, 128), GROUPED),
        ({"head_dims_v": ((192, 128),), "gqa_head_dims_v": False}, (64, 128), "head_dim 64 with head_dim_v 128"),
        ({"gqa_head_dims_v": False}, (16, 16), None),
    ],
)
def test_what_is_not_declared_is_refused(
    capabilities: dict[str, object], pair: tuple[int, int], refused: str | None
) -> None:
    stated = Capabilities(**capabilities)  # type: ignore[arg-type]
    case = CASE.replace(head_dim=pair[0], head_dim_v=pair[1])
    assert stated.refusal(case, "cpu", [(5, 9), (33, 40)]) == refused


@pytest.mark.parametrize("pairs", [True, ((8, 24),)])
def test_values_of_heads_that_are_not_grouped_are_taken_all_the_same(pairs: bool | tuple[tuple[int, int], ...]) -> None:
    stated = Capabilities(head_dims_v=pairs, gqa_head_dims_v=False)
    assert stated.refusal(CASE.replace(kv_heads=4), "cpu", [(5, 9), (33, 40)]) is None


def test_what_a_backend_says_of_grouped_heads_is_asked_with_its_limits_set_aside() -> None:
    case = CASE.replace(dtype="bf16", head_dim=32, head_dim_v=64)
    assert registry.load("flash4").refusal(case, "cuda") == GROUPED
    assert registry.load("flash4").refusal(case.replace(kv_heads=4), "cuda") is None
    assert registry.load("unrestricted:flash4").refusal(case, "cuda") is None


def test_an_output_has_the_channels_of_values() -> None:
    q, v = torch.zeros(3, 4, 8), torch.zeros(5, 2, 24)
    require_output(torch.zeros(3, 4, 24), q, v)
    with pytest.raises(
        MisshapenResult, match=r"\[3, 4, 8\], but should be \[3, 4, 24\], that of q with the channels of v"
    ):
        require_output(q, q, v)


# What is drawn.


def drawn(capabilities: Capabilities, count: int = 160, **aim: tuple[object, ...]) -> list[Case]:
    found: list[Case] = []
    for seed in range(count // 4):
        few_cases("kernel", domain(capabilities, **aim), seed, lambda case: found.append(case))
    return found


def test_every_head_dim_and_values_of_others_are_drawn() -> None:
    options = [draw_options(Random(seed), domain(), every=True) for seed in range(4000)]
    dims = {each["head_dim"] for each in options}
    assert {8 * dim for dim in range(1, 65)} <= dims
    assert {(each["heads"], each["kv_heads"]) for each in options} >= set(MANY_HEADS)
    assert {(192, 128), (576, 512), (64, 128)} <= {(each["head_dim"], each["head_dim_v"]) for each in options}
    cases = drawn(LOOP)
    differ = [case for case in cases if case.head_dim_v is not None]
    assert 4 <= len(differ) <= len(cases) // 4
    assert {case.value_dim > case.head_dim for case in differ} == {True, False}
    assert any(case.head_dim not in (*domain().head_dims, 576) for case in cases if case.head_dim_v is None)


@pytest.mark.parametrize("stated", [False, None])
def test_nothing_else_is_drawn_where_it_is_not_known_to_be_taken(stated: bool | None) -> None:
    unknown = dataclasses.replace(LOOP, head_dims_v=stated)
    assert all(case.head_dim_v is None for case in drawn(unknown, 60))
    assert domain(unknown).value_dims == ()


def test_of_a_few_head_dims_any_two() -> None:
    assert set(domain(dataclasses.replace(LOOP, head_dims=(10, 12))).value_dims) == {(10, 12), (12, 10)}
    some = domain(dataclasses.replace(LOOP, max_head_dim=256, head_dim_multiple=8))
    assert len(some.every_head_dim) == 32
    assert set(some.every_head_dim) <= set(EVERY_HEAD_DIM)


def test_configurations_have_values_of_other_head_dims_and_many_heads() -> None:
    """Layers have something to draw from, too: the first is none of those."""
    for seed in range(6):
        order = list(islice(in_order(domain(), seed), 40))
        assert order[0].head_dim_v is None
        assert len({each.head_dim for each in order}) > 20
        assert sum(each.head_dim_v is not None for each in order) >= 4
        assert any(each.heads > 16 for each in order)
        assert all(each.head_dim_v is None for each in islice(in_order(domain().for_layers, seed), 40))
    assert Configuration.of(CASE).words() == "fp32 8-24 4/2 causal"


def test_layers_draw_none() -> None:
    found: list[Case] = []
    compiled = domain(dataclasses.replace(LOOP, configurations=(Configuration.of(CASE),)))
    few_cases("layer", compiled, 3, lambda case: found.append(case))
    assert {case.head_dim_v for case in found} == {None}


def test_a_slice_may_aim_at_them() -> None:
    space = Space(LOOP, "cpu", ("kernel", "layer"), ("kernel", "layer"))
    wide = aim_at(space, ("value channels", "more"), ("head_dim", "64"))
    assert set(wide["values"]) == {(64, 128), (64, 256), (64, 512)}
    aimed = [(case.head_dim, case.value_dim) in wide["values"] for case in drawn(LOOP, 40, **wide)]
    # Not where a document is too long for so many channels.
    assert sum(aimed) > len(aimed) / 2
    assert space.why_not(("value channels", "more"), ("level", "layer")) is not None
    assert space.why_not(("head_dim", "1"), ("value channels", "fewer")) is not None
    plain = Space(Capabilities(), "cpu", ("kernel",), ("kernel",))
    assert plain.why_not(("value channels", "more"), ("level", "kernel")) is not None


# Where grouped heads have values as wide as keys only.

APART: dict[str, Capabilities] = {
    "any channels": dataclasses.replace(LOOP, gqa_head_dims_v=False),
    "pairs": dataclasses.replace(LOOP, gqa_head_dims_v=False, head_dims_v=((192, 128), (64, 32)), head_dims=(16, 64)),
}
AIMED: dict[str, dict[str, tuple[object, ...]]] = {
    "nothing": {},
    "groups": {"heads": ((2, 1), (16, 1))},
    "a group or none": {"heads": ((2, 1), (2, 2))},
    "values": {"values": ((64, 32), (192, 128))},
    "values or none": {"values": (None, (64, 32))},
    "what is not taken": {"values": ((64, 32),), "heads": ((4, 1),)},
}


def of_both(each: Case | Configuration) -> bool:
    return each.head_dim_v is not None and each.heads != each.kv_heads


def called(capabilities: Capabilities, **aim: tuple[object, ...]) -> list[Case]:
    """Packed calls, as batches are cut from them."""
    kernel = LoopKernel()
    kernel.capabilities = capabilities  # type: ignore[misc]
    backend, some = registry.Backend("apart", kernel), domain(capabilities, **aim)
    drawn = (
        draw_case(Random(seed), Sweep((16, 32), seed), backend, some, 4, every=seed % 2 == 0) for seed in range(120)
    )
    return [case for case in drawn if case is not None]


WAYS: dict[str, Callable[..., Sequence[Case | Configuration]]] = {
    "cases": drawn,
    "batches": called,
    "configurations": lambda capabilities, **aim: [
        each for seed in range(3) for each in islice(in_order(domain(capabilities, **aim), seed), 32)
    ],
}


@pytest.mark.parametrize("stated", APART)
@pytest.mark.parametrize("way", WAYS)
def test_both_are_drawn_but_never_together(way: str, stated: str) -> None:
    found = WAYS[way](APART[stated])
    assert not any(map(of_both, found))
    # As many of them as there are elsewhere: heads are drawn to fit.
    differ = sum(each.head_dim_v is not None for each in found)
    usual = sum(each.head_dim_v is not None for each in WAYS[way](LOOP))
    assert usual / 2 < differ < 2 * usual
    assert len({each.heads for each in found if each.head_dim_v is not None}) > 2
    assert len({each.heads // each.kv_heads for each in found}) > 4


@pytest.mark.slow
@pytest.mark.parametrize("stated", APART)
@pytest.mark.parametrize("aimed", AIMED)
@pytest.mark.parametrize("way", WAYS)
def test_nor_are_they_where_one_or_the_other_is_aimed_at(way: str, aimed: str, stated: str) -> None:
    found = WAYS[way](APART[stated], **AIMED[aimed])
    assert not any(map(of_both, found))
    differ = {each.head_dim_v is not None for each in found}
    if aimed == "groups":
        assert {(each.heads, each.kv_heads) for each in found} <= {(2, 1), (16, 1), (1, 1)}
        assert differ == {False}
    elif aimed == "values or none":
        assert differ == {True, False}
    elif aimed == "values" and way != "cases":
        # Some single cases have documents that are too long for so many channels.
        assert differ == {True}


def test_few_configurations_of_one_kind_are_not_the_end_of_the_others() -> None:
    few = {"dtypes": ("fp32",), "head_dims": (16,), "softcap": False, "noncausal": False, "window": False}
    some = dataclasses.replace(APART["pairs"], head_dims_v=((64, 32),), **few)  # type: ignore[arg-type]
    order = list(in_order(domain(some), 1))
    assert {(each.heads, each.kv_heads) for each in order if each.head_dim_v is None} >= set(HEAD_GROUPS)
    assert {(each.heads, each.kv_heads) for each in order if each.head_dim_v} == {(1, 1), (2, 2), (8, 8)}


def test_draws_are_what_they_were_where_both_are_taken_together() -> None:
    """Nothing more is drawn, and nothing in another order: seeds are played again."""
    for some in (LOOP, dataclasses.replace(LOOP, gqa=False), Capabilities(gqa_head_dims_v=False)):
        whole = domain(some)
        assert whole.parted(lambda: pytest.fail("it was drawn")) is whole


def test_what_is_taken_apart_is_no_hole_in_what_was_drawn() -> None:
    levels = ("kernel", "layer")
    whole, apart, few = (Space(some, "cpu", levels, levels) for some in (LOOP, *APART.values()))
    both = (("group", "2"), ("value channels", "more"))
    assert whole.why_not(*both) is whole.why_never(*both) is None
    reason = "values of another head_dim than keys are not declared with grouped heads"
    assert apart.why_not(*both) == apart.why_never(*both) == reason
    for pair in ((("group", "1"), both[1]), (both[0], ("value channels", "same")), (both[0], ("head_dim", "64"))):
        assert apart.why_not(*pair) is few.why_not(*pair) is None or pair[0] == ("group", "1")
    # Keys that are so wide beside other values only.
    assert few.why_not(("group", "5-8"), ("head_dim", "192")) == reason
    assert few.why_not(("group", "1"), ("head_dim", "192")) is None
    assert set(both) not in map(set, apart.pairs())


def test_fewer_channels_are_simpler() -> None:
    offered = [case for case in narrower(CASE.replace(head_dim=192, head_dim_v=128)) if case is not None]
    assert {case.head_dim_v for case in offered} >= {None, 1, 64}
    assert {case.head_dim for case in offered} >= {1, 64, 96, 184}
    assert simplicity(CASE.replace(head_dim_v=None)) < simplicity(CASE) < simplicity(CASE.replace(head_dim_v=32))


# Users' code.


def test_adapters_hand_on_what_values_have() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    kernel = adapters.by_document(attention, layout="bhsd", capabilities={"gqa": False})
    assert isinstance(kernel, AdaptedKernel)
    q, k, v = torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 24)
    sums = torch.tensor([0, 2, 5], dtype=torch.int32)
    out = kernel(q, k, v, sums, sums, 3, 3, causal=True)
    assert out.shape == (5, 2, 24)
    assert_attention(out, q, k, v, sums, sums, causal=True)
    with pytest.raises(ValueError, match="v has shape"):
        assert_attention(out, q, k, v[:4], sums, sums, causal=True)
    with pytest.raises(AssertionError):
        assert_attention(out + (torch.arange(24) == 20), q, k, v, sums, sums, causal=True)
    packed = adapters.packed_kv(lambda q, kv, *rest: q)
    assert packed.capabilities["head_dims_v"] is False


@pytest.mark.cuda
@needs_cuda
def test_every_backend_that_takes_them_is_right_on_a_gpu() -> None:
    """Where it is installed: one pair that it names, or one either way."""
    asked = 0
    for name in registry.kernel_names():
        backend = registry.load(name)
        pairs = domain_of(name).value_dims
        if backend.kernel.why_unavailable("cuda") is not None or not pairs:
            continue
        for dim, dim_v in (pairs[0], pairs[-1]):
            case = CASE.replace(
                head_dim=dim,
                head_dim_v=dim_v,
                dtype=backend.kernel.capabilities_on("cuda").dtypes[-1],
                key_lengths=None,
            )
            if backend.refusal(case, "cuda") is None:
                assert examine(case, backend, "cuda").symptoms == (), name
                asked += 1
    assert asked


def domain_of(name: str) -> Domain:
    return Domain.of(registry.load(name).kernel.capabilities_on("cuda"), "cuda")


def test_a_kernel_that_fails_them_is_not_asked_for_them() -> None:
    assert double(Loop()).refusal(CASE, "cpu") == "values of another head_dim than keys"
