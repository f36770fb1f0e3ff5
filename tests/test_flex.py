"""FlexAttention's mask is the explicit one, element by element."""

from __future__ import annotations

import pytest
import torch

from attn_fuzz.backends.flex import mask_of
from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (0, -1), (2, -1)])
@pytest.mark.parametrize("lengths", [((3, 0, 5), (3, 0, 5)), ((2, 4), (7, 4)), ((5, 1), (2, 0))])
def test_masks_agree(lengths: tuple[tuple[int, ...], tuple[int, ...]], window: tuple[int, int], causal: bool) -> None:
    metadata = VarlenMetadata(lengths_q=lengths[0], lengths_k=lengths[1], device=torch.device("cpu"))
    options = AttentionOptions(scale=1.0, causal=causal, window=window)
    nothing = torch.zeros((), dtype=torch.long)
    rows, keys = torch.arange(sum(lengths[0]))[:, None], torch.arange(sum(lengths[1]))[None, :]
    seen = mask_of(metadata, options)(nothing, nothing, rows, keys)
    assert torch.equal(seen, metadata.allowed(options.effective_window))
