"""Known-answer inputs and their judges once more: a document, a row, a head at a time, as their words say it.

Nothing here is shared with ``attn_fuzz.oracle.known_answer`` but the drawing of signs, the choice of scores and gains,
and the constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from attn_fuzz.oracle.deviations import LIMIT, deviations, row_spreads
from attn_fuzz.oracle.known_answer.every_row import ALIKE
from attn_fuzz.oracle.known_answer.needle_gain import needle_code, needle_gain
from attn_fuzz.oracle.known_answer.signs import drawn, signs
from attn_fuzz.oracle.known_answer.slack import lse_slack, support_slack
from attn_fuzz.oracle.known_answer.swamping import FEWEST_KEYS, LARGE, MOST_LARGE
from attn_fuzz.reference.answer import Inputs, kernel_answer
from attn_fuzz.reference.attention import allowed_keys
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import Segment, call_segments
from attn_fuzz.reference.profile import UNIT_ROUNDOFF, Profile
from attn_fuzz.reference.values import DTYPES

Results = dict[str, torch.Tensor]
Wrong = set[tuple[str, int]]
"""(result, document)."""


def seen_by(case: Case, segment: Segment) -> Iterator[tuple[int, list[int]]]:
    """Each row of a document, within the tensor, and the rows of the keys that it sees."""
    mask = allowed_keys(segment.queries.length, segment.keys.length, case.effective_window)
    for i in range(segment.queries.length):
        yield segment.queries.begin + i, [segment.keys.begin + int(j) for j in mask[i].nonzero()[:, 0]]


def pick(case: Case, document: int, salt: int, count: int) -> int:
    mixed = (case.seed * 1_000_003 + case.packed_ids[document] * 8191 + salt * 131) * 0x9E3779B1
    return ((mixed >> 7) & 0xFFFFFF) % count


def hot_places(case: Case) -> dict[int, tuple[int, int, int]]:
    """Row within the tensor, head and channel of every document's output gradient."""
    places = {}
    for document, queries, _ in call_segments(case):
        if queries.length:
            some = pick(case, document, 1, queries.length)
            row = (0, queries.length - 1, some)[pick(case, document, 2, 3)]
            channel = pick(case, document, 4, case.value_dim)
            places[document] = (queries.begin + row, pick(case, document, 3, case.heads), channel)
    return places


def in_pairs(x: torch.Tensor, begin: int, end: int) -> None:
    for row in range(begin + 1, end, 2):
        x[row] = -x[row - 1]


def of_dtype(case: Case, *tensors: torch.Tensor) -> Inputs:
    return Inputs(*(x.to(DTYPES[case.dtype]) for x in tensors))


def census_inputs(case: Case, product: float) -> Inputs:
    v = signs(case, "census", case.kv_heads, "cpu", keys=True, values=True)
    k = signs(case, "probe keys", case.kv_heads, "cpu", keys=True)
    q = torch.zeros(sum(case.packed_lengths), case.heads, case.head_dim)
    dout = torch.zeros(sum(case.packed_lengths), case.heads, case.value_dim)
    for segment in call_segments(case):
        in_pairs(v, *segment.keys)
    for place in hot_places(case).values():
        dout[place] = 1.0
    q[..., 0], k[..., 0] = product, 1.0
    return of_dtype(case, q, k, v, dout)


