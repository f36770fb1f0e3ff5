"""Values: the same bits on every machine and version, and each document's are its own."""

from __future__ import annotations

import zlib

import pytest
import torch
from devices import needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_fuzz.reference.case import DTYPES, MAX_HEAD_DIM, VALUES, Case
from attn_fuzz.reference.memory import bits, same_bits
from attn_fuzz.reference.values import draw, draw_norm, draw_weight

CASE = Case(level="kernel", lengths=(3, 2), key_lengths=(4, 1), heads=2, head_dim=4, seed=7)


def checksum(x: torch.Tensor) -> str:
    """Of the bits, little end first."""
    return f"{zlib.crc32(bytes(bits(x).contiguous().view(torch.uint8).flatten().tolist())):08x}"


GOLDEN = {
    ("gaussian", "fp32"): "a8d8ee36 39c8718b 837dcd82 6f055c60",
    ("gaussian", "bf16"): "583df94d 4074d85b b7bfe1b1 fef08ad2",
    ("gaussian", "fp16"): "2b4ef590 bab9aa83 0843623a 49ec92a5",
    ("large", "fp32"): "a35eb062 8d46aa49 837dcd82 6f055c60",
    ("large", "bf16"): "9230dfb4 8ceeebc0 b7bfe1b1 fef08ad2",
    ("large", "fp16"): "1c0fe494 c647b7b4 0843623a 49ec92a5",
    ("offset", "fp32"): "a8d8ee36 987e7bf9 89b0e4cb 6f055c60",
    ("offset", "bf16"): "583df94d 0663ccea f2ba1b3c fef08ad2",
    ("offset", "fp16"): "2b4ef590 b7da0c1c 8bc362cc 49ec92a5",
    ("tiny", "fp32"): "fbeb7d89 1d45912a 63a0b340 fc350d83",
    ("tiny", "bf16"): "adc95a84 e4c9861c 140d4db9 d2b46685",
    ("tiny", "fp16"): "1b671f68 d1cc349a 0a0bb2d7 191a845f",
    ("ties", "fp32"): "2dfd8a18 a3cefd7d 837dcd82 6f055c60",
    ("ties", "bf16"): "e4f48e99 f3986f18 b7bfe1b1 fef08ad2",
    ("ties", "fp16"): "484df3a8 5f211229 0843623a 49ec92a5",
}


@pytest.mark.parametrize(("values", "dtype"), [(values, dtype) for values in VALUES for dtype in DTYPES])
def test_bits_are_those_of_the_first_version(values: str, dtype: str) -> None:
    """A stored case must stay the case that it was: a changed value breaks every finding there is."""
    case = CASE.replace(values=values, dtype=dtype)
    drawn = {name: draw(case, name, 2, 4, "cpu", keys=name in "kv") for name in ("q", "k", "v", "dout")}
    assert " ".join(map(checksum, drawn.values())) == GOLDEN[values, dtype]


def test_values_can_be_read() -> None:
    assert draw(CASE, "q", 2, 4, "cpu")[0, 0].tolist() == [
        0.3496292233467102,
        1.3106404542922974,
        -0.9896602630615234,
        0.632155179977417,
    ]
    assert draw(CASE.replace(dtype="bf16"), "k", 2, 4, "cpu", keys=True)[-1, -1].tolist() == [
        -0.90625,
        0.81640625,
        0.06640625,
        0.484375,
    ]


PARAMETERS = {
    ("gaussian", "fp32"): "281f9d8c 6666421a",
    ("gaussian", "bf16"): "c2f91b44 f057afe3",
    ("gaussian", "fp16"): "76f6525e 2b206177",
    ("selection", "fp32"): "6bb14005 6666421a",
    ("selection", "bf16"): "ac3253db f057afe3",
    ("selection", "fp16"): "4d90db5d 2b206177",
}


@pytest.mark.parametrize(("weights", "dtype"), PARAMETERS)
def test_parameters_are_those_of_the_first_version(weights: str, dtype: str) -> None:
    case = Case(lengths=(3, 2), head_dim=4, seed=7, weights=weights, dtype=dtype)
    drawn = (draw_weight(case, "query", 6, 5, "cpu"), draw_norm(case, "key_norm", "cpu"))
    assert " ".join(map(checksum, drawn)) == PARAMETERS[weights, dtype]


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("values", VALUES)
def test_devices_draw_the_same_bits(values: str) -> None:
    case = CASE.replace(values=values, dtype="bf16")
    assert same_bits(draw(case, "q", 2, 4, "cuda").cpu(), draw(case, "q", 2, 4, "cpu"))


# A document's values are its own.

DOCUMENTS = st.dictionaries(st.integers(0, 50), st.integers(0, 6), min_size=1, max_size=6).filter(
    lambda documents: any(documents.values())
)


def by_document(case: Case, heads: int, channels: int) -> dict[int, torch.Tensor]:
    parts = draw(case, "q", heads, channels, "cpu").split(case.packed_lengths)
    return dict(zip(case.packed_ids, parts, strict=True))


