"""A varlen kernel to put under test: torch's SDPA, one document at a time."""

import torch


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False):
    out = []
    for (qb, qe), (kb, ke) in zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist()):
        mask = torch.ones(qe - qb, ke - kb, dtype=torch.bool, device=q.device)
        # Bottom-right: the last query stands on the last key.
        mask = mask.tril(ke - kb - (qe - qb)) if causal else mask
        heads = (x.transpose(0, 1) for x in (q[qb:qe], k[kb:ke], v[kb:ke]))
        document = torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=softmax_scale, enable_gqa=True)
        out.append(document.transpose(0, 1))
    return torch.cat(out)


kernel.capabilities = {"queries_without_keys": False}
