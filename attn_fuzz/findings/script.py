"""A finding as one Python file to paste into a report: needs torch and the kernel's own package, nothing of ours.

The tensors are written out with their exact values and their places in memory; the reference in the file computes each
document by itself in float64, and every element is allowed the error that its budget allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from attn_fuzz.backends.registry import Backend
from attn_fuzz.backends.user import UserKernel
from attn_fuzz.execution.environment import environment
from attn_fuzz.execution.runner import KernelCall, run_kernel
from attn_fuzz.oracle.deviations import deviations, limit
from attn_fuzz.oracle.known_answer.census import Census
from attn_fuzz.oracle.known_answer.every_row import EveryRow
from attn_fuzz.oracle.known_answer.needle import Needle
from attn_fuzz.reference.answer import Expected, Inputs, kernel_answer, kernel_inputs
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.memory import MARGIN
from attn_fuzz.reference.profile import Profile

RESULTS: Final = ("out", "dq", "dk", "dv")
MAX_ELEMENTS: Final = 20000
"""Numbers that a person still wants in a report."""


_DTYPES: Final = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


class ScriptError(ValueError):
    """The finding cannot be told as a script of its own; one sentence says why."""


_TEMPLATE: Final = '''"""{title}

Case: {case}
Seen with {versions}.
Exit status 1 while the fault is there, 0 once it is gone.
"""

import torch

DEVICE, DTYPE = "{device}", {dtype}
LENGTHS_Q, LENGTHS_K = {lengths_q}, {lengths_k}
SCALE, SOFTCAP = {scale!r}, {softcap!r}
CAUSAL, WINDOW = {causal}, {window}  # bottom-right aligned; (left, right) keys beside a row's own, -1 for no bound
nan, inf = float("nan"), float("inf")

# Memory that nobody writes shall be NaN, in torch.empty and in the caching allocator.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
if DEVICE == "cuda":
    blocks = [torch.full((1 << e,), nan, device=DEVICE) for e in range(7, 20) for _ in range(8)]
    del blocks


def tensor(values, shape, stride, offset, dtype=DTYPE):
    """A view into memory with a margin of NaN on each side."""
    margin = [nan] * {margin}
    memory = torch.tensor([*margin, *values, *margin], dtype=torch.float64).to(dtype).to(DEVICE)
    return memory.as_strided(shape, stride, offset)


def prefix_sums(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)


{kernel}


def reference(q, k, v):
    """Each document by itself, float64: the output, and the LSE [heads, rows], 0 for rows that see no key."""
    group, out, lses, q0, k0 = q.shape[1] // k.shape[1], torch.zeros_like(q), [], 0, 0
    for nq, nk in zip(LENGTHS_Q, LENGTHS_K):
        qd = q[q0 : q0 + nq].transpose(0, 1)
        kd, vd = (x[k0 : k0 + nk].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        distance = torch.arange(nq)[:, None] + (nk - nq) - torch.arange(nk)[None, :]
        seen = torch.ones(nq, nk, dtype=torch.bool)
        if WINDOW[0] >= 0:
            seen &= distance <= WINDOW[0]
        if CAUSAL or WINDOW[1] >= 0:
            seen &= distance >= -(0 if CAUSAL else WINDOW[1])
        scores = SCALE * (qd @ kd.transpose(1, 2))
        if SOFTCAP:
            scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        p = torch.softmax(scores, -1) * seen if nk else scores
        out[q0 : q0 + nq] = (p @ vd).transpose(0, 1)
        lses.append(torch.where(seen.any(-1), scores.logsumexp(-1), 0.0) if nk else scores.sum(-1))
        q0, k0 = q0 + nq, k0 + nk
    return out, torch.cat(lses, 1)


{tensors}

# 10 standard deviations of what correct arithmetic in this dtype may do, per element; 0 demands equality.
ALLOWED = {{
{allowed}
}}

leaves = [x.detach().requires_grad_() for x in (q, k, v)]
sums = prefix_sums(LENGTHS_Q), prefix_sums(LENGTHS_K)
{call}
got = dict(zip(("out", "dq", "dk", "dv"), (got_out, *gradients)))

rows = {{"out": sum(LENGTHS_Q), "dq": sum(LENGTHS_Q), "dk": sum(LENGTHS_K), "dv": sum(LENGTHS_K)}}
exact = [x[: rows[name]].detach().double().cpu().requires_grad_() for name, x in zip(("dq", "dk", "dv"), (q, k, v))]
expected_out, expected_lse = reference(*exact)
{reference_gradients}
expected = dict(zip(("out", "dq", "dk", "dv"), (expected_out.detach(), *gradients)))

failed = False
for name, want in expected.items():
    mine = got[name].detach().double().cpu()[: rows[name]]
    error = (mine - want).abs()
    allowed = torch.tensor(ALLOWED[name], dtype=torch.float64).view(want.shape)
    wrong = ~(error <= allowed + 1e-12 * want.abs())
    tail = got[name].detach()[rows[name] :]
    print(f"{{name}}: {{int(wrong.sum())}} of {{wrong.numel()}} elements wrong", end="")
    if wrong.any():
        row, head, channel = (int(i) for i in wrong.nonzero()[0])
        values = f"got {{mine[row, head, channel]:.6g}}, expected {{want[row, head, channel]:.6g}}"
        print(f"; at row {{row}}, head {{head}}, channel {{channel}}: {{values}}", end="")
    if (tail != 0).any():
        print("; rows behind the last document are not 0", end="")
    print()
    failed |= bool(wrong.any()) or bool((tail != 0).any())
raise SystemExit(1 if failed else 0)
'''

_CALL: Final = """got_out = kernel(*leaves, *sums, max(LENGTHS_Q), max(LENGTHS_K))
gradients = torch.autograd.grad(got_out, leaves, dout)"""

_CALL_WITH_LSE: Final = """got_out, got_lse = kernel(*leaves, *sums, max(LENGTHS_Q), max(LENGTHS_K))[:2]
given = dlse if got_lse.shape == dlse.shape else dlse.T
gradients = torch.autograd.grad([got_out, got_lse], leaves, [dout, given])"""

_REFERENCE: Final = """gradients = torch.autograd.grad(expected_out, exact, dout[: rows["out"]].double().cpu())"""

_REFERENCE_WITH_LSE: Final = """given = [dout[: rows["out"]].double().cpu(), dlse[:, : rows["out"]].double().cpu()]
gradients = torch.autograd.grad([expected_out, expected_lse], exact, given)"""

_OWN_KERNEL: Final = '''from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata


def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """A backend of this project: run the script from a checkout."""
    metadata = VarlenMetadata(lengths_q=tuple(LENGTHS_Q), lengths_k=tuple(LENGTHS_K), device=torch.device(DEVICE))
    options = AttentionOptions(scale=SCALE, causal=CAUSAL, window=WINDOW, softcap=SOFTCAP)
    return registry.load({name!r}).kernel.attend(q, k, v, metadata, options){results}'''

_USER_KERNEL: Final = """def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    {load}
    return function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {options})"""


def _kernel_source(backend: Backend, case: Case, *, with_lse: bool) -> str:
    """The call under test, as source text of a function ``kernel``, which gives the output, and the LSE if asked."""
    if isinstance(backend.kernel, UserKernel):
        where, _, function = backend.name.rpartition(":")
        load = (
            f"import runpy; function = runpy.run_path({where!r})[{function!r}]"
            if where.endswith(".py")
            else f"from {where} import {function} as function"
        )
        asked = [("softmax_scale", "SCALE"), ("causal", "CAUSAL")]
        asked += [("window_size", "WINDOW")] * (case.window != (-1, -1)) + [("softcap", "SOFTCAP")] * bool(case.softcap)
        return _USER_KERNEL.format(load=load, options=", ".join(f"{name}={value}" for name, value in asked))
    own = _OWN_KERNEL.format(name=backend.name, results="" if with_lse else ".out")
    # As people write the call, it gives the output alone.
    return own if with_lse else backend.kernel.call_source or own


def candidates(case: Case, profile: Profile) -> Iterator[Inputs]:
    """The case's own tensors, then those whose answers are known."""
    cpu = torch.device("cpu")
    yield kernel_inputs(case, cpu)
    if case.memory != "broadcast":
        for known in (Census, EveryRow, Needle):
            if (made := known.of(case, cpu, profile)) is not None:
                yield made.inputs


