"""A campaign of the command line: from options to what is printed and the exit status."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import typer

from attn_fuzz.backends import registry
from attn_fuzz.campaign.limits import Limit, LimitsFound, finding_of, infer_limits
from attn_fuzz.campaign.messages import Tally
from attn_fuzz.campaign.plan import (
    CampaignOptions,
    aims_of,
    plan,
    require_available,
    takes_batches,
)
from attn_fuzz.campaign.pool import Outcome, Pool
from attn_fuzz.campaign.ranks_taken import require_ranks
from attn_fuzz.cli import tables
from attn_fuzz.cli.arguments import (
    DEFAULT_SECONDS,
    UsageError,
)
from attn_fuzz.cli.counted import never_asked
from attn_fuzz.cli.terminal import Screen, progress_console, results_console
from attn_fuzz.execution.environment import environment
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.ledger import Ledger
from attn_fuzz.findings.store import Store, StoreError
from attn_fuzz.ranks.client import MAX_RANKS


def campaign_dict(outcome: Outcome, device: str, seed: int, poisons: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a campaign, but for its verdict (attn_fuzz/verdict.schema.json)."""
    return {
        "cases": sum(tally.cases for tally in outcome.tallies.values()),
        "documents": sum(tally.documents for tally in outcome.tallies.values()),
        "seconds": round(outcome.seconds, 3),
        "seed": seed,
        "poisons": list(poisons),
        "interrupted": outcome.interrupted,
        "troubles": list(outcome.troubles),
        "environment": environment(device),
        "backends": {
            name: {
                "cases": tally.cases,
                "documents": tally.documents,
                "straddling": tally.straddling,
                "refused": tally.refused,
                "repeated": tally.repeated,
                "warm_up_seconds": round(tally.warm_up_seconds, 1),
                "compiling_seconds": round(tally.compiling_seconds, 1),
                "by_configuration": dict(sorted(tally.by_configuration.items())),
                "by_kind": dict(sorted(tally.by_kind.items())),
                "paths": tally.paths,
                "known": tally.known,
                "counted": dict(sorted(tally.counted.items())),
                "histograms": dict(sorted(tally.histograms.items())),
                "worst_z": {key: round(z, 3) for key, z in sorted(tally.worst_z.items())},
                "worst_case": {key: json.loads(tally.worst_case[key]) for key in sorted(tally.worst_z)},
            }
            for name, tally in outcome.tallies.items()
        },
        "findings": [finding.to_dict() for finding in outcome.findings],
    }


@dataclasses.dataclass(frozen=True)
class Told:
    """Where results go, and what counts as one."""

    store: Path
    as_json: bool
    min_cases: int
    """Cases below which a backend counts as not tested."""
    strict: bool | None = None
    """Of a user's backend, whether limits are findings; None for one of ours, which is not asked for any."""


def _require_sense(names: tuple[str, ...], options: CampaignOptions) -> None:
    """Raises UsageError for what no campaign can do."""
    if options.seconds is not None and options.cases is not None:
        raise UsageError("--seconds and --cases exclude each other; give one of them")
    if options.seconds is not None and math.isnan(options.seconds):
        raise UsageError("--seconds must be a number")
    require_available(names, options.device, options.dtypes)
    for name in names:
        if not set(options.levels) & set(offered := registry.load(name).levels):
            raise UsageError(f"{name} has no {' or '.join(options.levels)} level; use --level {' or '.join(offered)}")
        require_ranks(name, options.ranks, options.tensor_ranks)
    together = max(options.ranks) * max(options.tensor_ranks)
    if together > MAX_RANKS:
        raise UsageError(f"--ranks and --tensor-ranks make {together} ranks, each a process; {MAX_RANKS} are the most")