def census_wrong(case: Case, inputs: Inputs, results: Results, product: float) -> Wrong:
    group, score = case.heads // case.kv_heads, product * case.softmax_scale
    capped = case.softcap * math.tanh(score / case.softcap) if case.softcap else score
    wrong: Wrong = set()
    hot = hot_places(case)
    for segment in call_segments(case):
        document = segment.document
        row_seen = dict(seen_by(case, segment))
        for row, seen in row_seen.items():
            for head in range(case.heads):
                sums = inputs.v[seen, head // group].double().sum(0)
                if not ((results["out"][row, head].double() * max(len(seen), 1) - sums).abs() < 0.25).all():
                    wrong.add(("out", document))
                lse = math.log(len(seen)) + capped if seen else -math.inf
                got = results["lse"][row, head].item()
                if got != lse and not abs(got - lse) <= lse_slack(case, capped):
                    wrong.add(("lse", document))
                if (row, head) != hot[document][:2] and results["dq"][row, head].count_nonzero():
                    wrong.add(("dq", document))
        row, head, channel = hot.get(document, (-1, -1, -1))
        owed = row_seen.get(row, [])
        for key in range(*segment.keys):
            for kv_head in range(case.kv_heads):
                hit = key in owed and kv_head == head // group
                dk, dv = (results[name][key, kv_head].double() for name in ("dk", "dv"))
                expected = torch.zeros_like(dv)
                expected[channel] = 1 / len(owed) if hit else 0.0
                if not ((dv - expected).abs() <= support_slack(case, Profile(), score) * expected).all():
                    wrong.add(("dv", document))
                # The channel that makes the score has a gradient of its own.
                if dk[1 if hit and score else 0 :].count_nonzero():
                    wrong.add(("dk", document))
    return wrong


def every_row_inputs(case: Case) -> Inputs:
    k = signs(case, "probe keys", case.kv_heads, "cpu", keys=True)
    v = signs(case, "probe values", case.kv_heads, "cpu", keys=True, values=True)
    dout = signs(case, "every row", case.heads, "cpu", keys=False, values=True)
    for segment in call_segments(case):
        in_pairs(dout, *segment.queries)
        for row, seen in seen_by(case, segment):
            dout[row] *= 2.0 ** round(math.log2(max(len(seen), 1)))
    return of_dtype(case, torch.zeros(len(dout), case.heads, case.head_dim), k, v, dout)


def every_row_wrong(case: Case, inputs: Inputs, results: Results, profile: Profile) -> Wrong:
    expected = kernel_answer(case, inputs, profile)["dv"]
    z = deviations(case, results["dv"], expected)
    off = (z > LIMIT).any(-1) | (row_spreads(case, results["dv"], expected) > ALIKE)
    return {("dv", s.document) for s in call_segments(case) if off[slice(*s.keys)].any()}


def needle_inputs(case: Case) -> tuple[Inputs, dict[tuple[int, int], int]] | None:
    """The inputs, and the row of V that comes out of each row and head that sees any."""
    if (gain := needle_gain(case)) is None:
        return None
    group, coded = case.heads // case.kv_heads, needle_code(case)
    k = signs(case, "needle keys", case.kv_heads, "cpu", keys=True)
    v = signs(case, "needle values", case.kv_heads, "cpu", keys=True, values=True)
    v *= 1 + drawn(case, "needle", case.kv_heads, "cpu", keys=True, values=True).abs().clamp_max(7) / 8
    q = torch.zeros(sum(case.packed_lengths), case.heads, case.head_dim)
    picked = {}
    for segment in call_segments(case):
        for number, key in enumerate(range(*segment.keys)):
            for bit in range(coded):
                k[key, :, bit] = -1.0 if number >> bit & 1 else 1.0
        for row, seen in seen_by(case, segment):
            i = row - segment.queries.begin
            for head in range(case.heads if seen else 0):
                some = seen[pick(case, segment.document, i * 31 + head, len(seen))]
                turn = pick(case, segment.document, 11 + i * 7 + head, 4)
                picked[row, head] = (seen[0], seen[-1], seen[max(len(seen) - 2, 0)], some)[turn]
                q[row, head] = gain * k[picked[row, head], head // group]
    return of_dtype(case, q, k, v, torch.zeros(len(q), case.heads, case.value_dim)), picked


def needle_wrong(
    case: Case, inputs: Inputs, picked: dict[tuple[int, int], int], results: Results, slack: float
) -> Wrong:
    wrong: Wrong = set()
    for segment in call_segments(case):
        for row, head in ((row, head) for row in range(*segment.queries) for head in range(case.heads)):
            if (row, head) in picked:
                value = inputs.v[picked[row, head], head // (case.heads // case.kv_heads)].double()
                if not ((results["out"][row, head].double() - value).abs() <= slack * value.abs()).all():
                    wrong.add(("out", segment.document))
    return wrong


def swamped_documents(case: Case) -> list[Segment]:
    """Those whose last row sees all of many keys."""
    return [
        segment
        for segment in call_segments(case)
        if segment.keys.length >= FEWEST_KEYS
        and segment.queries.length
        and len(list(seen_by(case, segment))[-1][1]) == segment.keys.length
    ]


def large_keys(count: int) -> int:
    return min(count // 4, MOST_LARGE) // 2 * 2


def gradient_of(count: int) -> float:
    return 2.0 ** (min(math.floor(math.log2(count)), 15) - 3)


def swamping_inputs(case: Case) -> Inputs:
    """Of a case that can be swamped."""
    k, v = (
        torch.where(drawn(case, name, case.kv_heads, "cpu", keys=True, values=values) < 0.3186, 1.0, -1.0)
        for name, values in (("swamped keys", False), ("swamped values", True))
    )
    q = torch.zeros(sum(case.packed_lengths), case.heads, case.head_dim)
    dout = torch.zeros(sum(case.packed_lengths), case.heads, case.value_dim)
    for segment in swamped_documents(case):
        begin, end = segment.keys
        count, large = end - begin, large_keys(end - begin)
        sign = 1.0
        for number, key in enumerate(range(begin, end)):
            k[key, :, 1] = v[key, :, 1] = 0.0
            for x in (k, v):
                if number < large:
                    x[key] = LARGE[case.dtype]
                elif number >= count - large:
                    x[key] = -LARGE[case.dtype]
            if count % 2 and number == count // 2:
                k[key], v[key, :, 0] = 0.0, 0.0
                continue
            k[key] *= sign
            v[key, :, 0] = sign
            sign = -sign
        dout[segment.queries.end - 1, :, 0] = gradient_of(count)
    return of_dtype(case, q, k, v, dout)


def swamping_sums(case: Case, inputs: Inputs, segment: Segment, head: int, name: str) -> tuple[torch.Tensor, float]:
    """What a document's last row should be, float64 ``[channels]``, and what a single +1 is in it."""
    keys, kv_head = slice(*segment.keys), head // (case.heads // case.kv_heads)
    k, v = inputs.k[keys, kv_head].double(), inputs.v[keys, kv_head].double()
    count = segment.keys.length
    if name == "out":
        return v.sum(0) / count, 1 / count
    unit = case.softmax_scale * gradient_of(count) / count
    return unit * (v[:, :1] * k).sum(0), unit


def swamping_wrong(case: Case, inputs: Inputs, results: Results) -> Wrong:
    u, wrong = UNIT_ROUNDOFF[case.dtype], set[tuple[str, int]]()
    for segment in swamped_documents(case):
        count, large = segment.keys.length, large_keys(segment.keys.length)
        middle = count - 2 * large
        inside = 8 * u * middle + 2 * count * 2.0**-24 * (LARGE[case.dtype] * large + middle)
        for name, head in ((name, head) for name in ("out", "dq") for head in range(case.heads)):
            expected, unit = swamping_sums(case, inputs, segment, head, name)
            got = results[name][segment.queries.end - 1, head].double()
            for c in range(1 if name == "out" else 0, len(got)):
                off = abs((got[c] - got[1]) - (expected[c] - expected[1]))
                if not off <= unit * inside + 2 * u * (got[c].abs() + got[1].abs()):
                    wrong.add((name, segment.document))
    return wrong
