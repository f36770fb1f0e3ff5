"""ring-attention-pytorch 0.5.20: dense ``[b, s, h, d]``; query head h reads K/V head ``h % kv_heads``; float32 only."""

from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

from attn_fuzz import adapters


def ring(q, k, v, causal):
    q = q.unflatten(2, (k.shape[2], -1)).transpose(2, 3).flatten(2, 3)
    out = ring_flash_attn(q, k, v, causal=causal, bucket_size=16, ring_size=1)
    return out.unflatten(2, (-1, k.shape[2])).transpose(2, 3).flatten(2, 3)


kernel = adapters.by_document(ring, capabilities={"dtypes": ("fp32",)})
