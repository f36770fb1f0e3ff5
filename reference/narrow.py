"""What formats narrower than the case's put into the budget: TF32, bf16 or fp16 inside of a float32 kernel.

Nothing here is asked of a profile that declares no such format. Where one does, with F the format of products and
rF(x) the error variance of an operand x in it (``operand_variance``), 0 for inputs whose dtype F holds exactly:

    V(s_ij)  += scale^2 sum_c (rF(q) k^2 + q^2 rF(k))                   each operand of S = Q K^T rounded
    V(o_ic)  += sum_j (rF(p_ij) v_jc^2 + p_ij^2 rF(v_jc))               of O = P V
    V(dP_ij) += sum_c (rF(do_ic) v_jc^2 + do_ic^2 rF(v_jc))             of dP = dO V^T
    V(D_i)   += sum_c rF(do_ic) o_ic^2                                  D = rowsum(dO * O) has dO as it is, dP has not
    V(dq_ic) += scale^2 sum_j (rF(dS_ij) k_jc^2 + dS_ij^2 rF(k_jc))     of dQ = dS K, and dK and dV likewise

with V(D) where D is that of the output. S, dP and dS, and P, that are stored in a format G of their own add rvar_G of
themselves wherever they are used.

Errors that agree are no variance: they are allowed for in full, as squares of the most that they can be, over 25
(``ALIKE``), so that they alone reach half of the verdict's limit.

- A tensor core may cut TF32 operands off rather than round them: each shrinks by 0.36 of 2^-10 on average and by 2^-10
  at most, and so all terms of a product shrink alike. O and dV shrink as two operands do, dQ and dK as four (dP is a
  product itself), the LSE moves by what two do to the row's mean score, and D by two where dP is cut off and O is not.
- P of nearly equal weights is rounded alike in all of a row or column: O, dQ, dK and dV move by one unit roundoff, and
  by the largest error of an exponential that is coarse.
- An input is rounded the same in every row that it meets. Where queries have a direction in common, the error of a key
  moves its weight alike in all of them; so it does where output gradients have one and the value is rounded. With w_j
  = sum_i p_ij, each key's own error adds to dv_jc^2 and to dk_jc^2, and to the latter what dP's does:

    scale^2 sum_c rF(k_jc) (sum_i p_ij q_ic / w_j)^2  and  scale^2 sum_c rF(v_jc) (dv_jc / w_j)^2 (sum_i p_ij q_ic)^2
"""

from __future__ import annotations

import dataclasses
from typing import Final, NamedTuple

import torch

from attn_fuzz.reference.attention import Gradients
from attn_fuzz.reference.profile import (
    ALIKE,
    COARSE,
    ROUNDING_SECOND_MOMENT,
    SMALLEST_NORMAL,
    SUBNORMAL_SPACING,
    UNIT_ROUNDOFF,
    Profile,
)

LARGEST_ERROR: Final = {"": 0.0, "tf32": 2.0**-10, "bf16": UNIT_ROUNDOFF["bf16"], "fp16": UNIT_ROUNDOFF["fp16"]}
"""The most, relative to a normal number, that storing it in a format may be off; of TF32 by cutting it off."""

_HELD: Final = {"tf32": ("bf16", "fp16"), "bf16": ("bf16",), "fp16": ("fp16",), "": ("fp32", "bf16", "fp16")}
"""Dtypes whose every number a format holds."""


def operand_variance(x: torch.Tensor, form: str) -> torch.Tensor:
    """Error variance of an operand in a format, ``0.18 largest^2 x^2`` for normal numbers.

    Of TF32 that is the second moment of cutting off, its mean included; rounding to nearest makes a quarter of it.
    Numbers below the format's range come out as multiples of its subnormal spacing or, of TF32 and bf16, as 0.
    """
    squares = x.square()
    normal = squares * (ROUNDING_SECOND_MOMENT * LARGEST_ERROR[form] ** 2)
    if form == "fp16":
        subnormal = (SUBNORMAL_SPACING[form] ** 2 / 12) * x.sign().square()
        return torch.where(x.abs() < SMALLEST_NORMAL[form], subnormal.minimum(squares), normal)
    return torch.where(x.abs() < 2 * SMALLEST_NORMAL["fp32"], squares, normal)


