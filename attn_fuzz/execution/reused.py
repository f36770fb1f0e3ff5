"""A layer's object that takes one sequence after another: the second is what a run is about."""

from __future__ import annotations

import dataclasses

import torch

from attn_fuzz.backends.layer import Layer
from attn_fuzz.backends.user_layer import UserLayer
from attn_fuzz.cases.earlier import earlier_sequence
from attn_fuzz.execution.layer_tensors import LayerTensors
from attn_fuzz.execution.runner import LayerRun
from attn_fuzz.reference.layer import layer_inputs


class EarlierFailed(Exception):
    """The earlier sequence did not come through: a case of its own, some other time."""


class _Earlier(LayerRun):
    """The earlier sequence, through an object that is there already."""

    given: Layer

    def make_layer(self, weights: dict[str, torch.Tensor]) -> Layer:
        return self.given


class ReusedRun(LayerRun):
    """A sequence through an object that another one has gone through before, forward and backward.

    Raises:
        EarlierFailed: by ``forward``, where the other one raises.
    """

    def make_layer(self, weights: dict[str, torch.Tensor]) -> Layer:
        earlier = earlier_sequence(self.case)
        # Only the sequence is another one: an object keeps its weights.
        inputs = dataclasses.replace(layer_inputs(earlier, "cpu"), weights={})
        tensors = LayerTensors.of_one(earlier, inputs, self.tensors.device, self.tensors.poison)
        run = _Earlier(self.backend, earlier, tensors, watched=False)
        layer = self.backend.layer(weights, earlier, self.backend.kernel)
        assert isinstance(layer, UserLayer)
        run.given = layer
        try:
            run.forward()
            run.backward()
            if not self.evaluation:
                layer.parameter_gradients()
        except Exception as error:
            raise EarlierFailed from error
        layer.restart(self.case)
        return layer
