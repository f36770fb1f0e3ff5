"""The differential suite: every backend against the reference, on drawn cases. This is what runs on GPU CI.

A failing case is printed as JSON, ready for ``python -m attn_fuzz save``.
"""

from __future__ import annotations

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import UnsupportedCase
from attn_fuzz.generation.domain import Domain
from attn_fuzz.generation.strategies import cases
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reference.case import LEVELS


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_backend_agrees_with_reference(attn_backend: str, level: str, attn_device: str) -> None:
    backend = registry.load(attn_backend)
    device = attn_device.partition(":")[0]
    if (reason := backend.kernel.why_unavailable(device)) is not None:
        pytest.skip(f"{attn_backend}: {reason}")
    domain = Domain.of(backend.kernel.capabilities_on(device), device)

    @given(data=st.data())
    def agrees(data: st.DataObject) -> None:
        case = data.draw(cases(level, domain))
        note(f"keep it: python -m attn_fuzz save '{case.to_json()}' NAME")
        try:
            verdict = examine(case, backend, attn_device)
        except UnsupportedCase:
            return
        if verdict.first is not None:
            raise verdict.first

    agrees()
