"""What a finding says where the second value of a user's kernel was taken for the LSE and only that is wrong.

A kernel that declares nothing may give its LSE in base 2, or something else of the same shape: no bug that this is no
natural LSE, and one line of the declaration says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import UserKernel
from attn_fuzz.oracle.symptoms import Symptom, WrongLse

_CLOSE: Final = 1e-3
"""Relative: roundings of half precision leave ratios of LSEs much closer."""


def of_another_meaning(backend: Backend, symptoms: Sequence[Symptom]) -> str | None:
    """One sentence on what to declare; None where an LSE was declared, or other results are wrong, too.

    Args:
        backend: whose.
        symptoms: all of the failing case.
    """
    if not isinstance(backend.kernel, UserKernel) or backend.kernel.capabilities.lse is not None or not symptoms:
        return None
    if not all(isinstance(symptom, WrongLse) for symptom in symptoms):
        return None
    pairs = [(each.element.got, each.element.expected) for each in symptoms if each.element is not None]
    if pairs and all(math.isclose(got, expected / math.log(2), rel_tol=_CLOSE) for got, expected in pairs):
        return (
            "looks like an LSE in base 2: return it times log(2), or say so by "
            'adapters.varlen(kernel, lse=adapters.Lse("ht", base="2")), or have it ignored: capabilities["lse"] = False'
        )
    return (
        "what the kernel returns second is taken for the LSE of its rows, natural and of scaled scores; if it is "
        'something else, declare capabilities["lse"] = False'
    )