@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS, data=st.data(), values=st.sampled_from(VALUES))
def test_a_document_keeps_its_values_whatever_becomes_of_the_rest(
    documents: dict[int, int], data: st.DataObject, values: str
) -> None:
    """Others go, come, move and grow; heads and channels are added; the document itself is cut short."""
    ids = data.draw(st.permutations(sorted(documents)))
    case = Case(
        level="kernel",
        lengths=tuple(documents[name] for name in ids),
        document_ids=tuple(ids),
        values=values,
    )
    before = by_document(case, 3, 5)
    others = data.draw(DOCUMENTS)
    lengths = {name: others[name] for name in data.draw(st.permutations(sorted(others)))}
    after = by_document(case.replace(lengths=tuple(lengths.values()), document_ids=tuple(lengths)), 4, 7)
    for name in documents.keys() & others.keys():
        shared = min(documents[name], others[name])
        assert same_bits(before[name][:shared], after[name][:shared, :3, :5])


@pytest.mark.parametrize("change", ["seed", "name", "document", "row", "head", "channel"])
def test_no_two_values_are_drawn_from_one_counter(change: str) -> None:
    case = Case(level="kernel", lengths=(40, 40), seed=1)
    x = draw(case, "q", 8, 8, "cpu")
    other = {
        "seed": lambda: draw(case.replace(seed=2), "q", 8, 8, "cpu"),
        "name": lambda: draw(case, "dout", 8, 8, "cpu"),
        "document": lambda: x.roll(40, 0),
        "row": lambda: x.roll(1, 0),
        "head": lambda: x.roll(1, 1),
        "channel": lambda: x.roll(1, 2),
    }[change]()
    assert (x == other).float().mean() < 0.001
    assert abs(torch.corrcoef(torch.stack([x.flatten(), other.flatten()]))[0, 1]) < 0.05


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_tensors_of_the_layer_differ_from_one_another(name: str) -> None:
    x = draw(CASE, name, 2, 4, "cpu")
    assert all(
        not torch.equal(x, draw(CASE, other, 2, 4, "cpu")) for other in ("q", "k", "v", "dout", "x") if other != name
    )


def test_the_padding_is_no_document_that_could_be_named() -> None:
    padded = draw(Case(lengths=(2,), padding=3), "x", 1, 8, "cpu")[2:]
    for name in range(20):
        assert not (padded == draw(Case(lengths=(3,), document_ids=(name,)), "x", 1, 8, "cpu")).any()


# What the modes promise.

LARGE = Case(level="kernel", lengths=(500,), heads=4, kv_heads=4, head_dim=16)


def moments(values: str, name: str) -> tuple[float, float]:
    x = draw(LARGE.replace(values=values), name, 4, 16, "cpu").double()
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize(
    ("values", "name", "mean", "deviation"),
    [
        ("gaussian", "q", 0.0, 1.0),
        ("gaussian", "dout", 0.0, 1.0),
        ("large", "q", 0.0, 3.0),
        ("large", "v", 0.0, 1.0),
        ("offset", "k", 2.0, 0.25),
        ("offset", "q", 0.0, 1.0),
        ("tiny", "v", 0.0, 2.0**-12),
        ("ties", "k", 0.0, 0.5),
    ],
)
def test_modes_have_the_spread_they_say(values: str, name: str, mean: float, deviation: float) -> None:
    got = moments(values, name)
    assert got[0] == pytest.approx(mean, abs=0.02 * deviation)
    assert got[1] == pytest.approx(deviation, rel=0.02)


def test_ties_tie() -> None:
    case = LARGE.replace(values="ties")
    assert set(draw(case, "q", 4, 16, "cpu").unique().tolist()) == {-0.5, 0.5}
    assert len(draw(case, "v", 4, 16, "cpu").unique()) > 1000


@pytest.mark.parametrize("dtype", DTYPES)
def test_selections_are_exact_and_tell_channels_apart(dtype: str) -> None:
    """Each row copies one channel or its negative, and neighbouring rows different ones."""
    weight = draw_weight(Case(weights="selection", dtype=dtype), "query", 12, 7, "cpu")
    assert (weight.abs().sum(1) == 1).all()
    assert set(weight.unique().tolist()) == {-1.0, 0.0, 1.0}
    channel = weight.abs().argmax(1)
    assert (channel[1:] != channel[:-1]).all()


def test_gaussian_weights_keep_the_size_of_what_they_project() -> None:
    weight = draw_weight(Case(), "query", 400, 64, "cpu").double()
    assert weight.square().sum(1).mean().item() == pytest.approx(1.0, rel=0.05)


def test_the_widest_heads_share_no_channel() -> None:
    x = draw(Case(level="kernel", lengths=(1,), heads=2, head_dim=MAX_HEAD_DIM), "q", 2, MAX_HEAD_DIM, "cpu")
    assert len(x.unique()) > 0.98 * x.numel()
