"""More documents than the number that counts them holds."""

from __future__ import annotations

from typing import ClassVar

import torch

from attn_fuzz.backends.crowd import Crowd
from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Call

_BITS = 16


class CrowdFault(Crowd, KernelFault):
    """Common to faults of the number of documents."""

    capabilities: ClassVar[Capabilities] = Capabilities(covers_all_rows=False, crowds=True)
    levels: ClassVar[tuple[str, ...]] = ("kernel",)
    why_not_hunted: ClassVar[str] = (
        "of cases one in 220 has 65,537 documents, which is soon met and convicted (results/outside/crowd_faults.txt), "
        "but takes half a minute once they are not all alike, as shrinking tries; a test convicts it on one call"
    )


class CountWraps(CrowdFault):
    """How many documents there are is kept in 16 bits: of 65,537 the first is worked on, and no other."""

    id = "P14"
    reports = ("the class of flash-attention#1786", "the class of pytorch#190857")

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        heads = result.shape[1]
        if (count := len(value) // heads) >> _BITS:
            kept = count % (1 << _BITS)
            rows, value = slice(0, rows.stop * kept // count), value[: kept * heads]
            if not kept:
                return
        super().write(result, rows, value, name)


class GradientOfFirst(CrowdFault):
    """In the backward, documents beyond 65,536 find the output gradient of the first ones."""

    id = "P15"
    reports = ("the class of flash-attention#2260",)

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        found = super().read(call, x, rows, name)
        if name != "dout" or (count := self.at_once(call)) >> _BITS == 0:
            return found
        heads = len(found) // count
        return found[torch.arange(len(found)) % (heads << _BITS)]
