"""What a varlen attention kernel is, what it may say about itself, and how it refuses."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, NamedTuple

import torch

from attn_fuzz.backends.configuration import Configuration as Configuration
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.reference.case import MAX_HEAD_DIM, MEMORIES, ROTARIES, Case
from attn_fuzz.reference.conventions import Conventions
from attn_fuzz.reference.profile import Profile

FLOAT_DTYPES: Final = ("fp32", "bf16", "fp16")
HALF_DTYPES: Final = ("bf16", "fp16")

MOST_DOCUMENTS: Final = (1 << 16) - 1
"""Of a call: CUDA takes no more blocks than that along the second and third sides of a grid."""

PLACEMENTS: Final = ("max_seqlen", "gaps", "far")
"""What may differ where values do not: how loose bounds are, whether rows lie between documents, or far apart."""


class UnsupportedCase(Exception):
    """A backend declares that it does not take this case; the message says which part, in one sentence."""


class BackendUnavailable(Exception):
    """A backend cannot run on this machine; the message says why, in one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a kernel takes. What is not declared here is refused before the kernel sees it."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    max_head_dim: int = MAX_HEAD_DIM
    head_dim_multiple: int = 1
    head_dims: tuple[int, ...] = ()
    """The only ones taken, where there are but a few."""
    head_dims_v: bool | tuple[tuple[int, int], ...] | None = False
    """Values of another number of channels than queries and keys have: any that is a head_dim, too, or these pairs of
    (head_dim, head_dim_v), whatever else is said of head_dim; None: found out by trying. Kernel cases only."""
    gqa: bool = True
    """Fewer K/V heads than query heads."""
    gqa_head_dims_v: bool = True
    """Fewer K/V heads than query heads where values have another number of channels than keys."""
    noncausal: bool = True
    causal: bool = True
    causal_needs_equal_lengths: bool = False
    """Top-left causal: right only where every document has as many queries as keys."""
    window: bool = True
    """Sliding windows of any (left, right)."""
    window_needs_causal: bool = False
    """Windows are taken on the left of causal attention only."""
    window_convention: str = "(left, right), the row itself not counted, -1 for no bound"
    """How the backend itself counts windows; the adapter translates."""
    softcap: bool = True
    scale: bool = True
    """Softmax scales other than ``head_dim ** -0.5``."""
    empty_documents: bool = True
    """Documents with neither queries nor keys."""
    queries_without_keys: bool = True
    """Rows that see no key: documents without keys, or causal ones with more queries than keys."""
    keys_without_queries: bool = True
    """Documents with keys and no queries; their dK and dV are zero."""
    norms: bool = True
    """Layers only: query, key and value norms."""
    rotaries: tuple[str, ...] = ROTARIES
    """Layers only: kinds of rotary embedding."""
    shared_key_value: bool = True
    """Layers only: one projection for keys and values."""
    ranks: bool | tuple[int, ...] = False
    """User layers only: they go over sequence-data-parallel ranks, any number of them or these."""
    tensor_ranks: bool | tuple[int, ...] = False
    """User layers only: any number of tensor-parallel ranks, or these, may share the query heads of each of those."""
    slice_multiple: int = 1
    """User layers only: every rank's slice of every micro-sequence has a multiple of so many tokens."""
    memories: tuple[str, ...] = MEMORIES
    """Memory layouts (reference/memory.py) that the kernel takes."""
    far_memories: tuple[str, ...] = ()
    """Those of them whose elements lie more than 2^31 apart (reference/far_memory.py)."""
    loose_max_seqlen: bool = False
    """``max_seqlen_q`` and ``max_seqlen_k`` may exceed the longest document."""
    gaps: tuple[str, ...] = ()
    """Sides, of ``q`` and ``k``, on which rows between documents may be nobody's."""
    crowds: bool | None = False
    """Takes 65,537 documents in one call, in a second or two; None: found out by trying. False: 65,535 at most."""
    most_scores: int = 0
    """Of a mask over a whole call, its queries by its keys, the most entries that it may have; 0 for any number."""
    placement_keeps_bits: tuple[str, ...] = ()
    """Of ``PLACEMENTS``, those that move no bit of what comes out; others may decide in which order it adds up, and
    only budgets hold."""
    capacity: bool | None = True
    """Tensors with rows beyond the last document, which are part of none; None: found out by trying."""
    finite_rest: bool = False
    """Rows that are no document's, behind the last or between them, have to hold numbers: they are multiplied by 0."""
    isolates_nonfinite: bool | None = True
    """NaN in one document stays out of all others (False for a product with an explicit mask); None: by trying."""
    lse_of_blind_rows: float = -math.inf
    """The LSE of rows that see no key: -inf by definition, +inf by some kernels' convention."""
    lse: bool | None = False
    """User kernels only: they return ``(out, lse)``, with the LSE as in ``Attended``; None: where it looks like one."""
    lse_gradient: bool | None = False
    """Gradients come through the LSE, too; None: as its calls show. One not marked differentiable refuses them."""
    repeatable: bool | None = True
    """The same call twice gives the same bits; None: found out by trying."""
    repeatable_backward: bool | None = True
    """The same for gradients, which some kernels sum up in the order in which blocks happen to finish."""
    batch_invariant: bool = False
    """A document's forward results have the same bits in whatever call it is, alone or with any others."""
    batch_invariant_backward: bool = False
    """The same for gradients, of kernels that promise it of their forward."""
    graphs: bool | None = False
    """Calls can be captured in CUDA graphs, whose replays follow what is in the tensors then; None: as tries show."""
    streams: bool = True
    """Calls run on torch's current stream, or wait for it, and it for them; False: on one of their own."""
    traceable: bool | None = False
    """``torch.compile`` takes calls, alone and in a module; None: as tries show."""
    covers_all_rows: bool = True
    """Rows outside the documents get zeros; False: the kernel leaves them unwritten."""
    compiles: bool | None = False
    """Every configuration is compiled when it is first called: campaigns draw from a few of them, more as time goes on;
    None: found out by timing calls."""
    compiled_first: tuple[Configuration, ...] = ()
    """A compiling backend's, of a campaign's: those that come first, since calls have found that they are taken."""
    configurations: tuple[Configuration, ...] = ()
    """A compiling backend's: nothing else is taken, so that each is compiled once."""
    window_sizes: tuple[int, ...] = ()
    """A compiling backend's, where sizes are part of what it compiles: the only sizes that are drawn."""
    layouts: int = 0
    """A compiling backend's, where shapes are part of what it compiles: from how many layouts is drawn; 0: any."""
    noncausal_cuts: bool = True
    """Layers only: non-causal attention over several micro-sequences, cut between documents."""
    backward: bool = True
    """There is one; without it layers run without autograd, and both they and kernels are judged by what they put out.
    """
    evaluation: bool = False
    """User layers only: forwards run without autograd, too, and are asked to."""
    reusable: bool = False
    """User layers only: an object takes one sequence after another, told of each by ``restart(case)``."""
    rotary_positions: str = "document"
    """User layers only: as of ``reference.conventions``, and so the next two."""
    gradient_rows: str = "kept"
    padding: str = "computed"
    padding_between: bool = False
    """User layers only: padding that is not computed stands between documents, too, not only behind them."""
    arithmetic: Mapping[str, object] | str = dataclasses.field(default_factory=dict, hash=False)
    """User code only: what rounds and what does not, by fields of ``reference.profile.Profile``, or by a name."""

    @property
    def conventions(self) -> Conventions:
        """What a layer does otherwise than the canonical one."""
        return Conventions(
            rotary_positions=self.rotary_positions, gradient_rows=self.gradient_rows, padding=self.padding
        )

    def refusal(self, case: Case, device: str, pairs: Sequence[tuple[int, int]]) -> str | None:
        """Why the kernel does not take a case, or None.

        Args:
            case: the options asked for.
            device: ``cpu`` or ``cuda``.
            pairs: (queries, keys) of every document of every call that the case makes.
        """
        left, right = case.window
        right_bound = case.effective_window[1]
        blind = any(q > 0 and (k == 0 or 0 <= right_bound < q - k) for q, k in pairs)
        rules = (
            (device in self.devices, f"device {device}"),
            (case.dtype in self.dtypes, f"dtype {case.dtype}"),
            *self._rules_of_channels(case),
            (self.gqa or case.heads == case.kv_heads, "fewer kv_heads than heads"),
            (
                self.causal if case.causal else self.noncausal,
                "causal attention" if case.causal else "non-causal attention",
            ),
            (
                not (self.causal_needs_equal_lengths and case.causal) or all(q == k for q, k in pairs),
                "causal documents with different numbers of queries and keys",
            ),
            (self.window or (left < 0 and right < 0), "a sliding window"),
            (
                not self.window_needs_causal or (left < 0 and right < 0) or (case.causal and right <= 0),
                "a sliding window of non-causal attention",
            ),
            (self.softcap or case.softcap == 0, "softcap"),
            (self.scale or case.scale is None, "a softmax scale of its own"),
            (self.lse_gradient is not False or not case.lse_gradient, "a gradient for the LSE"),
            (self.empty_documents or all(q or k for q, k in pairs), "empty documents"),
            (self.queries_without_keys or not blind, "queries without a key"),
            (self.keys_without_queries or all(q or not k for q, k in pairs), "documents with keys and no queries"),
            *self._rules_of_layers(case),
            *self._rules_of_placement(case),
            (
                not self.configurations or Configuration.of(case) in self.configurations,
                "a configuration that it would have to compile",
            ),
        )
        return next((what for holds, what in rules if not holds), None)

    def _rules_of_placement(self, case: Case) -> tuple[tuple[bool, str], ...]:
        """What must hold of where a case's rows lie, with what it is about."""
        lengths, key_lengths = case.packed_lengths, case.packed_key_lengths
        return (
            (self.crowds is not False or len(lengths) <= MOST_DOCUMENTS, f"more than {MOST_DOCUMENTS:,} documents"),
            (
                not self.most_scores or sum(lengths) * sum(key_lengths) <= self.most_scores,
                f"more than {self.most_scores:,} entries of a mask",
            ),
            (case.memory in (*self.memories, *self.far_memories), f"memory layout {case.memory}"),
            (self.capacity is not False or case.level == "layer" or not case.capacity, "rows beyond the last document"),
            (
                self.loose_max_seqlen or case.loose_max_seqlen == (0, 0),
                "a max_seqlen that exceeds the longest document",
            ),
            *(
                (side in self.gaps or not gap, f"gaps between documents of {side}")
                for side, gap in zip("qk", case.gaps)
            ),
        )

    def channels_refused(self, case: Case) -> str | None:
        """What about a case's channels the kernel does not take, or None."""
        return next((what for holds, what in self._rules_of_channels(case) if not holds), None)

    def _rules_of_channels(self, case: Case) -> tuple[tuple[bool, str], ...]:
        """What must hold of the channels of a case, with what it is about."""
        both = case.head_dim_v is not None and case.heads != case.kv_heads
        grouped = (self.gqa_head_dims_v or not both, "values of another head_dim than keys with grouped heads")
        if case.head_dim_v is not None and isinstance(self.head_dims_v, tuple):
            pair = (case.head_dim, case.head_dim_v)
            return ((pair in self.head_dims_v, f"head_dim {pair[0]} with head_dim_v {pair[1]}"), grouped)
        dims = {"head_dim": case.head_dim} | ({} if case.head_dim_v is None else {"head_dim_v": case.head_dim_v})
        rules = [(self.head_dims_v is not False or case.head_dim_v is None, "values of another head_dim than keys")]
        for name, dim in dims.items():
            rules += [
                (dim <= self.max_head_dim, f"{name} {dim}, above {self.max_head_dim}"),
                (dim % self.head_dim_multiple == 0, f"{name} {dim}, no multiple of {self.head_dim_multiple}"),
                (
                    not self.head_dims or dim in self.head_dims,
                    f"{name} {dim}, only {', '.join(map(str, self.head_dims))}",
                ),
            ]
        return (*rules, grouped)

    def _rules_of_layers(self, case: Case) -> tuple[tuple[bool, str], ...]:
        """What must hold of a layer case, with what it is about."""
        apart = self.padding != "computed"
        alone = case.all_ranks == 1 or (self.backward and self.gradient_rows == "kept" and not apart)
        return (
            (self.norms or {case.query_norm, case.key_norm, case.value_norm} == {"none"}, "norms"),
            (case.rotary in self.rotaries, f"rotary {case.rotary}"),
            (self.shared_key_value or not case.shared_key_value, "shared keys and values"),
            (case.causal or self.noncausal_cuts or not case.cuts, "non-causal micro-sequences"),
            (alone, "several ranks, with what is declared of its backward, gradient rows or padding"),
            (not case.padding_ids or (self.padding_between and apart), "padding between documents"),
        )


