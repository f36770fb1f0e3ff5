"""The answer to a layer case whose projections are exact, from kernel answers: thousands of documents at a time.

A selection as wide as the layer permutes channels and turns signs, which no arithmetic rounds; without norms and rotary
what is left of the layer is buffer, metadata and kernel. Each micro-sequence is then one packed call over its segments,
whose budget is a formula (budget.py), and gradients of keys and values add up over the calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attn_fuzz.reference import batched
from attn_fuzz.reference.answer import Expected, Inputs
from attn_fuzz.reference.budget import rounding_variance
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.layer import LayerInputs
from attn_fuzz.reference.layout import active_extent, active_lengths, micro_sequences
from attn_fuzz.reference.narrow import Narrow, operand_variance
from attn_fuzz.reference.profile import ACCUMULATION, ALIKE, Profile

KernelAnswer = Callable[[Case, Inputs, Profile], dict[str, Expected]]

EXACT_TENSORS = ("out", "dx", "dk", "dv")


def is_exact(case: Case) -> bool:
    """Whether projections permute channels, and nothing else stands between them and the kernel."""
    return (
        case.level == "layer"
        and case.weights == "selection"
        and case.hidden == case.heads * case.head_dim
        and {case.query_norm, case.key_norm, case.value_norm, case.rotary} == {"none"}
        and not case.shared_key_value
    )


def _quick(case: Case, inputs: Inputs, profile: Profile) -> dict[str, Expected]:
    return batched.kernel_answer(case, inputs, profile, degrees=False)


def exact_layer_answer(
    case: Case, inputs: LayerInputs, profile: Profile, answer: KernelAnswer = _quick
) -> dict[str, Expected]:
    """Expected ``out`` and ``dx`` (``[tokens, hidden]``), and ``dk`` and ``dv`` as the buffer holds them at last.

    Args:
        case: a layer case for which ``is_exact`` holds.
        inputs: its tensors.
        profile: the roundings of the backend's kernel.
        answer: to the kernel case of one micro-sequence.
    """
    weights = {name: weight.double() for name, weight in inputs.weights.items()}
    narrow = Narrow.projecting(case.dtype, profile)
    dtype, tokens = inputs.x.dtype, case.tokens
    shape = (tokens, case.heads, case.head_dim)
    x = inputs.x.double()
    q = (x @ weights["query"].T).to(dtype).view(shape)
    k, v = (x @ weights["key_value"].T).to(dtype).view(tokens, -1, case.head_dim).chunk(2, 1)
    dout = (inputs.dout.double() @ weights["dense"]).to(dtype).view(shape)
    names = {"out": q, "dq": q, "dk": k, "dv": v}
    values = {name: torch.zeros(like.shape, dtype=torch.float64, device=x.device) for name, like in names.items()}
    variances = {name: torch.zeros_like(value) for name, value in values.items()}
    for part in micro_sequences(case):
        queries, keys = active_lengths(case.packed_lengths, part)
        rows, extent = slice(*part), slice(*active_extent(case.packed_lengths, part))
        call = Case(
            level="kernel",
            lengths=queries,
            key_lengths=keys,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            causal=case.causal,
            window=case.window,
            scale=case.scale,
            softcap=case.softcap,
            dtype=case.dtype,
            values=case.values,
        )
        for name, found in answer(call, Inputs(q[rows], k[extent], v[extent], dout[rows]), profile).items():
            if name in values:
                place = extent if name in ("dk", "dv") else rows
                values[name][place] += found.value
                variances[name][place] += found.variance

    def stored(value: torch.Tensor) -> torch.Tensor:
        return rounding_variance(value, case.dtype)

    def as_operand(value: torch.Tensor) -> torch.Tensor:
        """What a projection that rounds its operands makes of a value beside permuting it."""
        if not narrow:
            return torch.zeros_like(value)
        return operand_variance(value, narrow.products) + ALIKE * (narrow.cut * value).square()

    def through(name: str, gradient: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A projection's share of the input gradient, stored."""
        share = gradient.flatten(1) @ weights[name]
        return share, (variance + as_operand(gradient)).flatten(1) @ weights[name].square() + stored(share)

    for name in ("dk", "dv"):
        # Running sums in float32, where there was anything to add.
        variances[name] += torch.where(variances[name] > 0, ACCUMULATION**2 * values[name].square(), 0.0)
    key_value = torch.cat([values["dk"], values["dv"]], 1)
    key_value_variance = torch.cat([variances["dk"], variances["dv"]], 1) + stored(key_value)
    of_queries, query_variance = through("query", values["dq"], variances["dq"])
    of_keys, key_variance = through("key_value", key_value, key_value_variance)
    dx = of_queries + of_keys
    dense = weights["dense"].T
    of_out = variances["out"] + as_operand(values["out"])
    return {
        "out": Expected(values["out"].flatten(1) @ dense, of_out.flatten(1) @ dense.square()),
        "dx": Expected(dx, query_variance + key_variance + stored(dx)),
        "dk": Expected(values["dk"], variances["dk"]),
        "dv": Expected(values["dv"], variances["dv"]),
    }
