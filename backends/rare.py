"""A kernel that is wrong for documents of one exact size only: what thousands of documents a call are for.

``rare:QUERIES,KEYS:KERNEL`` is a backend like any other. It is no fault of the exam (backends/faults), whose faults
show within a few hundred drawn cases: this one shows in one of as many documents as there are pairs of lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backends.kernel import Attended, AttentionOptions, Capabilities, Kernel
from backends.metadata import VarlenMetadata
from reference.case import Case
from reference.profile import Profile

PREFIX = "rare:"


class RareKernel(Kernel):
    """Another kernel, with the output of documents of one size scaled by 1 + 2^-4, their gradients with it.

    Args:
        inner: the kernel.
        queries: of the documents that come out wrong.
        keys: of the same.
    """

    def __init__(self, inner: Kernel, queries: int, keys: int) -> None:
        self.name, self.inner, self.size = f"{PREFIX}{queries},{keys}:{inner.name}", inner, (queries, keys)  # type: ignore[misc]

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
        attended = self.inner.attend(q, k, v, metadata, options)
        queries, keys = self.size
        hit = (metadata.cu_seqlens_q.diff() == queries) & (metadata.cu_seqlens_k.diff() == keys)
        rows = hit[metadata.document_index_q.long() - 1]
        return attended._replace(out=torch.where(rows[:, None, None], attended.out * (1 + 2.0**-4), attended.out))


def size_of(name: str) -> tuple[int, int, str]:
    """(queries, keys, kernel's name) of ``rare:QUERIES,KEYS:KERNEL``.

    Raises:
        ValueError: for anything else.
    """
    size, _, kernel = name.removeprefix(PREFIX).partition(":")
    queries, _, keys = size.partition(",")
    return int(queries), int(keys), kernel
