"""torchtune 0.6.1: a pack as one sequence ``[1, h, t, d]``, under the mask that it makes of the documents' lengths."""

from torchtune.modules.attention_utils import _sdpa_or_flex_attention, create_block_causal_mask

from attn_fuzz import adapters


def packed(q, k, v, lengths_q):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return _sdpa_or_flex_attention()(q, k, v, create_block_causal_mask([lengths_q]), 0.0, False)


CAUSAL = {"causal": True, "noncausal": False, "causal_needs_equal_lengths": True}
kernel = adapters.varlen(packed, layout="bhtd", capabilities=CAUSAL)
