"""Float32 sums over keys: outputs and dQ whose running sums are far larger than they (known_answer/swamping.py)."""

from __future__ import annotations

from collections.abc import Iterator

from attn_fuzz.oracle.checks.exact import observe_probe
from attn_fuzz.oracle.known_answer.slack import stores_dq, weight_error
from attn_fuzz.oracle.known_answer.swamping import Sized, beside, sums_of, swamped, swamping_probe
from attn_fuzz.oracle.symptoms import NotExact, Symptom
from attn_fuzz.oracle.trial import Trial


def sums_not_swamped(trial: Trial) -> Iterator[Symptom]:
    """The last row of each long document holds the whole sum over its keys, forward and backward."""
    case = trial.case
    if (probe := swamping_probe(case)) is None:
        return
    stored, error = stores_dq(case, trial.profile), weight_error(case, trial.profile)
    results = observe_probe(trial, probe.inputs).results
    accused = set[str]()
    for document in probe.swamped:
        row = document.segment.queries.end - 1
        for name, (expected, unit) in sums_of(case, probe, document).items():
            if name in accused or (name == "dq" and stored):
                continue
            got = results[name][row].double()
            wrong = swamped(case, name, Sized(document.count, document.large, unit), error, got, expected)
            if not wrong.any():
                continue
            accused.add(name)
            moved, should = beside(got), beside(expected)
            head, channel = (int(i) for i in wrong.nonzero()[0])
            _, within = trial.document_of(name, row)
            yield NotExact(
                "swamping",
                name,
                f"document {document.segment.document}, row {within}, head {head}, channel {channel}: the small ones "
                f"of {document.count} keys, beside large ones that cancel, add up to "
                f"{moved[head, channel].item() / unit:.4g} instead of {should[head, channel].item() / unit:.0f}; "
                f"{int(wrong.sum())} elements wrong",
            )