def _fails(backend: Backend, case: Case, inputs: Inputs, device: torch.device) -> dict[str, Expected] | None:
    """What should have come out, where an element of something else is beyond its budget."""
    observation = run_kernel(backend, case, inputs, "nan", device)
    answer = kernel_answer(case, inputs, backend.kernel.profile_on(device.type))
    wrong = [bool((deviations(case, observation.results[name], answer[name]) > limit(case)).any()) for name in RESULTS]
    behind = any(bool((tail != 0).any()) for name, tail in observation.tails.items() if name in RESULTS)
    return answer if any(wrong) or behind else None


def _own(case: Case, backend: Backend, device: torch.device) -> tuple[Inputs, dict[str, Expected]]:
    """The case's own tensors, and what should come out of them."""
    inputs = kernel_inputs(case, "cpu")
    return inputs, kernel_answer(case, inputs, backend.kernel.profile_on(device.type))


def _first_failing(case: Case, backend: Backend, device: torch.device) -> tuple[Inputs, dict[str, Expected]]:
    """The first tensors for which an element is beyond its budget, and what should have come out."""
    for inputs in candidates(case, backend.kernel.profile_on(device.type)):
        if (answer := _fails(backend, case, inputs, device)) is not None:
            return inputs, answer
    raise ScriptError("no single call shows this by a wrong element; use replay")


