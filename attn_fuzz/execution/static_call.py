"""A kernel call whose tensors stay where they are while their contents change, as those of a captured graph do."""

from __future__ import annotations

from typing import Final

from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.runner import KernelCall

LYING: Final = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
"""What a call's metadata have in the tensors' own memory, rather than compute."""


class StaticCall(KernelCall):
    """Made for one layout, and filled with others of the same numbers of documents, rows and longest rows."""

    def load(self, other: BatchTensors) -> None:
        """Copies another layout and its values in, on the current stream."""
        self.tensors.copy_in(other)

    def run(self) -> None:
        """Forward, and backward where one is asked for, on the current stream.

        What metadata have computed they keep: each run is given new ones, which compute it from what is there then.
        """
        told = self.tensors.metadata[0]
        lying = {name: vars(told)[name] for name in LYING if vars(told).get(name) is not None}
        self.metadata = told.lying_at(**lying)
        self.forward()
        self.backward()

    def forget(self) -> None:
        """Gives back the memory of what it gave."""
        self.attended, self.gradients = None, {}

    def changed(self) -> list[str]:
        """Nothing: what the tensors hold is changed on purpose."""
        return []