def _plus(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    return second if first is None else first + second


class ByKey(NamedTuple):
    """What the rows have in common that each key meets, summed over them and over the query heads of its group."""

    weight: torch.Tensor
    """``[..., k]``: sum of p."""
    queries: torch.Tensor
    """``[..., k, d]``: sum of p q."""


class KeyAlike(NamedTuple):
    """Variances of dK and dV from errors that agree, and what each puts into a row's variance, squared and summed."""

    dk: torch.Tensor
    dv: torch.Tensor
    dk_sources: torch.Tensor
    dv_sources: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Narrow:
    """The formats of one case and profile; methods say what each of them adds to a variance.

    Shapes are those of budget.py and vectorised.py alike: ``[..., q, k]``, ``[..., q, d]`` and ``[..., k, d]``.
    """

    dtype: str
    """Of the case."""
    products: str
    """Format of operands, empty where the dtype is that."""
    scores: str
    """Format that S, dP and dS are stored in, empty where no other flag of the profile says it."""
    probabilities: str
    """The same of P."""
    exponential: float
    """Largest error of a coarse exponential, 0 for others."""

    @classmethod
    def of(cls, dtype: str, profile: Profile) -> Narrow | None:
        """None where the profile declares no format of its own, or the case has it anyway."""
        products, scores, probabilities = profile.products, profile.scores_dtype, profile.probabilities_dtype
        if products == dtype:
            products = ""
        if scores == dtype and profile.rounds_scores and profile.rounds_dp:
            scores = ""
        if probabilities == dtype and profile.stores_probabilities:
            probabilities = ""
        exponential = profile.exp_error if profile.exp_error > COARSE else 0.0
        found = cls(dtype, products, scores, probabilities, exponential)
        return found if products or scores or probabilities or exponential else None

    @classmethod
    def projecting(cls, dtype: str, profile: Profile) -> Narrow | None:
        """The same of a layer's projections."""
        form = "" if profile.projections == dtype else profile.projections
        return cls(dtype, form, "", "", 0.0) if form else None

    @property
    def holds_inputs(self) -> bool:
        """Whether q, k, v and dO are operands as they are."""
        return self.dtype in _HELD[self.products]

    @property
    def cut(self) -> float:
        """The most by which cutting off shrinks one operand: of inputs that TF32 holds, and other formats, 0."""
        return LARGEST_ERROR["tf32"] if self.products == "tf32" and not self.holds_inputs else 0.0

    @property
    def weights(self) -> float:
        """The most by which the weights of a row may be off alike."""
        own = LARGEST_ERROR[self.products] if self.products != "tf32" or self.holds_inputs else 0.0
        return own + self.kept_alike

    @property
    def kept_alike(self) -> float:
        """The same of P as it is kept."""
        return LARGEST_ERROR[self.probabilities] + self.exponential

    @property
    def weight_forms(self) -> tuple[str, ...]:
        """Formats of sixteen bits that P is rounded to."""
        return tuple(form for form in (self.products, self.probabilities) if form not in ("", "tf32"))

    @property
    def output_alike(self) -> float:
        """The most by which roundings that agree move O and dV, relative to them."""
        return 2 * self.cut + self.weights

    @property
    def scores_alike(self) -> float:
        """The most by which they move dQ and dK."""
        return 4 * self.cut + self.weights

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """Variance of an input's rounding as an operand."""
        return torch.zeros_like(x) if self.holds_inputs else operand_variance(x, self.products)

    def product_variance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Variance of ``x @ y.T`` of two inputs, from their roundings as operands."""
        x_rounded, y_rounded = self.of_input(x), self.of_input(y)
        return x_rounded @ y.square().transpose(-1, -2) + x.square() @ y_rounded.transpose(-1, -2)

    def of_scores(self, q: torch.Tensor, k: torch.Tensor, scale: float, scores: torch.Tensor) -> torch.Tensor:
        """Of uncapped scores, whose operands or which themselves are stored."""
        found = scale**2 * self.product_variance(q, k)
        return found + operand_variance(scores, self.scores) if self.scores else found

    def of_dp(self, dout: torch.Tensor, v: torch.Tensor, dp: torch.Tensor) -> torch.Tensor:
        """Of dP."""
        found = self.product_variance(dout, v)
        return found + operand_variance(dp, self.scores) if self.scores else found

    def stored_weights(self, p: torch.Tensor) -> torch.Tensor | None:
        """Of P as it is kept, for all uses of it; None where it is not."""
        return operand_variance(p, self.probabilities) if self.probabilities else None

    def stored_too(self, p: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor | None:
        """What of P's rounding other formulas use: that in the dtype where it is kept in it, and that in its format."""
        mine = self.stored_weights(p)
        return stored if mine is None else _plus(stored, mine)

    def of_weights(self, p: torch.Tensor) -> torch.Tensor:
        """Of P as an operand."""
        found = self.stored_weights(p)
        if self.products:
            found = _plus(found, operand_variance(p, self.products))
        return torch.zeros_like(p) if found is None else found

    def of_ds(self, ds: torch.Tensor, factor: float) -> torch.Tensor:
        """Of dS, stored before or after it is multiplied by the scale, and as an operand.

        Args:
            ds: before the scale.
            factor: the scale, where it is below 1 (``budget.stored_ds_variance``).
        """
        forms = [form for form in (self.products, self.scores) if form]
        found = torch.zeros_like(ds)
        for form in forms:
            found = found + operand_variance(factor * ds, form) / factor**2
        return found

    def of_delta(self, dout: torch.Tensor, out: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Of D taken from the output, where it is not what P and dP as they are would give."""
        found = (self.of_input(dout) * out.square()).sum(-1, keepdim=True)
        return found + ALIKE * (self.output_alike * delta).square()

    def of_lse(self, mean_score: torch.Tensor) -> torch.Tensor:
        """Of the LSE, from errors that all scores of a row have alike.

        Args:
            mean_score: ``sum_j p_ij s_ij``, of scores before the cap.
        """
        moved = ((2 * self.cut + LARGEST_ERROR[self.scores]) * mean_score).square()
        return ALIKE * (moved + self.exponential**2)

    def of_keys(self, k: torch.Tensor, v: torch.Tensor, gradients: Gradients, met: ByKey, scale: float) -> KeyAlike:
        """What agrees of a key's dK and dV: in all rows, and of its own rounding in every row that sees it.

        Args:
            k: keys.
            v: values.
            gradients: dK and dV, summed over the group.
            met: what the rows have in common.
            scale: softmax scale.
        """
        some = met.weight.clamp_min(1e-300)[..., None]
        by_key = scale**2 * (self.of_input(k) * (met.queries / some).square()).sum(-1, keepdim=True)
        by_value = scale**2 * (self.of_input(v) * (gradients.dv / some).square()).sum(-1, keepdim=True)
        dk2, dv2 = gradients.dk.square(), gradients.dv.square()
        of_dk = (ALIKE * self.scores_alike**2 * dk2, by_key * dk2, by_value * met.queries.square())
        of_dv = (ALIKE * self.output_alike**2 * dv2, by_key * dv2)
        return KeyAlike(
            sum(of_dk[1:], of_dk[0]),
            sum(of_dv[1:], of_dv[0]),
            torch.stack([x.sum(-1).square() for x in of_dk]).sum(0),
            torch.stack([x.sum(-1).square() for x in of_dv]).sum(0),
        )
