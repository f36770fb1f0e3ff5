"""Exactly the allowed keys took part, forward and backward: known answers (oracle/known_answer), told in sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import torch

from attn_fuzz.execution.observation import Observation
from attn_fuzz.oracle.known_answer.census import Census
from attn_fuzz.oracle.known_answer.common_factor import keys_weigh_otherwise, weighs_otherwise
from attn_fuzz.oracle.known_answer.compared import Compared, KnownAnswer, Wrong
from attn_fuzz.oracle.known_answer.every_row import HALF_A_KEY, EveryRow
from attn_fuzz.oracle.known_answer.needle import Needle
from attn_fuzz.oracle.symptoms import Place, Symptom, wrong_tensor
from attn_fuzz.oracle.trial import Trial

CPU: Final = torch.device("cpu")
"""Where all checks run (oracle/trial.py)."""

_WEIGHTS: Final = "; every wrong row has the right keys, with a common factor: as of a rounded LSE or normaliser"


def observe_known(trial: Trial, known: KnownAnswer) -> Observation:
    """A run of a known answer's inputs, unwritten memory full of NaN; the trial notes what it writes to."""
    if trial.case.memory == "broadcast":
        # These keys differ from head to head.
        trial = dataclasses.replace(trial, case=trial.case.replace(memory="contiguous"))
    return trial.observe_with(known.inputs, "nan")


def uniform_keys(trial: Trial) -> Iterator[Symptom]:
    """Census (forward) and support (backward) under equal scores."""
    if trial.case.level != "kernel":
        return
    census = Census.of(trial.case, CPU, trial.profile)
    tell = {"out": _census, "lse": _row_sums, "dv": _support, "dk": _support, "dq": _noise}
    for compared in census.judge(observe_known(trial, census).results):
        if (wrong := compared.first()) is not None:
            yield tell[compared.tensor](census, compared, wrong)


def _accuse(
    check: str, known: KnownAnswer, compared: Compared, wrong: Wrong, sentence: str, *, weights: bool = False
) -> Symptom:
    """What a result is accused of: NaN, and weights that are off, say nothing about which keys took part."""
    kind = wrong_tensor(compared.tensor) if weights or wrong.element.nan else known.symptoms[compared.tensor]
    return kind(check, compared.tensor, sentence, element=wrong.element)


def _of_keys(place: Place) -> str:
    """A place on the side of the keys, in words."""
    channel = "" if place.channel is None else f", channel {place.channel}"
    return f"document {place.document}, key {place.row}, head {place.head}{channel}"


def _census(census: Census, compared: Compared, wrong: Wrong) -> Symptom:
    element = wrong.element
    ours = compared.document == compared.document[wrong.index[0]]
    counts = census.counts[ours][:, None, None]
    own, count = compared.rows(ours), int(census.counts[wrong.index[0]])
    weights = weighs_otherwise(own.got * counts, (own.expected * counts).round(), own.wrong)
    sentence = (
        f"{element.place}: the sum over its {count} keys is {element.got * max(count, 1):.4g}, but should be "
        f"{element.expected * count:.0f}; {int(own.wrong.flatten(1).any(1).sum())} rows wrong"
    )
    return _accuse("census", census, compared, wrong, sentence + _WEIGHTS * weights, weights=weights)


def _row_sums(census: Census, compared: Compared, wrong: Wrong) -> Symptom:
    element = wrong.element
    own = compared.rows(compared.document == compared.document[wrong.index[0]])
    sentence = (
        f"{element.place}: got {element.got:.6g} for equal scores, but should be {element.expected:.6g}; "
        f"{int(own.wrong.sum())} rows wrong"
    )
    return _accuse("census", census, compared, wrong, sentence)


def _support(census: Census, compared: Compared, wrong: Wrong) -> Symptom:
    element, all_wrong = wrong.element, compared.wrong
    weights = keys_weigh_otherwise(compared)
    documents = compared.document[all_wrong.flatten(1).any(1)].unique()
    sentence = (
        f"{_of_keys(element.place)}: {element.got:.4g} for an output gradient of one element per document, but should "
        f"be {element.expected:.4g}; {int(all_wrong.sum())} elements wrong in {len(documents)} documents"
    )
    return _accuse("support", census, compared, wrong, sentence + _WEIGHTS * weights, weights=weights)


def _noise(census: Census, compared: Compared, wrong: Wrong) -> Symptom:
    place = dataclasses.replace(wrong.element.place, channel=None)
    return _accuse("support", census, compared, wrong, f"{place} has a gradient, but its output has none")


def rows_counted(trial: Trial) -> Iterator[Symptom]:
    """dV of a gradient in every row: a key that a single row drops, adds or swaps moves every channel by about 1."""
    if trial.case.level != "kernel":
        return
    seen = _miscounted(trial)
    if seen is None or _miscounted(trial.second) is None:
        return
    known, compared, wrong = seen
    element, rows = wrong.element, compared.wrong.any(-1)
    off = (compared.got[rows] - compared.expected[rows]).abs()
    weights = bool((off < HALF_A_KEY).all())
    sentence = (
        f"{_of_keys(dataclasses.replace(element.place, channel=None))}: {element.got:.4g} for output gradients near "
        f"the number of each row's keys, but should be {element.expected:.4g}; {int(rows.sum())} rows wrong"
        f"{', by less than half a key each: a matter of weights' if weights else ''}"
    )
    yield _accuse("every_row", known, compared, wrong, sentence, weights=weights)


def _miscounted(trial: Trial) -> tuple[EveryRow, Compared, Wrong] | None:
    """What is beyond the budget, by element or by row."""
    known = EveryRow.of(trial.case, CPU, trial.profile)
    compared = Compared.joined(list(known.judge(observe_known(trial, known).results)))
    wrong = compared.first()
    return None if wrong is None else (known, compared, wrong)


def needle_found(trial: Trial) -> Iterator[Symptom]:
    """Every row whose query points at one key gives that key's value, bit for bit."""
    if trial.case.level != "kernel" or (known := Needle.of(trial.case, CPU, trial.profile)) is None:
        return
    (compared,) = known.judge(observe_known(trial, known).results)
    if (wrong := compared.first()) is None:
        return
    row, head, *_ = wrong.index
    key = known.key_of(compared.got[row, head], head)
    came = f"that of key row {key} came out" if key is not None else "no key's value came out"
    sentence = (
        f"{dataclasses.replace(wrong.element.place, channel=None)} points at key row {int(known.picked[row, head])}, "
        f"but {'NaN came out' if wrong.element.nan else came}; {int(compared.wrong.flatten(1).any(1).sum())} rows wrong"
    )
    yield _accuse("needle", known, compared, wrong, sentence)
