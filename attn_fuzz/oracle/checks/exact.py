"""Exactly the allowed keys took part, forward and backward: the probes of known_answer/inputs.py, judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch

from attn_fuzz.execution.observation import Observation
from attn_fuzz.oracle.deviations import LIMIT, deviations, row_spreads
from attn_fuzz.oracle.known_answer.inputs import (
    Hot,
    NeedleProbe,
    every_row_probe,
    needle_probe,
    segment_mask,
    uniform_probe,
)
from attn_fuzz.oracle.known_answer.slack import in_fp16, needle_slack, support_slack
from attn_fuzz.oracle.symptoms import Symptom, WrongKeys, WrongKeysBackward, WrongLse, wrong_tensor
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Inputs
from attn_fuzz.reference.batched import kernel_answer
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layout import Segment, call_segments

_QUARTER = 0.25
"""How far from an integer ``out * n`` may be: correct kernels stay within 0.01, a wrong key moves it by 1 or more."""


ALIKE: Final = 1.5
"""Equal probabilities have equal roundings: of rows whose errors are not independent more must be wrong."""


def _of_group(values: torch.Tensor, group: int) -> torch.Tensor:
    return values.repeat_interleave(group, dim=1)


def observe_probe(trial: Trial, inputs: Inputs) -> Observation:
    """A run of a probe's inputs, unwritten memory full of NaN; the trial notes what it writes to."""
    if trial.case.memory == "broadcast":
        # A probe's keys differ from head to head.
        trial = dataclasses.replace(trial, case=trial.case.replace(memory="contiguous"))
    return trial.observe_with(inputs, "nan")


def uniform_keys(trial: Trial) -> Iterator[Symptom]:
    """Census (forward) and support (backward) under equal scores."""
    if trial.case.level != "kernel":
        return
    probe = uniform_probe(trial.case, fp16=in_fp16(trial.case, trial.profile))
    observation = observe_probe(trial, probe.inputs)
    yield from _census(trial, observation, probe.inputs.v.double())
    yield from _row_sums(trial, observation, probe.shift)
    yield from _support(trial, observation, probe.hot, probe.shift * trial.case.softmax_scale)


