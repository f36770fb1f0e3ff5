"""What ``attn-fuzz campaign`` has counted in its database, as a report takes it."""

from __future__ import annotations

import json

from attn_fuzz.nights import totals
from attn_fuzz.nights.database import Database
from attn_fuzz.reports.measured import Counted, Measured, Piece, versions_in_words


def of_database(database: Database) -> Measured:
    """All campaigns of a database together.

    Args:
        database: open.

    Raises:
        DatabaseError: when it cannot be read.
    """
    subjects = totals.subjects(database)
    names = [name for name, _ in subjects]

    def called(name: str, kind: str) -> str:
        return name if names.count(name) == 1 else f"{name} on {kind}"

    kinds, largest = totals.counted(database, "kind"), totals.largest(database)
    verdicts = totals.verdicts(database)
    counted = []
    for subject in subjects:
        mine = [each for each in verdicts if (each.backend, each.device.partition(":")[0]) == subject]
        worst = [(z, key[2]) for key, (z, _) in largest.items() if key[:2] == subject]
        worst_z, where = max(worst, default=(0.0, ""))
        counted.append(
            Counted(
                called(*subject),
                cases=sum(each.cases for each in mine),
                documents=sum(each.documents for each in mine),
                refused=sum(each.refused for each in mine),
                known=sum(each.known for each in mine),
                worst_z=worst_z,
                where=where,
                kinds={key[2]: cases for key, cases in sorted(kinds.items()) if key[:2] == subject},
            )
        )
    slices = totals.throughput(database)
    begin = min((each.begin for each in slices), default=0.0)
    return Measured(
        tuple(counted),
        {(called(name, kind), what): counts for (name, kind, what), counts in totals.histograms(database).items()},
        {called(*subject): totals.lengths_of(database, *subject) for subject in subjects},
        tuple(
            Piece(each.begin - begin, each.seconds, called(each.backend, each.device.partition(":")[0]), each.cases)
            for each in slices
        ),
        max((each.begin + each.seconds for each in slices), default=begin) - begin,
        tuple(dict.fromkeys(versions_in_words(json.loads(text)) for text in totals.environments(database))),
    )
