"""The tensors of a batch's layer calls in their places: inputs in arenas between guard margins, weights once for all.

A case by itself is a batch of one call.
"""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.execution.batch_tensors import side_of
from attn_fuzz.execution.poison import filler
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.memory import Placed, all_intact, bits, place


class LayerTensors:
    """A batch's inputs, output gradients and weights in their places, ready for any number of runs.

    Args:
        batch: what will run.
        inputs: tensors of its packed case, ``[tokens, hidden]``, those of another device copied.
        device: where.
        poison: what gaps between calls and guard margins hold (execution/poison.py).
    """

    def __init__(self, batch: CallBatch, inputs: LayerInputs, device: torch.device, poison: str) -> None:
        self.batch, self.device, self.poison, self._fill = batch, device, poison, filler(poison)
        self._side = side_of(batch, batch.case.packed_lengths, (0,) * len(batch.ends), device)
        named = {"x": self._side.arena(inputs.x.to(device), self._fill)}
        named["dout"] = self._side.arena(inputs.dout.to(device), self._fill)
        named |= {f"weight {name}": weight.to(device) for name, weight in inputs.weights.items()}
        self.placed = {name: self._place(name, tensor) for name, tensor in named.items()}
        self.weights = {name: self.placed[f"weight {name}"].tensor for name in inputs.weights}

    @classmethod
    def of_one(cls, case: Case, inputs: LayerInputs, device: torch.device, poison: str) -> LayerTensors:
        """Those of a case by itself."""
        return cls(CallBatch.of_one(case), inputs, device, poison)

    def _place(self, name: str, x: torch.Tensor) -> Placed:
        if name != "dout" or self.batch.case.memory == "contiguous":
            return place(x, "contiguous", self._fill)
        # The gradient that comes back to a layer is as often a slice as not.
        placed = place(x[:, None], "sliced", self._fill)
        return dataclasses.replace(placed, tensor=placed.tensor[:, 0])

    def of_call(self, name: str, index: int) -> torch.Tensor:
        """A call's own rows of ``x`` or ``dout``."""
        return self.placed[name].tensor.narrow(0, self._side.begins[index], self._side.counts[index])

    def changes(self) -> list[str]:
        """Inputs, weights or guard margins whose bits changed, in words."""
        if all_intact([*self.placed.values()]):
            return []
        return [f"{what} of {name}" for name, item in self.placed.items() if (what := item.changed())]

    def changed(self) -> torch.Tensor:
        """Whether there are any, as a tensor on the device, for which nothing waits."""
        return torch.stack([(bits(item.storage) != item.before).any() for item in self.placed.values()]).any()
