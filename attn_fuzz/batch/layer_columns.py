"""What is judged of each document of a batch of layer calls, as columns of a table."""

from __future__ import annotations

from typing import Final

from attn_fuzz.batch.batch_run import APART
from attn_fuzz.execution.layer_calls import OF_TOKENS

STEPS: Final = "steps"
WHOLE: Final = "whole numbers"
HALVES: Final = "halves"
REPLICAS: Final = "replicas"
OF_RANK: Final = "rows of a rank"
_WEIGHTS: Final = ("query", "key_value", "dense", "query_norm", "key_norm", "value_norm")
LAYER_TENSORS: Final = (*OF_TOKENS, *(f"d_{name}" for name in _WEIGHTS))
LAYER_NAMES: Final = (*LAYER_TENSORS, "bits", APART, STEPS, WHOLE, HALVES, REPLICAS, OF_RANK)
"""What is judged of each document: budgets, those of parameters' gradients at a call's first document; then bits,
isolation, memory step by step, whole numbers, and sums of halves; and over ranks what each of them has whole, and rows
of a rank's gradients that it has attended to nothing of."""