def _that_take_batches(names: tuple[str, ...], options: CampaignOptions, *, named: bool) -> tuple[str, ...]:
    """The backends of a campaign; of batches alone, without those that take none and that were not asked for by name.

    Raises:
        UsageError: when one that was asked for takes none, or none is left.
    """
    if options.modes != ("batch",):
        return names
    ranks = options.ranks, options.tensor_ranks
    taking = tuple(name for name in names if takes_batches(name, options.levels, *ranks))
    kept = names if named else taking
    if not kept or taking != kept:
        raise UsageError(
            "batches are of kernel calls, and of calls of layers with a backward (docs/modes.md): they need a backend "
            "that has such a level"
        )
    return kept


def _that_have_aims(
    names: tuple[str, ...], options: CampaignOptions, without: Mapping[str, Any], *, named: bool
) -> tuple[str, ...]:
    """The backends of a campaign without those that have no case with what is aimed at, which is said of each.

    Raises:
        UsageError: when one that was asked for has none, or none is left.
    """
    if not options.aim:
        return names
    if max(options.tensor_ranks) > 1 and any(axis == "group" for axis, _ in options.aim):
        raise UsageError("--tensor-ranks decide about heads: leave --aim group out")
    whys = {name: aims_of(name, options, without).why_not(options.modes) for name in names}
    sentences = [f"backend {name} has no case with {why}" for name, why in whys.items() if why is not None]
    if sentences and (named or len(sentences) == len(names)):
        raise UsageError(sentences[0])
    for sentence in sentences:
        typer.echo(f"attn-fuzz: {sentence}, so it is left out", err=True)
    return tuple(name for name, why in whys.items() if why is None)


