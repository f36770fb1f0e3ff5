"""How much error correct arithmetic may make, per element, for one document.

Variances of independent roundings, propagated once through the formulas of attention.py; sums run over allowed pairs.
With u the unit roundoff of the storage dtype, eta its subnormal spacing and a the accumulation error (profile.py):

    rvar(x)  = 0.18 u^2 x^2 for normal x, eta^2 / 12 for subnormal x, 0 for x = 0
    vs_ij    = g_ij^2 a^2 (scale^2 sum_c q^2 k^2 + s_ij^2 / 16 + 1) + a^2 (cap t)^2 [+ rvar(s_ij)]      error of a score
    V(o_ic)  = sum_j rvar(p_ij) v_jc^2 + sum_j p_ij^2 vs_ij (v_jc - o_ic)^2 + ak^2 sum_j p_ij v_jc^2 + rvar(o_ic)
    V(D_i)   = sum_c do_ic^2 V(o_ic) + a^2 sum_c (do_ic o_ic)^2         of the stored output, or
               sum_j V(p_ij dP_ij) + (ak^2 + V(L_i)) D_i^2                     of P and dP, as the profile says
    V(dS_ij) = rvar(dS_ij) + p_ij^2 vs_ij (dP_ij - D_i + dL_i)^2 + p_ij^2 (a^2 sum_c do_ic^2 v_jc^2 [+ rvar(dP_ij)])
               + a^2 p_ij^2 (dP_ij^2 + D_i^2 + dL_i^2)                 dL, the LSE's gradient, is 0 where it has none
    V(L_i)   = sum_j p_ij^2 vs_ij                                       error of a row's normaliser, common to its keys
    V(dq_ic) = scale^2 sum_j V(dS_ij) k_jc^2 + V(D_i) (scale sum_j p_ij g_ij k_jc)^2 + V(L_i) dq_ic^2 + rvar(dq_ic)
    V(dk_jc) = scale^2 sum_i (V(dS_ij) + p_ij^2 g_ij^2 V(D_i) + V(L_i) dS_ij^2) q_ic^2 + rvar(dk_jc)
    V(dv_jc) = sum_i (rvar(p_ij) + p_ij^2 (vs_ij + V(L_i))) do_ic^2 + rvar(dv_jc)

Where dP is stored, dS can round alike in all of a row, a column (``rounded_alike``); then dq and dk also have

    (scale sum_j g_ij m_ij |k_jc|)^2 / 25   and   (scale sum_i g_ij m_ij |q_ic|)^2 / 25   with m the most that it does.

ak^2 = a^2 + 0.09 u32^2 n for a float32 sum over n keys, and likewise over the query rows of a group (``sums_of``);
dq, dk and dv have such a term of their own, as scale^2 ak^2 sum_j dS_ij^2 k_jc^2. dv also allows for probabilities that
are flushed, and an LSE for sums over many channels that are cut off alike (``cut_off``).

Formats narrower than the dtype's (TF32 products and the like) add terms of their own: see narrow.py.

0.18 is E[eps^2] / u^2 of round-to-nearest for mantissas spread as 1/x. Bracketed terms apply where the backend's
profile says so. The margin between z = 1 and the verdict's z = 10 is measured, not assumed: see docs/oracle.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_fuzz.reference.attention import Forward, Gradients, sum_groups
from attn_fuzz.reference.computation import Computation
from attn_fuzz.reference.narrow import ByKey, KeyAlike
from attn_fuzz.reference.profile import ALIKE
from attn_fuzz.reference.rounding import flush_variance
from attn_fuzz.reference.sums import Sums, sums_of
from attn_fuzz.reference.terms import Document, Terms


class Variances(NamedTuple):
    """Error variances of one document's results, shaped as the results (dk, dv per K/V head)."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    degrees: dict[str, torch.Tensor]
    """Independent errors in each row of out, dq, dk and dv, without the channels."""
    gradients: Gradients
    """What the variances are about, dk and dv per K/V head, computed on the way."""