def _numbers(x: torch.Tensor) -> str:
    return "[" + ", ".join(f"{value:.9g}" for value in x.detach().double().flatten().tolist()) + "]"


def standalone(case: Case, backend: Backend, device: str, title: str, *, fatal: bool = False) -> str:
    """The text of the script.

    Args:
        case: a kernel case.
        backend: that fails it.
        device: where.
        title: what is wrong, in a line.
        fatal: the case ends its process or hangs, so that it is not run here; its script does what the case does.

    Raises:
        ScriptError: when the case is a layer case, too large, or fails in a way that one call does not show.
    """
    if case.level != "kernel":
        raise ScriptError("a layer case needs the layer around it and has no script of its own; use replay")
    place = torch.device(device)
    inputs, answer = _own(case, backend, place) if fatal else _first_failing(case, backend, place)
    placed = KernelCall(backend, case, inputs, "nan", place).placed
    if sum(item.storage.numel() for item in placed.values()) > MAX_ELEMENTS:
        raise ScriptError(f"the case has more than {MAX_ELEMENTS} numbers; shrink it first")
    tensors = [
        f"{name} = tensor({_numbers(item.storage[MARGIN:-MARGIN])}, {tuple(item.tensor.shape)}, "
        f"{item.tensor.stride()}, {item.tensor.storage_offset()}{', torch.float32' if name == 'dlse' else ''})"
        for name, item in placed.items()
    ]
    with_lse = "dlse" in placed
    bound = limit(case)
    allowed = [f'    "{name}": {_numbers(bound * answer[name].variance.sqrt())},' for name in RESULTS]
    seen = environment(device)
    return _TEMPLATE.format(
        title=title.replace('"""', "'''").replace("\\", "/"),
        case=case.to_json(),
        versions=", ".join(f"{key} {value}" for key, value in seen.items() if key not in ("commit", "hypothesis")),
        device=place.type,
        dtype=_DTYPES[case.dtype],
        lengths_q=list(case.packed_lengths),
        lengths_k=list(case.packed_key_lengths),
        scale=case.softmax_scale,
        softcap=case.softcap,
        causal=case.causal,
        window=case.window,
        margin=MARGIN,
        kernel=_kernel_source(backend, case, with_lse=with_lse),
        call=_CALL_WITH_LSE if with_lse else _CALL,
        reference_gradients=_REFERENCE_WITH_LSE if with_lse else _REFERENCE,
        tensors="\n".join(tensors),
        allowed="\n".join(allowed),
    )