class Keeper:
    """Writes the findings of a campaign to a store, linked to those that are the same bug.

    Args:
        store: where.

    Raises:
        StoreError: when it cannot be written to.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        store.prepare()
        self.kept: dict[tuple[str, str], Finding] = {}
        """By backend and symptom, of which a campaign reports one."""

    def as_kept(self, finding: Finding) -> Finding:
        """A finding as it is kept: with the folder of its kernel, and the earlier one that is the same bug."""
        kept = self.kept.get((finding.backend, finding.symptom))
        return kept if kept is not None and kept.id == finding.id else self.store.placed(finding)

    def keep(self, finding: Finding) -> None:
        """Writes a finding; one of this campaign in whose place it comes is linked to it.

        Raises:
            StoreError: when it cannot be written.
        """
        key = finding.backend, finding.symptom
        placed, before = self.store.placed(finding), self.kept.get(key)
        # A smaller case of the same: what was the same as an earlier campaign's is so still.
        now = self.store.linked(placed) if before is None else dataclasses.replace(placed, same_as=before.same_as)
        self.kept[key] = now
        self.store.save(now)
        if before is not None and before.id != now.id:
            self.store.save(dataclasses.replace(before, same_as=now.same_as or now.id))
        Ledger(self.store.folder).note(now, instead_of=before)


def fuzz(names: tuple[str, ...], options: CampaignOptions, told: Told, *, named: bool = True) -> None:
    """A campaign from options to exit status.

    Args:
        names: backends.
        options: what is asked for.
        told: where results go.
        named: these very backends were asked for.
    """
    _require_sense(names, options)
    names = _that_take_batches(names, options, named=named)
    if told.strict is None:
        names = _that_have_aims(names, options, {}, named=named)
    keeper = Keeper(Store(told.store))
    if options.cases is None and options.seconds is None:
        options = dataclasses.replace(options, seconds=DEFAULT_SECONDS)
    found_out = LimitsFound() if told.strict is None else _found_out(names[0], options)
    if told.strict is not None and found_out.fatal is None:
        names = _that_have_aims(names, options, found_out.without, named=named)
    # Of a kernel that no process survives there is nothing more to say.
    assignments = plan(names, options, found_out.without) if found_out.fatal is None else []
    unstored: list[StoreError] = []
    with Screen(names, assignments[0].seconds if assignments else None, options.cases) as screen:

        def keep(finding: Finding) -> None:
            screen.found(finding)
            try:
                keeper.keep(finding)
            except StoreError as error:
                # The campaign goes on; the finding is printed at the end in any case.
                unstored.append(error)

        known = (*((found_out.fatal,) if found_out.fatal else ()), *(found_out.limits if told.strict else ()))
        forbidden = [finding_of(limit, names[0], options.device) for limit in known]
        for finding in forbidden:
            keep(finding)
        outcome = (
            Pool(assignments, options.workers, screen.update, keep, options.seconds, screen.ended).run()
            if assignments
            else Outcome({names[0]: Tally(cases=1)}, [])
        )
    outcome.findings[:] = [keeper.as_kept(finding) for finding in (*forbidden, *outcome.findings)]
    outcome.troubles = (*(str(error) for error in unstored), *outcome.troubles)
    untested = _untested(outcome, told.min_cases)
    if not outcome.findings:
        untested += never_asked(options.asked, [tally.counted for tally in outcome.tallies.values()])
    status = 2 if outcome.troubles else 1 if outcome.findings else UNTESTED if untested else 0
    if told.as_json:
        data = campaign_dict(outcome, options.device, options.seed, options.poisons)
        limits = [limit.to_dict() for limit in found_out.limits]
        typer.echo(json.dumps({"verdict": VERDICTS[status], **data, "untested": untested, "limits": limits}))
    else:
        _print(outcome, options, told, found_out)
    for trouble in (*outcome.troubles, *untested):
        typer.echo(f"attn-fuzz: {trouble}", err=True)
    raise typer.Exit(status)


UNTESTED: Final = 3
"""Exit status where nothing was found, because nothing, or too little, was tested."""

VERDICTS: Final = {0: "clean", 1: "findings", 2: "trouble", UNTESTED: "untested"}
"""By exit status, as the JSON object says it."""


def _print(outcome: Outcome, options: CampaignOptions, told: Told, found_out: LimitsFound) -> None:
    """What came of a campaign, for people."""
    console = results_console()
    tables.print_campaign(console, outcome)
    tables.print_limits(console, found_out.limits)
    tables.print_findings(console, outcome.findings, str(told.store))
    console.print(f"seed {options.seed}" + (", interrupted" if outcome.interrupted else ""))
    if not outcome.findings and not outcome.interrupted:
        console.print(_next_step(next(iter(outcome.tallies))), markup=False, soft_wrap=True)


def _next_step(name: str) -> str:
    """What a user does after a campaign of this backend without findings."""
    own = registry.users(name)
    if own is None:
        return "next: attn-fuzz check FILE.py:FUNCTION tests a kernel of yours, check-layer FILE.py:CLASS a layer"
    if registry.USER_LAYER in own.prefix:
        return "next: other seeds draw other cases (--seed), and --ranks spreads the layer over processes"
    return f"next: attn-fuzz init {own.place}:{own.attribute} keeps it under test in your repository"


def _untested(outcome: Outcome, min_cases: int) -> list[str]:
    """Why a campaign without findings is no pass: one sentence for each reason."""
    said = []
    for name, tally in outcome.tallies.items():
        if tally.refused and not tally.cases:
            said.append(f"{name} took none of the {tally.refused} cases drawn for it, so nothing was tested")
        elif tally.cases < min_cases:
            said.append(f"{name} was tested with {tally.cases} cases, fewer than the {min_cases} of --min-cases")
    if outcome.interrupted:
        cases = sum(tally.cases for tally in outcome.tallies.values())
        said.append(f"interrupted after {cases} cases, so the campaign is no pass")
    return said


def _found_out(name: str, options: CampaignOptions) -> LimitsFound:
    """What a user's kernel takes of what it declares; told while it is found out."""

    def tell(limit: Limit) -> None:
        progress_console.print(f"limit found: {limit.axis} {limit.how}", markup=False, soft_wrap=True)

    progress_console.print(f"asking what {name} takes", markup=False, soft_wrap=True)
    return infer_limits(name, options.device, options.dtypes, options.workers, tell)