def degrees_of_freedom(total: torch.Tensor, sources: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:
    """How many independent errors the channels of a row share, between 1 and their number.

    A row's error is a sum over sources j (keys, or queries) of a scalar error times a vector over channels, plus the
    rounding of each channel. With s_j the variance that source j puts into the row, all channels together, the matrix
    of its error has (tr A)^2 / tr A^2 = 1 / (1 / channels + sum_j s_j^2 / (sum_j s_j)^2) degrees of freedom where the
    vectors are in general position.

    Args:
        total: ``[..., rows]``, the row's whole variance.
        sources: ``[..., rows]``, ``sum_j s_j^2``.
        rounding: ``[..., rows, d]``, rounding variance of the stored result.
    """
    concentration = (sources + rounding.square().sum(-1)) / total.square()
    return 1 / (1 / rounding.shape[-1] + concentration.nan_to_num(1.0).clamp(0, 1))


def concentrated(weights: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """``sum_j (weight_ij |vector_j|^2)^2``."""
    return (weights.square() @ vectors.sum(-1, keepdim=True).square())[..., 0]


class _Result(NamedTuple):
    """What is said of one gradient."""

    variance: torch.Tensor
    stored: torch.Tensor
    """Its share that is the rounding of each channel by itself."""
    sources: torch.Tensor
    """Squares of what single keys, or rows, put into a row's variance, summed."""

    @property
    def degrees(self) -> torch.Tensor:
        return degrees_of_freedom(self.variance.sum(-1), self.sources, self.stored)


def _of_dq(t: Terms, dq: torch.Tensor) -> _Result:
    scale, rounded = t.how.scale, t.how.rvar(dq)
    stored = (1 + t.sums.stored_dq + t.sums.atomic_dq) * rounded
    seen = (t.pg @ t.k).square()
    by_key = t.var_ds @ t.k2 + t.var_delta * seen + t.dq_over_keys * (t.ds2 @ t.k2)
    variance = scale**2 * by_key + t.shared * dq.square() + stored
    sources = (
        scale**4 * concentrated(t.var_ds + t.dq_over_keys * t.ds2, t.k2)
        + (t.var_delta[..., 0] * (scale**2 * seen.sum(-1))).square()
        + (t.shared[..., 0] * dq.square().sum(-1)).square()
    )
    alike = []
    if t.narrow:
        narrow = ALIKE * (t.narrow.scores_alike * dq).square()
        variance = variance + scale**2 * (t.ds2 @ t.narrow.of_input(t.k)) + narrow
        alike = [narrow]
    if t.alike is not None:
        of_row = ALIKE * (t.alike @ t.k.abs()).square()
        variance = variance + of_row
        alike = [of_row, *alike]
    for each in alike:
        sources = sources + each.sum(-1).square()
    if t.profile.scales_gradients:
        variance = variance + rounded
    return _Result(variance, stored, sources)


class _Keys(NamedTuple):
    """dK or dV of a document: what each query head has of it, and how it is stored."""

    heads: torch.Tensor
    """The gradient per query head."""
    total: torch.Tensor
    """Per K/V head."""
    variance: torch.Tensor
    """Per query head, of what is added up."""
    sources: torch.Tensor
    """As those of ``_Result``, per query head."""
    atomic: int
    """How often the share of a tile is added to it in the dtype."""


def _dk(t: Terms, heads: torch.Tensor, total: torch.Tensor) -> _Keys:
    scale, over_rows = t.how.scale, t.over_rows(t.sums.atomic_dk)
    by_key = (t.var_ds + t.pg.square() * t.var_delta + (over_rows + t.shared) * t.ds2).transpose(-1, -2)
    variance = scale**2 * (by_key @ t.q2)
    if t.narrow:
        variance = variance + scale**2 * (t.ds2.transpose(-1, -2) @ t.narrow.of_input(t.q))
    if t.profile.scales_gradients:
        variance = variance + t.how.rvar(heads)
    return _Keys(heads, total, variance, scale**4 * concentrated(by_key, t.q2), t.sums.atomic_dk)


def _dv(t: Terms, heads: torch.Tensor, total: torch.Tensor) -> _Keys:
    over_rows = t.over_rows(t.sums.atomic_dv)
    by_key = (t.rp + t.w + flush_variance(t.p) + (over_rows + t.shared) * t.p2).transpose(-1, -2)
    variance = by_key @ t.dout2
    if t.narrow:
        variance = variance + t.p2.transpose(-1, -2) @ t.narrow.of_input(t.dout)
    return _Keys(heads, total, variance, concentrated(by_key, t.dout2), t.sums.atomic_dv)


def _of_keys(t: Terms, keys: _Keys, group: int) -> _Result:
    """dK or dV, summed over the query heads of a group and stored."""
    variance, times = keys.variance, t.sums.stored
    if t.profile.expands_kv and group > 1:
        variance = variance + (1 + times) * t.how.rvar(keys.heads)
        times = 0
    stored = (1 + times + keys.atomic) * t.how.rvar(keys.total)
    sources = sum_groups(keys.sources[..., None], group)[..., 0]
    return _Result(sum_groups(variance, group) + stored, stored, sources)


def _rounded_alike(t: Terms, dk: _Result, group: int) -> _Result:
    """With what roundings of dS that agree put into dK."""
    if t.alike is None:
        return dk
    alike = ALIKE * sum_groups(t.alike.transpose(-1, -2) @ t.q.abs(), group).square()
    return dk._replace(variance=dk.variance + alike, sources=dk.sources + alike.sum(-1).square())


def _keys_alike(t: Terms, gradients: Gradients, group: int) -> KeyAlike | None:
    """What narrow formats do to a key in every row that it meets."""
    if not t.narrow:
        return None
    met = ByKey(sum_groups(t.p.sum(-2)[..., None], group)[..., 0], sum_groups(t.p.transpose(-1, -2) @ t.q, group))
    keys, values = (x.unflatten(-3, (-1, group)).select(-3, 0) for x in (t.k, t.v))
    return t.narrow.of_keys(keys, values, gradients, met, t.how.scale)


def _of_out(t: Terms) -> _Result:
    sources = concentrated(t.rp + t.sums.over_keys * t.p + t.w, t.v2)
    if t.alike_out is not None:
        sources = sources + t.alike_out.sum(-1).square()
    return _Result(t.var_out, t.how.rvar(t.out), sources)


def attention_variances(
    document: Document, result: Forward, how: Computation, *, group: int = 1, sums: Sums | None = None
) -> Variances:
    """The budget of one document, or of several of one size.

    Args:
        document: its tensors.
        result: of ``attention.forward`` on them.
        how: the call computes.
        group: query heads per K/V head.
        sums: of the call; those of a call of these documents when not given.
    """
    sums = sums or sums_of(document.q.shape[-2], document.k.shape[-2], how.profile, group)
    t = Terms(document, result, how, sums)
    dq, dk = how.scale * (t.ds @ t.k), how.scale * (t.ds.transpose(-1, -2) @ t.q)
    dv = t.p.transpose(-1, -2) @ t.dout
    gradients = Gradients(dq, sum_groups(dk, group), sum_groups(dv, group))
    of_dk = _rounded_alike(t, _of_keys(t, _dk(t, dk, gradients.dk), group), group)
    of_dv = _of_keys(t, _dv(t, dv, gradients.dv), group)
    if (alike := _keys_alike(t, gradients, group)) is not None:
        of_dk = _Result(of_dk.variance + alike.dk, of_dk.stored, of_dk.sources + alike.dk_sources)
        of_dv = _Result(of_dv.variance + alike.dv, of_dv.stored, of_dv.sources + alike.dv_sources)
    named = {"out": _of_out(t), "dq": _of_dq(t, dq), "dk": of_dk, "dv": of_dv}
    variances = {name: found.variance for name, found in named.items()}
    degrees = {name: found.degrees for name, found in named.items()}
    return Variances(**variances, lse=t.var_lse, degrees=degrees, gradients=gradients)