class Attended(NamedTuple):
    """What a kernel gives back."""

    out: torch.Tensor
    """``[tokens_q, heads, value_dim]``, differentiable with respect to q, k and v."""
    lse: torch.Tensor | None
    """``[heads, tokens_q]`` float32 natural-log row sums, or None where the kernel keeps them.

    Where it requires a gradient, one that is given to it has to come through to q and k.
    """
    path: str
    """Which implementation ran, for the check that the intended one did."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The options of one varlen call, in this project's conventions."""

    scale: float
    causal: bool
    window: tuple[int, int] = (-1, -1)
    """(left, right), the query's own key excluded, -1 for no bound; causal closes the right side."""
    softcap: float = 0.0

    @classmethod
    def of(cls, case: Case) -> AttentionOptions:
        return cls(scale=case.softmax_scale, causal=case.causal, window=case.window, softcap=case.softcap)

    @property
    def effective_window(self) -> tuple[int, int]:
        """(left, right) with causality folded in."""
        return (self.window[0], 0) if self.causal else self.window


class Kernel(abc.ABC):
    """A varlen attention function with a backward.

    One subclass per file of ``backends/kernels``; the file's name is the backend's name. Third-party packages are
    imported inside ``why_unavailable`` and ``attend`` only, so that a backend costs nothing until it is asked for.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    profile: ClassVar[Profile] = Profile()
    paths: ClassVar[frozenset[str]] = frozenset()
    compiled: ClassVar[bool] = False
    """Whether calls are traced by torch's compiler."""
    lse_source: ClassVar[str] = ""
    call_source: ClassVar[str] = ""
    """The call as people write it, for scripts without this project: ``kernel(q, k, v, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k)`` over SCALE, CAUSAL, WINDOW, SOFTCAP, giving out; that of ``lse_source`` (out, lse)."""

    def capabilities_on(self, device: str) -> Capabilities:
        """What the kernel takes on ``cpu`` or ``cuda``."""
        return self.capabilities

    def limit(self, case: Case, calls: Sequence[Sequence[tuple[int, int]]]) -> str | None:
        """A limit that no capability expresses: what about the case is not taken, or None.

        Args:
            case: the options asked for.
            calls: for every varlen call that the case makes, (queries, keys) of its documents.
        """
        return None

    def profile_on(self, device: str) -> Profile:
        """How the kernel computes on ``cpu`` or ``cuda``."""
        return self.profile

    def paths_on(self, device: str) -> frozenset[str]:
        """Names of the implementations that may run on ``cpu`` or ``cuda``; empty where nothing is promised."""
        return self.paths

    def why_unavailable(self, device: str) -> str | None:
        """One line on why the backend cannot run on ``cpu`` or ``cuda`` here, or None when it can."""
        if device not in self.capabilities.devices:
            return f"runs on {' and '.join(self.capabilities.devices)} only"
        if device == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        return None

    @abc.abstractmethod
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: VarlenMetadata, options: AttentionOptions
    ) -> Attended:
        """Attention over packed documents.

        Args:
            q: ``[tokens_q, heads, head_dim]``.
            k: ``[tokens_k, kv_heads, head_dim]``.
            v: ``[tokens_k, kv_heads, value_dim]``.
            metadata: where the documents lie.
            options: scale, masks, softcap.
        """