def census_sees(out: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Which elements are not the mean of their row's values.

    Args:
        out: ``[rows, heads, d]`` float64.
        counts: ``[rows]``, keys of each row.
        sums: as ``out``: whole numbers, the sum of V over those keys.
    """
    return ~((out * counts.clamp_min(1)[:, None, None] - sums).abs() < _QUARTER)


def weighs_otherwise(got: torch.Tensor, sums: torch.Tensor, wrong: torch.Tensor) -> bool:
    """Whether every wrong row is the right keys' sum times a factor of its own: a matter of weights, not of keys.

    A normaliser or an LSE that is rounded scales a row as a whole. A key too many, too few or another one changes
    channels by +-1, each by itself.

    Args:
        got: ``[rows, heads, d]`` float64, the sums that came out.
        sums: as ``got``; whole numbers, what they should be.
        wrong: as ``got``, bool; some are.
    """
    rows = wrong.any(-1)
    got, sums = got[rows], sums[rows]
    factor = (got * sums).sum(-1, keepdim=True) / sums.square().sum(-1, keepdim=True)
    low, high = _FACTORS
    same = ((got - factor * sums).abs() < _QUARTER).all(-1) & (sums != 0).sum(-1).ge(_TELLING)
    return bool((same & (factor[..., 0] > low) & (factor[..., 0] < high)).all())


_FACTORS: Final = (0.75, 1.5)
"""Between these a common factor is an error of weights; beyond, keys are missing or counted twice."""

_TELLING: Final = 4
"""Channels that are not 0: of so many +-1 another key differs in one or more, but once in 16 times."""

_WEIGHTS: Final = "; every wrong row has the right keys, with a common factor: as of a rounded LSE or normaliser"


def _accused(name: str, got: float, otherwise: type[Symptom], *, weights: bool = False) -> type[Symptom]:
    """What a result is accused of: NaN, and weights that are off, say nothing about which keys took part."""
    return wrong_tensor(name) if weights or math.isnan(got) else otherwise


def _census(trial: Trial, observation: Observation, v: torch.Tensor) -> Iterator[Symptom]:
    case = trial.case
    group = case.heads // case.kv_heads
    out = observation.results["out"].double()
    for segment in call_segments(case):
        if not segment.queries.length:
            continue
        mask = segment_mask(case, segment)
        counts = mask.sum(1)
        # One prefix sum instead of a product: allowed keys are a run.
        sums = torch.einsum("qk,khd->qhd", mask.double(), _of_group(v[slice(*segment.keys)], group))
        rows = out[slice(*segment.queries)]
        wrong = census_sees(rows, counts, sums)
        if wrong.any():
            got = rows * counts.clamp_min(1)[:, None, None]
            row, head, channel = (int(i) for i in wrong.nonzero()[0])
            weights = weighs_otherwise(got, sums, wrong)
            yield _accused("out", got[row, head, channel].item(), WrongKeys, weights=weights)(
                "census",
                "out",
                f"document {segment.document}, row {row}, head {head}, channel {channel}: the sum over its "
                f"{int(counts[row])} keys is {got[row, head, channel].item():.4g}, but should be "
                f"{sums[row, head, channel].item():.0f}; {int(wrong.flatten(1).any(1).sum())} rows wrong"
                f"{_WEIGHTS if weights else ''}",
                nan=bool(got[row, head, channel].isnan()),
            )
            return


def _row_sums(trial: Trial, observation: Observation, shift: float) -> Iterator[Symptom]:
    """The LSE of n equal scores is that score plus log n; of none, -inf."""
    case = trial.case
    if (lse := observation.results.get("lse")) is None or lse.shape != (sum(case.packed_lengths), case.heads):
        return
    score = shift * case.softmax_scale
    if case.softcap:
        score = case.softcap * math.tanh(score / case.softcap)
    for segment in call_segments(case):
        expected = segment_mask(case, segment).sum(1).double().log() + score
        got = lse[slice(*segment.queries)].double()
        # float32 around a score of this size, and around the fast logarithms and hyperbolic tangents of GPUs.
        slack = 1e-3 + 2.0**-10 * abs(score) * bool(case.softcap) + 2.0**-20 * abs(score)
        wrong = ~((got - expected[:, None]).abs() <= slack) & (got != expected[:, None])
        if wrong.any():
            row, head = (int(i) for i in wrong.nonzero()[0])
            yield WrongLse(
                "census",
                "lse",
                f"document {segment.document}, row {row}, head {head}: got {got[row, head].item():.6g} for equal "
                f"scores, but should be {expected[row].item():.6g}; {int(wrong.sum())} rows wrong",
            )
            return


def _support(trial: Trial, observation: Observation, hot: dict[int, Hot], score: float) -> Iterator[Symptom]:
    case = trial.case
    group = case.heads // case.kv_heads
    expected = torch.zeros_like(observation.results["dv"], dtype=torch.float64)
    silent = torch.ones(sum(case.packed_lengths), case.heads, dtype=torch.bool)
    for segment in call_segments(case):
        if (place := hot.get(segment.document)) is None:
            continue
        silent[segment.queries.begin + place.row, place.head] = False
        seen = segment_mask(case, segment)[place.row]
        if count := int(seen.sum()):
            rows = torch.arange(*segment.keys)[seen]
            expected[rows, place.head // group, place.channel] = 1.0 / count
    got = observation.results["dv"].double()
    # Equal to a rounding or three, and to what float32 makes of exp(score - lse); exactly 0 where no weight is.
    slack = support_slack(case, trial.profile, score)
    wrong = torch.where(expected == 0, got != 0, ~((got - expected).abs() <= slack * expected))
    if wrong.any():
        yield _backward_symptom(trial, "dv", got, expected, wrong, call_segments(case))
    dk = observation.results["dk"]
    if score:
        # The channel that makes the score has a gradient, on the keys of the hot rows.
        dk = dk.clone()
        dk[..., 0] = torch.where((expected != 0).any(-1), 0.0, dk[..., 0])
    if (dk != 0).any():
        yield _backward_symptom(trial, "dk", dk.double(), torch.zeros_like(expected), dk != 0, call_segments(case))
    noisy = (observation.results["dq"] != 0).any(-1) & silent
    if noisy.any():
        row, head = (int(i) for i in noisy.nonzero()[0])
        document, within = trial.document_of("dq", row)
        yield WrongKeysBackward(
            "support", "dq", f"document {document}, row {within}, head {head} has a gradient, but its output has none"
        )


def _backward_symptom(
    trial: Trial,
    name: str,
    got: torch.Tensor,
    expected: torch.Tensor,
    wrong: torch.Tensor,
    segments: tuple[Segment, ...],
) -> Symptom:
    row, head, channel = (int(i) for i in wrong.nonzero()[0])
    document, within = trial.document_of(name, row)
    weights = _weighs_keys_otherwise(got, expected, segments)
    number = got[row, head, channel].item()
    return _accused(name, number, WrongKeysBackward, weights=weights)(
        "support",
        name,
        f"document {document}, key {within}, head {head}, channel {channel}: {number:.4g} "
        f"for an output gradient of one element per document, but should be {expected[row, head, channel].item():.4g}; "
        f"{int(wrong.sum())} elements wrong in {len(segments)} documents{_WEIGHTS if weights else ''}",
        nan=math.isnan(number),
    )


def _weighs_keys_otherwise(got: torch.Tensor, expected: torch.Tensor, segments: tuple[Segment, ...]) -> bool:
    """Whether the keys of each document's hot row have weights that are off by a factor which they have in common.

    A key that does not take part has 0, one too many has something, and what is left of the others is 1 / (n - 1).
    """
    if got[expected == 0].any():
        return False
    for segment in segments:
        keys = slice(*segment.keys)
        ratio = (got[keys] / expected[keys])[expected[keys] != 0]
        if ratio.numel() and not (ratio.min() > 0 and ratio.max() < _ALIKE_WEIGHTS * ratio.min()):
            return False
    return True


_ALIKE_WEIGHTS: Final = 1.1


def rows_counted(trial: Trial) -> Iterator[Symptom]:
    """dV of a gradient in every row: a key that a single row drops, adds or swaps moves every channel by about 1."""
    if trial.case.level != "kernel":
        return
    seen = _miscounted(trial)
    if seen is None or _miscounted(trial.second) is None:
        return
    document, within = trial.document_of("dv", seen.row)
    yield _accused("dv", seen.got, WrongKeysBackward, weights=seen.weights)(
        "every_row",
        "dv",
        f"document {document}, key {within}, head {seen.head}: {seen.got:.4g} for output gradients near the number of "
        f"each row's keys, but should be {seen.expected:.4g}; {seen.rows} rows wrong"
        f"{', by less than half a key each: a matter of weights' if seen.weights else ''}",
        nan=math.isnan(seen.got),
    )


class _Miscounted(NamedTuple):
    """dV of a gradient in every row that is beyond its budget."""

    row: int
    head: int
    got: float
    expected: float
    rows: int
    """How many are wrong."""
    weights: bool
    """No element is off by half of what a key is, which moves every channel by 0.7 to 1.4."""


def _miscounted(trial: Trial) -> _Miscounted | None:
    """What is beyond the budget, by element or by row."""
    case = trial.case
    inputs = every_row_probe(case)
    got = observe_probe(trial, inputs).results["dv"]
    expected = kernel_answer(case, inputs, trial.profile)["dv"]
    z = deviations(case, got, expected)
    wrong = ((z > LIMIT).any(-1)) | (row_spreads(case, got, expected) > ALIKE)
    if not wrong.any():
        return None
    row, head = (int(i) for i in wrong.nonzero()[0])
    channel = int(z[row, head].argmax())
    off = (got[wrong].double() - expected.value[wrong]).abs()
    return _Miscounted(
        row=row,
        head=head,
        got=got[row, head, channel].item(),
        expected=expected.value[row, head, channel].item(),
        rows=int(wrong.sum()),
        weights=bool((off < _HALF_A_KEY).all()),
    )


_HALF_A_KEY: Final = 0.5


def lost_needles(case: Case, probe: NeedleProbe, out: torch.Tensor, relative: float) -> torch.Tensor:
    """Rows that are not the value of the key they point at: bool ``[tokens_q, heads]``.

    ``relative`` is how far they may be from it (``slack.needle_slack``): in half precision usually not a bit.
    """
    heads = torch.arange(case.heads, device=out.device) // (case.heads // case.kv_heads)
    expected = probe.inputs.v[probe.picked.clamp_min(0), heads]
    slack = relative * expected.abs() if relative else 0.0
    return (~((out - expected).abs() <= slack) & (probe.picked >= 0)[..., None]).any(-1)


def needle_found(trial: Trial) -> Iterator[Symptom]:
    """Every row whose query points at one key gives that key's value, bit for bit."""
    case, slack = trial.case, needle_slack(trial.case, trial.profile)
    if case.level != "kernel" or not math.isfinite(slack) or (probe := needle_probe(case)) is None:
        return
    observation = observe_probe(trial, probe.inputs)
    out = observation.results["out"]
    wrong = lost_needles(case, probe, out, slack)
    if wrong.any():
        heads = torch.arange(case.heads) // (case.heads // case.kv_heads)
        row, head = (int(i) for i in wrong.nonzero()[0])
        document, within = trial.document_of("out", row)
        key = int(probe.picked[row, head])
        other = ((probe.inputs.v[:, heads[head]] - out[row, head]).abs() < 2.0**-12).all(-1).nonzero()[:, 0].tolist()
        nan = bool(out[row, head].isnan().any())
        came = f"that of key row {other[0]} came out" if other else "NaN came out" if nan else "no key's value came out"
        yield _accused("out", math.nan if nan else 0.0, WrongKeys)(
            "needle",
            "out",
            f"document {document}, row {within}, head {head} points at key row {key}, but {came}; "
            f"{int(wrong.any(1).sum())} rows wrong",
            nan=nan,
        )
