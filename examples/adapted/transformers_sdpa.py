"""transformers 5.17: padded ``[b, h, s, d]`` in and ``[b, s, h, d]`` out, a module as first argument, a 4D mask."""

import types

from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attn_fuzz import adapters


def padded(q, k, v, mask, softmax_scale):
    module = types.SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=False)
    return sdpa_attention_forward(module, q, k, v, mask, scaling=softmax_scale)[0].transpose(1, 2)


kernel = adapters.dense(padded, layout="bhsd")
