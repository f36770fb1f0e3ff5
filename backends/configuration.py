"""What a compiling backend compiles for."""

from __future__ import annotations

from typing import Any, NamedTuple

from attn_fuzz.reference.case import Case


class Configuration(NamedTuple):
    """The options of a case that make a compiling backend compile anew."""

    dtype: str
    head_dim: int
    heads: int
    kv_heads: int
    causal: bool
    window: str = "none"
    """Which sides are bounded: ``none``, ``left``, ``right`` or ``both`` (causality not counted)."""
    softcap: float = 0.0
    head_dim_v: int | None = None
    """As of ``Case``."""

    @classmethod
    def of(cls, case: Case) -> Configuration:
        sides = {(False, False): "none", (True, False): "left", (False, True): "right", (True, True): "both"}
        left, right = case.window
        # A causal case's right side is closed anyway.
        window = sides[left >= 0, right >= 0 and not case.causal]
        heads = (case.heads, case.kv_heads)
        return cls(case.dtype, case.head_dim, *heads, case.causal, window, case.softcap, case.head_dim_v)

    def place(self) -> tuple[Any, ...]:
        """What configurations are put in order by."""
        return tuple(0 if value is None else value for value in self)

    def words(self) -> str:
        """In one line, such as ``bf16 64 4/2 causal left``: dtype, head_dim (of values too, as in ``192-128``), heads,
        mask."""
        sides = {"none": [], "both": ["left", "right"]}.get(self.window, [self.window])
        cap = [f"softcap {self.softcap:g}"] if self.softcap else []
        mask = ["causal" if self.causal else "full", *sides, *cap]
        dims = f"{self.head_dim}" if self.head_dim_v is None else f"{self.head_dim}-{self.head_dim_v}"
        return f"{self.dtype} {dims} {self.heads}/{self.kv_heads} {' '.join(mask)}"
