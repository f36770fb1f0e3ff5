"""Streams: a call waits for the stream that it is made on, and what comes after it there waits for the call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.cases.interfering import turned
from attn_fuzz.execution.batch_tensors import BatchTensors
from attn_fuzz.execution.observation import Observation
from attn_fuzz.execution.process import beyond_its_call
from attn_fuzz.execution.static_call import StaticCall
from attn_fuzz.execution.streams import Streams, streams_of
from attn_fuzz.oracle.relations.launched import ONE_AT_A_TIME, spoiled, unlike
from attn_fuzz.oracle.symptoms import NotOrdered, Symptom
from attn_fuzz.oracle.trial import Trial
from attn_fuzz.reference.answer import Inputs, kernel_inputs

ORDERED: Final = "calls on a stream of their own, between two others"


def ordered_by_streams(trial: Trial) -> Iterator[Symptom]:
    """Inputs that come late from one stream, a call on another, results that are taken on a third: the same bits."""
    case, streams = trial.case, streams_of(trial.device)
    if streams is None or case.level != "kernel" or case.memory in ONE_AT_A_TIME or not trial.stated.streams:
        return
    assert isinstance(trial.inputs, Inputs)

    def once() -> Observation:
        return _run(trial, streams_of(trial.device) or streams)

    usual, got = trial.observations[-1], once()
    trial.counted[ORDERED] += 1
    for tensor, words, z, element in unlike(trial, usual, got, once):
        message = f"of inputs that come late from another stream, results taken on a third: {words}"
        yield NotOrdered("streams", tensor, message, z=z, element=element)


def _whatever_comes(call: StaticCall) -> None:
    """Runs a call that is a case of its own, some other time, where it fails."""
    try:
        call.run()
    except Exception as error:
        if beyond_its_call(error):
            raise


def _run(trial: Trial, streams: Streams) -> Observation:
    case, poison, device = trial.case, trial.poisons[0], trial.device
    assert isinstance(trial.inputs, Inputs)
    batch = CallBatch.of_one(case)
    # Of the same layout: host and device agree at all times, but for the values.
    call = StaticCall(trial.backend, case, spoiled(trial.inputs), poison, device)
    drawn, after = (
        BatchTensors.of(trial.backend, batch, inputs, device, (case.capacity,), poison)
        for inputs in (trial.inputs, spoiled(trial.inputs))
    )
    other = turned(case)
    taken = trial.backend.refusal(other, device.type) is None
    next_call = StaticCall(trial.backend, other, kernel_inputs(other, "cpu"), poison, device) if taken else None

    def whole() -> None:
        call.run()
        # Nothing of the call may still read these.
        call.load(after)
        if next_call is not None:
            # Nor does what the next call keeps anywhere reach this one, which may not have begun yet.
            _whatever_comes(next_call)

    streams.warm_up(whole)
    for each in filter(None, (call, next_call)):
        each.forget()
    streams.late(lambda: call.load(drawn), 2)
    streams.call(whole)
    return streams.take(call.observe)
