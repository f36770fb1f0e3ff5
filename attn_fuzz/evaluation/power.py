"""What the oracle sees: one key too few, too many or another, in one query row of a long document.

``python -m attn_fuzz.evaluation.power --json > results/power.json``. The document is causal, one of several in a pack;
budgets and probes are per row, so that its neighbours do not matter. A kernel's arithmetic (P rounded to the dtype,
float32 sums, results rounded) is emulated for the rows that the fault touches; the verdict is that of the checks, from
the same functions that examine a case.

Forward: the census. Backward: dV of an output gradient in every row (``rows_counted``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, Final, Literal

import torch

from attn_fuzz.execution.environment import environment
from attn_fuzz.oracle.deviations import LIMIT
from attn_fuzz.oracle.known_answer.census import census_sees
from attn_fuzz.oracle.known_answer.every_row import beyond
from attn_fuzz.reference.answer import Expected
from attn_fuzz.reference.attention import Forward
from attn_fuzz.reference.budget import attention_variances
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.profile import Profile
from attn_fuzz.reference.terms import Document as Tensors
from attn_fuzz.reference.values import DTYPES

LENGTHS: Final = (128, 512, 2048, 8192, 16384, 32768, 65536)
HEAD_DIM: Final = 64
PLACEMENTS: Final = 100

Kind = Literal["none", "dropped", "extra", "swapped"]
KINDS: Final[tuple[Kind, ...]] = ("none", "dropped", "extra", "swapped")


@dataclasses.dataclass(frozen=True)
class Document:
    """The probe's tensors of one long causal document, float64 as rounded to the dtype."""

    dtype: str
    values: torch.Tensor
    """V ``[n, d]``: signs, opposite in neighbouring keys."""
    dout: torch.Tensor
    """``[n, d]``: of row i, ``+-2^round(log2(i + 1))``, opposite in neighbouring rows."""

    @classmethod
    def drawn(cls, length: int, dtype: str, generator: torch.Generator) -> Document:
        def paired() -> torch.Tensor:
            signs = torch.randint(0, 2, (length, HEAD_DIM), generator=generator).double() * 2 - 1
            signs[1::2] = -signs[: length // 2 * 2 : 2]
            return signs

        counts = torch.arange(1, length + 1).double()
        return cls(dtype, paired(), paired() * (2.0 ** counts.log2().round())[:, None])

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(DTYPES[self.dtype]).double()


def keys_of(kind: Kind, row: int, key: int, other: int) -> torch.Tensor:
    """The keys that a faulty row attends to; ``key`` is one of its own, ``other`` beyond it."""
    own = torch.arange(row + 1)
    if kind == "dropped":
        return own[own != key]
    if kind == "extra":
        return torch.cat([own, torch.tensor([other])])
    if kind == "swapped":
        return torch.where(own == key, other, own)
    return own


def forward_sees(document: Document, kind: Kind, row: int, key: int, other: int) -> bool:
    """Whether the census accuses a forward with the fault in this row."""
    attended = keys_of(kind, row, key, other)
    # Weights before the division by their sum are all 1, which no rounding changes.
    out = (document.values[attended].float().sum(0) / len(attended)).double()
    counts = torch.tensor([row + 1])
    sums = document.values[: row + 1].sum(0)
    return bool(census_sees(document.rounded(out)[None, None], counts, sums[None, None]).any())


def backward_seen(document: Document, row: int, key: int, other: int) -> set[Kind]:
    """Kinds of fault in this row of which dV of an output gradient in every row accuses a backward."""
    length = len(document.values)
    touched = torch.tensor([key, other])
    counts = torch.arange(1, length + 1).double()
    allowed = (torch.arange(length)[:, None] >= touched[None, :]).double()
    expected = _expected(document, allowed / counts[:, None], counts.log(), touched)
    case = Case(level="kernel", lengths=(length,), head_dim=HEAD_DIM, dtype=document.dtype)
    # A backward recomputes P from the float32 row sum and rounds it for its product.
    recomputed = document.rounded(torch.exp(-counts.log().float()).double())
    weights = recomputed[:, None] * allowed
    seen = set[Kind]()
    for kind in KINDS:
        attended = keys_of(kind, row, key, other)
        weights[row] = recomputed[row] * torch.stack([(attended == j).sum() for j in touched]).double()
        got = document.rounded((weights.float().T @ document.dout.float()).double())[:, None]
        if (beyond(case, got, expected) > LIMIT).any():
            seen.add(kind)
    return seen


def _expected(document: Document, p: torch.Tensor, lse: torch.Tensor, touched: torch.Tensor) -> Expected:
    """dV of some keys, and its budget: that of reference/budget.py with the other keys' columns left out."""
    zero = torch.zeros_like(document.dout)[None]
    some = document.values[touched][None]
    result = Forward(out=zero, lse=lse[None], probabilities=p[None], slope=torch.ones_like(p)[None])
    tensors = Tensors(zero, torch.zeros_like(some), some, document.dout[None])
    how = Computation(scale=HEAD_DIM**-0.5, dtype=document.dtype, profile=Profile())
    spread = attention_variances(tensors, result, how)
    value = (p.T @ document.dout)[:, None]
    return Expected(value, spread.dv.transpose(0, 1), spread.degrees["dv"].transpose(0, 1))


def power(length: int, dtype: str, placements: int = PLACEMENTS) -> dict[str, Any]:
    """How many of the random placements are seen, by kind of fault and direction."""
    generator = torch.Generator().manual_seed(length)
    document = Document.drawn(length, dtype, generator)
    seen: dict[str, int] = dict.fromkeys((f"{way} {kind}" for way in ("forward", "backward") for kind in KINDS), 0)
    for _ in range(placements):
        row = int(torch.randint(length // 2, length - 1, (1,), generator=generator))
        key = int(torch.randint(0, row + 1, (1,), generator=generator))
        other = int(torch.randint(row + 1, length, (1,), generator=generator))
        backward = backward_seen(document, row, key, other)
        for kind in KINDS:
            seen[f"forward {kind}"] += forward_sees(document, kind, row, key, other)
            seen[f"backward {kind}"] += kind in backward
    return {"length": length, "dtype": dtype, "placements": placements, "seen": seen}


def main() -> None:
    """Prints the table as JSON, which takes a quarter of an hour."""
    if sys.argv[1:]:
        raise SystemExit("python -m attn_fuzz.evaluation.power takes no arguments; it prints its table as JSON")
    torch.set_num_threads(1)
    rows = []
    for length in LENGTHS:
        for dtype in ("bf16", "fp16"):
            rows.append(power(length, dtype))
            print(rows[-1], file=sys.stderr)
    print(json.dumps({"power": rows, "head_dim": HEAD_DIM, "environment": environment("cpu")}))


if __name__ == "__main__":
    main()
