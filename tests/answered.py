"""Which documents the reference is asked to answer, and in which dtype."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.batch import verdicts


def answers_asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that has (dtype, places of documents or None for all) of each answer from now on."""
    asked: list[object] = []
    plain = verdicts.answers

    def answers(*given: object, **options: object) -> object:
        asked.append((options.get("dtype", torch.float64), options.get("documents")))
        return plain(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(verdicts, "answers", answers)
    return asked
