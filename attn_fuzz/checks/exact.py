"""Exactly the allowed keys took part, forward and backward: the probes of attn_fuzz/probes.py, judged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch

from attn_fuzz.checks.budget import LIMIT, deviations
from attn_fuzz.checks.spread import row_spreads
from attn_fuzz.execute import run_kernel
from attn_fuzz.observation import Observation
from attn_fuzz.probes import Hot, NeedleProbe, every_row_probe, needle_probe, segment_mask, uniform_probe
from attn_fuzz.symptoms import Symptom, WrongKeys, WrongKeysBackward, WrongLse
from attn_fuzz.trial import Trial
from reference.answer import Inputs
from reference.batched import kernel_answer
from reference.case import Case
from reference.layout import Segment, call_segments

_QUARTER = 0.25
"""How far from an integer ``out * n`` may be: correct kernels stay within 0.01, a wrong key moves it by 1 or more."""


_SPLIT: Final = 2.0**-18
"""Relative error of a float32 product in three TF32 ones; other keys' values differ at random."""


ALIKE: Final = 1.5
"""Equal probabilities have equal roundings: of rows whose errors are not independent more must be wrong."""


def _of_group(values: torch.Tensor, group: int) -> torch.Tensor:
    return values.repeat_interleave(group, dim=1)


def observe_probe(trial: Trial, inputs: Inputs) -> Observation:
    """A run of a probe's inputs, unwritten memory full of NaN."""
    case = trial.case
    if case.memory == "broadcast":
        # A probe's keys differ from head to head.
        case = case.replace(memory="contiguous")
    return run_kernel(trial.backend, case, inputs, "nan", trial.device)


def uniform_keys(trial: Trial) -> Iterator[Symptom]:
    """Census (forward) and support (backward) under equal scores."""
    if trial.case.level != "kernel":
        return
    probe = uniform_probe(trial.case)
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
            yield WrongKeys(
                "census",
                "out",
                f"document {segment.document}, row {row}, head {head}, channel {channel}: the sum over its "
                f"{int(counts[row])} keys is {got[row, head, channel].item():.4g}, but should be "
                f"{sums[row, head, channel].item():.0f}; {int(wrong.flatten(1).any(1).sum())} rows wrong",
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
    slack = 0.02 + 4 * 2.0**-23 * abs(score)
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
    return WrongKeysBackward(
        "support",
        name,
        f"document {document}, key {within}, head {head}, channel {channel}: {got[row, head, channel].item():.4g} "
        f"for an output gradient of one element per document, but should be {expected[row, head, channel].item():.4g}; "
        f"{int(wrong.sum())} elements wrong in {len(segments)} documents",
    )


def rows_counted(trial: Trial) -> Iterator[Symptom]:
    """dV of a gradient in every row: a key that a single row drops, adds or swaps moves every channel by about 1."""
    if trial.case.level != "kernel":
        return
    seen = _miscounted(trial)
    if seen is None or _miscounted(trial.second) is None:
        return
    row, head, got, expected, count = seen
    document, within = trial.document_of("dv", row)
    yield WrongKeysBackward(
        "every_row",
        "dv",
        f"document {document}, key {within}, head {head}: {got:.4g} for output gradients near the number of each "
        f"row's keys, but should be {expected:.4g}; {count} rows wrong",
    )


def _miscounted(trial: Trial) -> tuple[int, int, float, float, int] | None:
    """(row, head, got, expected, rows wrong) of dV, beyond the budget by element or by row."""
    case = trial.case
    inputs = every_row_probe(case)
    got = observe_probe(trial, inputs).results["dv"]
    expected = kernel_answer(case, inputs, trial.backend.kernel.profile_on(trial.device.type))["dv"]
    z = deviations(case, got, expected)
    wrong = ((z > LIMIT).any(-1)) | (row_spreads(case, got, expected) > ALIKE)
    if not wrong.any():
        return None
    row, head = (int(i) for i in wrong.nonzero()[0])
    channel = int(z[row, head].argmax())
    return row, head, got[row, head, channel].item(), expected.value[row, head, channel].item(), int(wrong.sum())


def lost_needles(case: Case, probe: NeedleProbe, out: torch.Tensor) -> torch.Tensor:
    """Rows that are not the value of the key they point at: bool ``[tokens_q, heads]``."""
    heads = torch.arange(case.heads, device=out.device) // (case.heads // case.kv_heads)
    expected = probe.inputs.v[probe.picked.clamp_min(0), heads]
    # float32 kernels may multiply in split TF32; in half precision the value comes out to the last bit.
    slack = _SPLIT * expected.abs() if case.dtype == "fp32" else 0.0
    return (~((out - expected).abs() <= slack) & (probe.picked >= 0)[..., None]).any(-1)


def needle_found(trial: Trial) -> Iterator[Symptom]:
    """Every row whose query points at one key gives that key's value, bit for bit."""
    if trial.case.level != "kernel" or (probe := needle_probe(trial.case)) is None:
        return
    case = trial.case
    observation = observe_probe(trial, probe.inputs)
    out = observation.results["out"]
    wrong = lost_needles(case, probe, out)
    if wrong.any():
        heads = torch.arange(case.heads) // (case.heads // case.kv_heads)
        row, head = (int(i) for i in wrong.nonzero()[0])
        document, within = trial.document_of("out", row)
        key = int(probe.picked[row, head])
        other = ((probe.inputs.v[:, heads[head]] - out[row, head]).abs() < 2.0**-12).all(-1).nonzero()[:, 0].tolist()
        came = f"that of key row {other[0]} came out" if other else "no key's value came out"
        yield WrongKeys(
            "needle",
            "out",
            f"document {document}, row {within}, head {head} points at key row {key}, but {came}; "
            f"{int(wrong.any(1).sum())} rows wrong",
        )
