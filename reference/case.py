"""The case: one frozen, JSON-round-tripping value that says everything about an experiment."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from typing import Any, Final

from attn_fuzz.reference.case_format import CaseError as CaseError
from attn_fuzz.reference.case_format import NewerVersion, counted, require_format
from attn_fuzz.reference.case_types import DTYPES as DTYPES
from attn_fuzz.reference.case_types import FAR_MEMORIES as FAR_MEMORIES
from attn_fuzz.reference.case_types import INTEGER_LISTS, check_types
from attn_fuzz.reference.case_types import LEVELS as LEVELS
from attn_fuzz.reference.case_types import MEMORIES as MEMORIES
from attn_fuzz.reference.case_types import NORMS as NORMS
from attn_fuzz.reference.case_types import ROTARIES as ROTARIES
from attn_fuzz.reference.case_types import VALUES as VALUES
from attn_fuzz.reference.case_types import WEIGHTS as WEIGHTS
from attn_fuzz.reference.layout import cut_inside_document

MAX_HEAD_DIM: Final = 576
"""Of keys of latent attention: 512 channels and 64 for rotary."""
# Keeps row and channel counters inside the fields of the value generator (values.py).
MAX_TOKENS: Final = 1 << 24
MAX_HEADS: Final = 1 << 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that decides an experiment; the same case gives the same tensors on every machine.

    A ``layer`` case is a packed sequence that a buffered-K/V layer sees one micro-sequence after another. A ``kernel``
    case is a single varlen call, where every document may have its own number of keys.

    Missing JSON keys take the defaults below and unknown ones are errors, so a saved case survives new fields.
    """

    level: str = "layer"
    """``layer`` or ``kernel``."""
    lengths: tuple[int, ...] = (1,)
    """Tokens of each document, zero allowed; at kernel level its queries."""
    key_lengths: tuple[int, ...] | None = None
    """Kernel level only: keys of each document; None means as many as queries."""
    padding: int = 0
    """Layer level only: padding tokens behind the last document; they form one last document of their own."""
    cuts: tuple[int, ...] = ()
    """Layer level only: where the packed sequence is cut into micro-sequences, increasing, ends excluded."""
    ranks: int = 1
    """Layer level only: sequence-data-parallel ranks that share each micro-sequence's queries."""
    tensor_ranks: int = 1
    """Layer level only: ranks that share the query heads of each of those slices; they need a single K/V head."""
    document_ids: tuple[int, ...] | None = None
    """Names that key documents' values, so that each keeps them when others are shrunk away; None: 0, 1, ..."""
    padding_ids: tuple[int, ...] = ()
    """Layer level only: ids of documents that are padding between others, as that behind the last one is."""
    heads: int = 1
    """Query heads."""
    kv_heads: int = 1
    """Key/value heads; must divide ``heads``. Query head h reads K/V head ``h // (heads // kv_heads)``."""
    head_dim: int = 16
    """Channels per head of queries and keys, 1 to 576; of values, too, unless ``head_dim_v`` says otherwise."""
    hidden: int = 16
    """Layer level only: channels of the layer's input and output."""
    causal: bool = True
    """Bottom-right causal: query i of a document with q queries and k keys sees keys ``<= i + k - q``."""
    window: tuple[int, int] = (-1, -1)
    """Keys seen to the left and right of the query's own, that one excluded; -1 means no bound."""
    scale: float | None = None
    """Softmax scale; None means ``head_dim ** -0.5``."""
    softcap: float = 0.0
    """Scores become ``softcap * tanh(score / softcap)``; 0 means off."""
    query_norm: str = "none"
    """Layer level only: ``none`` or ``rms``, over each head's channels, before rotary."""
    key_norm: str = "none"
    """Layer level only: as ``query_norm``, for keys."""
    value_norm: str = "none"
    """Layer level only: as ``query_norm``, for values."""
    shared_key_value: bool = False
    """Layer level only: one projection serves as key and value (each with its own norm; only keys are rotated)."""
    rotary: str = "none"
    """Layer level only: ``none``, ``default``, or ``proportional`` (only a leading share of the channels turns)."""
    rotary_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 0.5
    """Share of the channel pairs that turn with ``proportional``."""
    dtype: str = "fp32"
    """``fp32``, ``bf16`` or ``fp16``: what inputs, weights and K/V are stored in."""
    values: str = "gaussian"
    """Value mode of inputs and output gradients (reference/values.py)."""
    weights: str = "gaussian"
    """Layer level only: ``gaussian``, or ``selection`` (each projection copies channels: exact in every dtype)."""
    seed: int = 0
    """Value seed."""
    memory: str = "contiguous"
    """How the tensors handed to the kernel lie in memory (reference/memory.py, far_memory.py)."""
    capacity: int = 0
    """Rows beyond the packed sequence: of the K/V buffer, or of all tensors of a kernel case; nothing may read them."""
    lse_gradient: bool = False
    """Kernel level only: the LSE has a gradient of its own, which goes into the backward beside the output's."""
    loose_max_seqlen: tuple[int, int] = (0, 0)
    """Kernel level only: by how much ``max_seqlen_q`` and ``max_seqlen_k`` exceed the longest document, as bounds do
    that are the same for every call."""
    gaps: tuple[int, int] = (0, 0)
    """Kernel level only: rows behind each document's queries, and behind its keys, that are nobody's; prefix sums say
    where documents begin, and ``seqused`` how long they are."""
    head_dim_v: int | None = None
    """Kernel level only: channels per head of values and of the output, 1 to 576; None: as many as ``head_dim``."""

    def __post_init__(self) -> None:
        for name in INTEGER_LISTS:
            value = getattr(self, name)
            if value is not None or name not in ("key_lengths", "document_ids"):
                if isinstance(value, str) or not hasattr(value, "__iter__"):
                    raise CaseError(f"{name} must be a list of whole numbers, not {value!r}")
                object.__setattr__(self, name, tuple(value))
        if self.head_dim_v == self.head_dim:
            # One way to say it: cases are compared, and saved without what is at its default.
            object.__setattr__(self, "head_dim_v", None)
        check_types(self)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def tokens(self) -> int:
        """Query tokens of the packed sequence, padding included."""
        return sum(self.lengths) + self.padding

    @property
    def packed_lengths(self) -> tuple[int, ...]:
        """Lengths of all documents; padding counts as a last one."""
        return (*self.lengths, self.padding) if self.padding else self.lengths

    @property
    def packed_key_lengths(self) -> tuple[int, ...]:
        """Keys of all documents, in the order of ``packed_lengths``."""
        return self.packed_lengths if self.key_lengths is None else self.key_lengths

    @property
    def packed_ids(self) -> tuple[int, ...]:
        """Value names of all documents; the padding's is one that no document can have."""
        ids = tuple(range(len(self.lengths))) if self.document_ids is None else self.document_ids
        return (*ids, MAX_TOKENS) if self.padding else ids

    @property
    def padding_spans(self) -> tuple[tuple[int, int], ...]:
        """``[begin, end)`` of all padding in the packed sequence: between documents, and behind the last one."""
        padding = {MAX_TOKENS, *self.padding_ids}
        rows = zip(self.packed_ids, self.packed_lengths, itertools.accumulate(self.packed_lengths), strict=True)
        return tuple((end - length, end) for name, length, end in rows if length and name in padding)

    @property
    def all_ranks(self) -> int:
        """Processes that a case is spread over."""
        return self.ranks * self.tensor_ranks

    @property
    def value_dim(self) -> int:
        """Channels per head of values, of the output and of its gradient."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def softmax_scale(self) -> float:
        """The scale in effect."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def effective_window(self) -> tuple[int, int]:
        """(left, right) with causality folded in: what decides which keys a query sees."""
        return (self.window[0], 0) if self.causal else self.window

    def replace(self, **changes: Any) -> Case:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, level and lengths always, ready for JSON."""
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("level", "lengths") or value != field.default:
                result[field.name] = list(value) if isinstance(value, tuple) else value
        return result

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    def in_short(self) -> str:
        """``to_json`` for people: lists of hundreds of documents are counted, and that cannot be read back."""
        return json.dumps({name: counted(value) for name, value in self.to_dict().items()})

    @classmethod
    def from_dict(cls, data: Any) -> Case:
        """The inverse of ``to_dict``; it may also have a ``format``.

        Raises:
            NewerVersion: for a key or format that only newer versions have.
            CaseError: for anything else that is not a possible case.
        """
        if not isinstance(data, Mapping):
            raise CaseError(f"a case is a JSON object, not {type(data).__name__}")
        require_format(data, "the case")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(str(key) for key in data if key not in known and key != "format"):
            raise NewerVersion(
                f"unknown key {unknown[0]!r} in case: it is misspelt, or was written by a newer version (then upgrade "
                f"attn-fuzz); known keys are {', '.join(sorted(known))}"
            )
        return cls(**{key: value for key, value in data.items() if key != "format"})

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The inverse of ``to_json``.

        Raises:
            CaseError: for malformed JSON and impossible cases.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CaseError(f"the case is not valid JSON: {error}") from None
        return cls.from_dict(data)


def _check_ranges(case: Case) -> None:
    if not case.lengths:
        raise CaseError("lengths is empty: a case has at least one document")
    if min(case.lengths) < 0 or case.padding < 0 or case.capacity < 0:
        raise CaseError("lengths, padding and capacity cannot be negative")
    if not 1 <= case.tokens <= MAX_TOKENS or len(case.lengths) >= MAX_TOKENS:
        raise CaseError(f"a case has between 1 and {MAX_TOKENS} tokens, this one has {case.tokens}")
    for name in ("head_dim", "head_dim_v"):
        if (dim := getattr(case, name)) is not None and not 1 <= dim <= MAX_HEAD_DIM:
            raise CaseError(f"{name} must be between 1 and {MAX_HEAD_DIM}, not {dim}")
    if not 1 <= case.heads < MAX_HEADS or case.kv_heads < 1 or case.heads % case.kv_heads:
        raise CaseError(f"kv_heads must divide heads, but {case.heads} heads cannot share {case.kv_heads} kv_heads")
    if len(case.window) != 2 or min(case.window) < -1:
        raise CaseError(f"window is [left, right], each -1 or more, not {list(case.window)}")
    if case.softcap < 0:
        raise CaseError(f"softcap cannot be negative, but it is {case.softcap}")
    if case.hidden < 1 or case.ranks < 1 or case.tensor_ranks < 1:
        raise CaseError("hidden, ranks and tensor_ranks must be at least 1")
    if not 0 <= case.seed < 1 << 32:
        raise CaseError(f"seed must be between 0 and {(1 << 32) - 1}, not {case.seed}")
    if case.rotary_theta <= 1 or not 0 < case.rotary_fraction <= 1:
        raise CaseError("rotary_theta must exceed 1 and rotary_fraction must lie in (0, 1]")


def _check_combinations(case: Case) -> None:
    if case.causal and case.window[1] > 0:
        raise CaseError(f"a causal case sees no keys to the right, but window asks for {case.window[1]}")
    if case.rotary != "none" and case.head_dim % 2:
        raise CaseError(f"rotary turns pairs of channels, but head_dim {case.head_dim} is odd")
    if case.document_ids is not None:
        ids = case.document_ids
        if len(ids) != len(case.lengths) or len(set(ids)) != len(ids) or not all(0 <= i < MAX_TOKENS for i in ids):
            raise CaseError("document_ids must name every document once, with numbers from 0")
    if case.level == "kernel":
        _check_kernel(case)
    else:
        _check_layer(case)


_LAYER_ONLY = [
    "padding",
    "padding_ids",
    "cuts",
    "ranks",
    "tensor_ranks",
    "hidden",
    "query_norm",
    "key_norm",
    "value_norm",
    "shared_key_value",
    "rotary",
    "rotary_theta",
    "rotary_fraction",
    "weights",
]


def _check_kernel(case: Case) -> None:
    for name in _LAYER_ONLY:
        # A field's default is an attribute of the class.
        if getattr(case, name) != getattr(Case, name):
            raise CaseError(f"{name} belongs to layer cases, but this is a kernel case")
    if case.key_lengths is not None:
        if len(case.key_lengths) != len(case.lengths) or min(case.key_lengths) < 0:
            raise CaseError("key_lengths must give every document its number of keys, zero or more")
        if sum(case.key_lengths) > MAX_TOKENS:
            raise CaseError(f"a case has at most {MAX_TOKENS} keys")

    _check_sides(case)


def _check_sides(case: Case) -> None:
    """Of what a kernel case says of queries and of keys apart."""
    for name in ("loose_max_seqlen", "gaps"):
        if len(sides := getattr(case, name)) != 2 or min(sides) < 0:
            raise CaseError(f"{name} is [queries, keys], each 0 or more, not {list(sides)}")
    documents = len(case.lengths)
    for gap, lengths in zip(case.gaps, (case.lengths, case.packed_key_lengths), strict=True):
        if sum(lengths) + documents * gap > MAX_TOKENS:
            raise CaseError(f"a case has at most {MAX_TOKENS} rows, those between documents included")


def _check_layer(case: Case) -> None:
    for name in ("loose_max_seqlen", "gaps"):
        if getattr(case, name) != getattr(Case, name):
            raise CaseError(f"{name} belongs to kernel cases: a layer makes its calls itself")
    if case.lse_gradient:
        raise CaseError("lse_gradient belongs to kernel cases: a layer keeps its LSE to itself")
    if case.memory in FAR_MEMORIES:
        raise CaseError(
            f"memory {case.memory} belongs to kernel cases: where a K/V buffer lies is the layer's business"
        )
    if case.head_dim_v is not None:
        raise CaseError("head_dim_v belongs to kernel cases: a layer projects keys and values alike")
    if case.memory == "broadcast":
        raise CaseError("memory broadcast belongs to kernel cases: a K/V buffer is written, so its rows are its own")
    if case.key_lengths is not None:
        raise CaseError("key_lengths belongs to kernel cases; in a layer case keys come from cuts")
    if list(case.padding_ids) != sorted({*case.padding_ids}) or min(case.padding_ids, default=0) < 0:
        raise CaseError(f"padding_ids must increase, from 0 on, but they are {list(case.padding_ids)}")
    if case.padding_ids and {*case.packed_ids[: len(case.lengths)]} <= {*case.padding_ids}:
        raise CaseError("padding_ids name all documents; one at least is there to be computed")
    bounds = (0, *case.cuts, case.tokens)
    if any(begin >= end for begin, end in itertools.pairwise(bounds)):
        raise CaseError(
            f"cuts must increase strictly between 0 and {case.tokens} tokens, but they are {list(case.cuts)}"
        )
    if not case.causal and (cut := cut_inside_document(case.packed_lengths, case.cuts)) is not None:
        raise CaseError(
            f"a non-causal micro-sequence must end where a document ends, but the cut at {cut} is inside a document"
        )
    if any((end - begin) % case.all_ranks for begin, end in itertools.pairwise(bounds)):
        raise CaseError(f"{case.all_ranks} ranks must divide the tokens of every micro-sequence")
    if case.tensor_ranks > 1 and (case.kv_heads > 1 or case.heads % case.tensor_ranks):
        raise CaseError(
            f"{case.tensor_ranks} tensor_ranks need one K/V head and equal shares of the query heads, but there are "
            f"{case.heads} heads and {case.kv_heads} kv_heads"
        )
