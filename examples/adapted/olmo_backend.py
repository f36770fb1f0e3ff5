"""OLMo-core 3.0: a module that is made of sizes and options, and takes ``(q, k, v)`` ``[b, s, h, d]``; causal."""

from olmo_core.nn.attention.backend import TorchAttentionBackend

from attn_fuzz import adapters


def attend(q, k, v, softmax_scale, window_size):
    sizes = {"head_dim": q.shape[3], "n_heads": q.shape[2], "n_kv_heads": k.shape[2]}
    options = {"scale": softmax_scale, "window_size": (window_size[0], min(window_size[0], 0))}
    return TorchAttentionBackend(**sizes, **options)((q, k, v))


kernel = adapters.by_document(attend, capabilities={"causal": True, "noncausal": False})
