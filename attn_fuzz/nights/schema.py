"""The tables of a campaign database, as steps from each version to the next; the last is today's."""

from __future__ import annotations

from typing import Final

STEPS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE campaigns (
        id INTEGER PRIMARY KEY,
        seed INTEGER NOT NULL,
        begin REAL NOT NULL,         -- seconds since 1970
        planned REAL,                -- seconds, and none where it goes on until it is told to end
        ended REAL,                  -- none where nobody could say so
        version TEXT NOT NULL,
        environment TEXT NOT NULL    -- JSON: device, versions, commit
    );
    CREATE TABLE subjects (
        id INTEGER PRIMARY KEY,
        backend TEXT NOT NULL,
        kind TEXT NOT NULL,          -- cpu or cuda
        UNIQUE (backend, kind)
    );
    CREATE TABLE targets (
        id INTEGER PRIMARY KEY,
        subject INTEGER NOT NULL REFERENCES subjects (id),
        device TEXT NOT NULL,
        level TEXT NOT NULL,
        mode TEXT NOT NULL,
        UNIQUE (subject, device, level, mode)
    );
    CREATE TABLE slices (            -- one worker's work of some seconds
        id INTEGER PRIMARY KEY,
        campaign INTEGER NOT NULL REFERENCES campaigns (id),
        target INTEGER NOT NULL REFERENCES targets (id),
        seed INTEGER NOT NULL,
        aim TEXT NOT NULL,           -- JSON: values of axes that draws were to have
        begin REAL NOT NULL,
        seconds REAL NOT NULL,
        cases INTEGER NOT NULL,
        documents INTEGER NOT NULL,
        straddling INTEGER NOT NULL,
        refused INTEGER NOT NULL,
        repeated INTEGER NOT NULL,
        known INTEGER NOT NULL,
        findings INTEGER NOT NULL,
        worst_z REAL NOT NULL,
        fresh INTEGER NOT NULL       -- pairs of values that the subject had never reached
    );
    CREATE INDEX slices_of_target ON slices (target);
    CREATE TABLE found (
        campaign INTEGER NOT NULL REFERENCES campaigns (id),
        target INTEGER REFERENCES targets (id),
        finding TEXT NOT NULL,       -- its id in the store
        symptom TEXT NOT NULL,
        at REAL NOT NULL,            -- when it was seen first
        times INTEGER NOT NULL,
        PRIMARY KEY (campaign, finding)
    );
    CREATE TABLE axis_values (
        id INTEGER PRIMARY KEY,
        axis TEXT NOT NULL,
        value TEXT NOT NULL,
        UNIQUE (axis, value)
    );
    CREATE TABLE pairs (             -- a and b alike: of a value by itself
        subject INTEGER NOT NULL,
        a INTEGER NOT NULL,
        b INTEGER NOT NULL,
        cases INTEGER NOT NULL,
        PRIMARY KEY (subject, a, b)
    ) WITHOUT ROWID;
    CREATE TABLE lengths (           -- where the octaves of a document's queries and keys begin
        subject INTEGER NOT NULL,
        queries INTEGER NOT NULL,
        keys INTEGER NOT NULL,
        documents INTEGER NOT NULL,
        PRIMARY KEY (subject, queries, keys)
    ) WITHOUT ROWID;
    CREATE TABLE refusals (          -- draws that were not taken, by why
        subject INTEGER NOT NULL,
        reason TEXT NOT NULL,
        draws INTEGER NOT NULL,
        PRIMARY KEY (subject, reason)
    ) WITHOUT ROWID;
    CREATE TABLE counts (            -- of a target: cases by kind (level dtype), path, known issue
        target INTEGER NOT NULL,
        what TEXT NOT NULL,
        name TEXT NOT NULL,
        cases INTEGER NOT NULL,
        PRIMARY KEY (target, what, name)
    ) WITHOUT ROWID;
    CREATE TABLE worst (             -- largest error of clean cases, by level, dtype and tensor
        target INTEGER NOT NULL,
        name TEXT NOT NULL,
        z REAL NOT NULL,
        case_json TEXT NOT NULL,
        PRIMARY KEY (target, name)
    ) WITHOUT ROWID;
    CREATE TABLE histograms (        -- elements of clean kernel cases by z, by dtype and tensor
        target INTEGER NOT NULL,
        name TEXT NOT NULL,
        bin INTEGER NOT NULL,
        elements INTEGER NOT NULL,
        PRIMARY KEY (target, name, bin)
    ) WITHOUT ROWID;
    """,
)
"""``STEPS[n]`` makes version n + 1 of version n; a file without tables is version 0. A semicolon ends a statement, and
stands nowhere else."""
