"""A kernel that is wrong for documents of one exact size only: what thousands of documents a call are for.

``trigger:QUERIES,KEYS:KERNEL`` is a backend like any other. It is no seeded fault (backends/faults), whose faults
show within a few hundred drawn cases: this one shows in one of as many documents as there are pairs of lengths.
``trigger:QUERIES,KEYS,HOW:KERNEL`` says how it is wrong there:

    scale   the output is off by 2^-4, its gradients with it: what is meant where nothing is said
    row     the output is off by 1 %: too little for any element in half precision, too much for a row of them
    key     the second key's value is taken for the first key's too
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attn_fuzz.backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.profile import Profile

PREFIX = "trigger:"

SCALES = {"scale": 2.0**-4, "row": 5 * 2.0**-9}
HOWS = (*SCALES, "key")


class TriggerKernel(Kernel):
    """Another kernel, wrong for documents of one size.

    Args:
        inner: the kernel.
        queries: of the documents that come out wrong.
        keys: of the same.
        how: one of ``HOWS``.
    """

    def __init__(self, inner: Kernel, queries: int, keys: int, how: str = "scale") -> None:
        self.name = f"{PREFIX}{queries},{keys},{how}:{inner.name}"  # type: ignore[misc]
        self.capabilities = inner.capabilities  # type: ignore[misc]
        self.inner, self.size, self.how = inner, (queries, keys), how

    def capabilities_on(self, device: str) -> Capabilities:
        return self.inner.capabilities_on(device)

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        return self.inner.limit(case, calls)

    def profile_on(self, device: str) -> Profile:
        return self.inner.profile_on(device)

    def paths_on(self, device: str) -> frozenset[str]:
        return self.inner.paths_on(device)

    def why_unavailable(self, device: str) -> str | None:
        return self.inner.why_unavailable(device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        queries, keys = self.size
        hit = (metadata.used("q") == queries) & (metadata.used("k") == keys)
        if self.how == "key":
            first = metadata.cu_seqlens_k[:-1][hit].long()
            source = torch.arange(len(v), device=v.device)
            source[first] = (first + 1).clamp_max(len(v) - 1)
            return self.inner.attend(q, k, v[source], metadata, options)
        attended = self.inner.attend(q, k, v, metadata, options)
        owned = hit[metadata.document_index_q.long() - 1]
        # Rows behind the last document are part of none.
        rows = torch.nn.functional.pad(owned, (0, len(attended.out) - len(owned)))[:, None, None]
        return attended._replace(out=torch.where(rows, attended.out * (1 + SCALES[self.how]), attended.out))


def size_of(name: str) -> tuple[int, int, str, str]:
    """(queries, keys, how, kernel's name) of ``trigger:QUERIES,KEYS[,HOW]:KERNEL``.

    Raises:
        ValueError: for anything else.
    """
    size, _, kernel = name.removeprefix(PREFIX).partition(":")
    queries, keys, *how = size.split(",")
    if len(how) > 1 or not set(how) <= set(HOWS):
        raise ValueError(f"{name!r} does not say how in one word of {', '.join(HOWS)}")
    return int(queries), int(keys), how[0] if how else "scale", kernel
