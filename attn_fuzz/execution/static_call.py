"""A kernel call whose tensors stay where they are while their contents change, as those of a captured graph do."""

from __future__ import annotations

from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.runner import KernelCall


class StaticCall(KernelCall):
    """Made for one layout, and filled with others of the same numbers of documents, rows and longest rows."""

    def load(self, other: BatchTensors) -> None:
        """Copies another layout and its values in, on the current stream."""
        for name, placed in self.placed.items():
            placed.tensor.copy_(other.placed[name].tensor)
        self.tensors.sums.copy_(other.sums)

    def run(self) -> None:
        """Forward, and backward where one is asked for, on the current stream.

        What metadata have computed they keep: each run is given new ones, which compute it from what is there then.
        """
        told = self.tensors.metadata[0]
        self.metadata = VarlenMetadata.of_sums(told.lengths_q, told.lengths_k, told.cu_seqlens_q, told.cu_seqlens_k)
        self.forward()
        self.backward()

    def changed(self) -> list[str]:
        """Nothing: what the tensors hold is changed on purpose."""
        return []
