"""Dense kernels ``[b, s, h, d]``: documents padded to one length, one at a time, or side by side under a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F

from attn_fuzz.adapters.call import OPTIONS, AdaptedKernel, Call, Document, Function, Names, taken
from attn_fuzz.adapters.layouts import arranged, checked, restored
from attn_fuzz.adapters.lse import Lse, require_shape, split
from attn_fuzz.backends.output import as_output

_PADDING: Final = ("mask", "key_mask", "lengths_q", "lengths_k")
"""How a function may be told which rows of a batch are none."""

_IDS: Final = ("mask", "ids", "ids_q", "ids_k")
"""How a function may be told which tokens of a pack belong together."""


def _options(keywords: Mapping[str, str]) -> list[str]:
    """The options that a kernel has whose function is given these: a mask has causality and windows in it."""
    folded = ("causal", "window_size") if "mask" in keywords else ()
    return [name for name in OPTIONS if name in keywords or name in folded]


def _defaults(keywords: Mapping[str, str], lse: Lse | None) -> dict[str, Any]:
    """What is true of such a function."""
    found: dict[str, Any] = {"queries_without_keys": False, "lse": lse is not None}
    if "mask" not in keywords:
        # Where rows are counted from is a convention of the function's own.
        found |= {"causal_needs_equal_lengths": True, "window_needs_causal": True}
    return found


def _seen(document: Document, call: Call, given: Mapping[str, str]) -> torch.Tensor:
    """Which keys each query of a document sees, bool ``[queries, keys]``; what the function does itself is left out."""
    left, right = call.window
    if "causal" in given and call.options.get("causal"):
        right = -1
    if "window_size" in given:
        left, right = -1, 0 if call.options.get("causal") and "causal" not in given else -1
    own = torch.arange(document.queries, device=call.q.device)[:, None] + document.seen - document.queries
    distance = own - torch.arange(document.seen, device=call.q.device)
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen = seen & (distance <= left) if left >= 0 else seen
    return seen & (distance >= -right) if right >= 0 else seen


class _Adapted:
    """A function with what it is given by keyword."""

    def __init__(self, function: Function, layout: str, keywords: Mapping[str, str], lse: Lse | None) -> None:
        self.function, self.layout, self.keywords, self.lse = function, checked(layout), keywords, lse

    def attend(
        self, call: Call, qkv: Sequence[torch.Tensor], given: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(out [b, s, h, d], lse [b, s, h] or None)`` of ``q``, ``k`` and ``v`` in ``[b, s, h, d]``."""
        values = {**call.options, **given}
        keywords = {theirs: values[ours] for ours, theirs in self.keywords.items()}
        q = arranged(qkv[0], self.layout)
        returned = self.function(q, *(arranged(x, self.layout) for x in qkv[1:]), **keywords)
        out, lse = split(returned, self.lse)
        wanted = arranged(as_output(qkv[0], qkv[2]), self.layout)
        out = restored(require_shape(out, wanted.shape, "the output"), self.layout)
        if lse is None:
            return out, None
        lse = (lse if lse.dim() == 3 else lse[None]).transpose(1, 2)
        return out, require_shape(lse, qkv[0].shape[:3], "the LSE, as [b, s, h],")


def _packed(call: Call, rows: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    """Outputs ``[rows, h, d]`` and LSE ``[rows, h]`` at their rows of a pack, zeros and -inf elsewhere."""
    placed = out.new_zeros(len(call.q), *out.shape[1:]).index_put((rows,), out)
    if lse is None:
        return placed
    return placed, lse.new_full((len(call.q), lse.shape[1]), -torch.inf).index_put((rows,), lse).T


def _nothing(call: Call, lse: Lse | None) -> Any:
    out = call.nothing()
    return out if lse is None else (out, call.q.new_full(call.q.shape[1::-1], -torch.inf, dtype=torch.float32))


class _Places:
    """Where rows of documents are in a batch: of each, its row in the pack, its document, and its place in that."""

    def __init__(self, spans: Sequence[slice], device: torch.device) -> None:
        lengths = torch.tensor([span.stop - span.start for span in spans])
        self.lengths = lengths.to(device, torch.int32)
        self.longest = int(lengths.max())
        document = torch.repeat_interleave(torch.arange(len(spans)), lengths)
        place = torch.arange(len(document)) - (lengths.cumsum(0) - lengths)[document]
        row = place + torch.tensor([span.start for span in spans])[document]
        self.row, self.document, self.place = (each.to(device) for each in (row, document, place))

    def padded(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """``[rows, h, d]`` as ``[documents, width, h, d]``, zeros where there are no rows."""
        empty = x.new_zeros(len(self.lengths), width, *x.shape[1:])
        return empty.index_put((self.document, self.place), x[self.row])


def dense(
    function: Function,
    *,
    layout: str = "bshd",
    names: Names | None = None,
    lse: Lse | None = None,
    multiple: int = 1,
    capabilities: Mapping[str, Any] | None = None,
) -> AdaptedKernel:
    """A dense kernel that is told what is padding: documents become elements of a batch, zeros behind each.

        kernel = adapters.dense(
            torch.nn.functional.scaled_dot_product_attention,
            layout="bhsd",
            names={"mask": "attn_mask", "softmax_scale": "scale"},
            capabilities={"gqa": False},
        )

    It gives zeros for documents without queries or without keys, of which the function hears nothing.

    Args:
        function: ``function(q, k, v, **keywords) -> out``, or a tuple that begins with it.
        layout: order of the axes of all four: ``bshd``, ``bhsd``, ...
        names: what it calls the options, and how it is told what is padding, one at least of ``mask`` (bool
            ``[b, 1, s_q, s_k]``, True where a key takes part, causality and window included), ``key_mask`` (bool
            ``[b, s_k]``, True where there is a key), ``lengths_q`` and ``lengths_k`` (int32 ``[b]``). Parameters that
            have these very names need no mention.
        lse: how it gives its LSE (``bhs``, ``bsh``), which then is judged.
        multiple: lengths are padded to a multiple of it.
        capabilities: what else is true of it. By default no query is without a key; and without a mask causal documents
            have as many keys as queries, and only causal ones have windows.

    Raises:
        ValueError: for a name or layout that there is not, and where nothing tells the function what is padding.
    """
    keywords = taken(function, (*_PADDING, *OPTIONS), names)
    if "b" not in layout or not set(keywords) & {"mask", "key_mask", "lengths_k"}:
        raise ValueError(
            "the function is told nothing of padding: say in names what it calls mask, key_mask or lengths_k, and have "
            "b in the layout; or use by_document"
        )
    adapted = _Adapted(function, layout, keywords, lse)

    def run(call: Call) -> Any:
        if not call.documents:
            return _nothing(call, lse)
        rows = _Places([document.rows for document in call.documents], call.q.device)
        keys = _Places([document.keys for document in call.documents], call.q.device)
        width, seen = (-(-places.longest // multiple) * multiple for places in (rows, keys))
        given: dict[str, Any] = {"lengths_q": rows.lengths, "lengths_k": keys.lengths}
        given["key_mask"] = torch.arange(seen, device=call.q.device) < keys.lengths[:, None]
        if "mask" in keywords:
            given["mask"] = _batch_mask(call, width, seen, keywords)
        padded = (rows.padded(call.q, width), keys.padded(call.k, seen), keys.padded(call.v, seen))
        out, found = adapted.attend(call, padded, given)
        place = (rows.document, rows.place)
        return _packed(call, rows.row, out[place], None if found is None else found[place])

    return AdaptedKernel(function, run, _options(keywords), _defaults(keywords, lse), capabilities)


def _batch_mask(call: Call, width: int, seen: int, keywords: Mapping[str, str]) -> torch.Tensor:
    """bool ``[b, 1, width, seen]``; rows of padding see the first key, since a row that sees none is NaN to many."""
    mask = torch.zeros(len(call.documents), 1, width, seen, dtype=torch.bool, device=call.q.device)
    for index, document in enumerate(call.documents):
        mask[index, 0, : document.queries, : document.seen] = _seen(document, call, keywords)
        mask[index, 0, document.queries :, 0] = True
    return mask


def by_document(
    function: Function,
    *,
    layout: str = "bshd",
    names: Names | None = None,
    lse: Lse | None = None,
    capabilities: Mapping[str, Any] | None = None,
) -> AdaptedKernel:
    """A dense kernel without padding: it is called once for each document.

        @adapters.by_document
        def kernel(q, k, v, *, softmax_scale=None, causal=False):
            ...

    It gives zeros for documents without queries or without keys, for which the function is not called. The views that
    it is given lie in memory as the pack does.

    Args:
        function: ``function(q, k, v, **keywords) -> out``, or a tuple that begins with it.
        layout: order of the axes of all four: ``bshd``, ``bhsd``, ... with ``b`` being 1, or ``shd``, ``hsd``.
        names: what it calls the options, and ``mask`` (bool ``[1, 1, s_q, s_k]``, without ``b`` in the layout
            ``[s_q, s_k]``; True where a key takes part, causality and window included).
        lse: how it gives its LSE (``bhs``, ``bsh``, ``hs``, ``sh``), which then is judged.
        capabilities: what else is true of it. By default no query is without a key; and without a mask causal documents
            have as many keys as queries (say ``{"causal_needs_equal_lengths": False}`` where the last query stands on
            the last key), and only causal ones have windows.

    Raises:
        ValueError: for a name or layout that there is not; one sentence.
    """
    keywords = taken(function, ("mask", *OPTIONS), names)
    adapted = _Adapted(function, layout, keywords, lse)

    def run(call: Call) -> Any:
        if not call.documents:
            return _nothing(call, lse)
        outs, sums = [], []
        for document in call.documents:
            mask = _seen(document, call, keywords) if "mask" in keywords else None
            given = {"mask": mask[None, None] if mask is not None and "b" in adapted.layout else mask}
            rows, keys = document
            out, found = adapted.attend(call, (call.q[rows][None], call.k[keys][None], call.v[keys][None]), given)
            outs.append(out[0])
            sums += [] if found is None else [found[0]]
        places = _Places([document.rows for document in call.documents], call.q.device)
        return _packed(call, places.row, torch.cat(outs), torch.cat(sums) if sums else None)

    return AdaptedKernel(function, run, _options(keywords), _defaults(keywords, lse), capabilities)


def block_diagonal(
    function: Function,
    *,
    layout: str = "bshd",
    names: Names | None = None,
    lse: Lse | None = None,
    multiple: int = 1,
    capabilities: Mapping[str, Any] | None = None,
) -> AdaptedKernel:
    """A dense kernel that is given the whole pack as one sequence, and told which tokens belong together.

        kernel = adapters.block_diagonal(
            torch.nn.functional.scaled_dot_product_attention,
            layout="bhsd",
            names={"mask": "attn_mask", "softmax_scale": "scale"},
            capabilities={"gqa": False},
        )

    Args:
        function: ``function(q, k, v, **keywords) -> out``, or a tuple that begins with it.
        layout: order of the axes of all four: ``bshd``, ``bhsd``, ... with ``b`` being 1, or ``shd``, ``hsd``.
        names: what it calls the options, and how it is told, one at least of ``mask`` (bool ``[1, 1, t_q, t_k]``, True
            where a key takes part, causality and window included), ``ids_q`` and ``ids_k`` (int32 ``[1, t]``, the
            document of each token, from 1; 0 for padding), ``ids`` (one of them for queries and keys).
        lse: how it gives its LSE, which then is judged.
        multiple: the pack is padded with zeros to a multiple of so many rows.
        capabilities: what else is true of it. By default as for ``by_document``; with ``ids``, documents with other
            numbers of keys than of queries are refused.

    Raises:
        ValueError: for a name or layout that there is not, and where nothing tells documents apart.
    """
    keywords = taken(function, (*_IDS, *OPTIONS), names)
    if not set(keywords) & set(_IDS):
        raise ValueError("nothing tells the function documents apart: say in names what it calls mask, ids or ids_k")
    adapted = _Adapted(function, layout, keywords, lse)

    def run(call: Call) -> Any:
        if "ids" in keywords:
            call.require_as_many_keys()
        if not call.documents:
            return _nothing(call, lse)
        rows = _Places([document.rows for document in call.documents], call.q.device)
        keys = _Places([document.keys for document in call.documents], call.q.device)
        width, seen = (-(-len(places.row) // multiple) * multiple for places in (rows, keys))
        ids = {"ids_q": _ids(rows, width), "ids_k": _ids(keys, seen)}
        given: dict[str, Any] = {"ids": ids["ids_q"], **ids}
        if "mask" in keywords:
            given["mask"] = _pack_mask(call, width, seen, keywords)
        padded = (_filled(call.q, rows, width), _filled(call.k, keys, seen), _filled(call.v, keys, seen))
        out, found = adapted.attend(call, padded, given)
        count = len(rows.row)
        return _packed(call, rows.row, out[0, :count], None if found is None else found[0, :count])

    return AdaptedKernel(function, run, _options(keywords), _defaults(keywords, lse), capabilities)


def _filled(x: torch.Tensor, places: _Places, width: int) -> torch.Tensor:
    """The rows of documents ``[1, width, h, d]``, zeros behind them."""
    rows = x[places.row]
    return F.pad(rows, (0, 0, 0, 0, 0, width - len(rows)))[None]


def _ids(places: _Places, width: int) -> torch.Tensor:
    return F.pad(places.document + 1, (0, width - len(places.document)))[None].int()


def _pack_mask(call: Call, width: int, seen: int, keywords: Mapping[str, str]) -> torch.Tensor:
    """bool ``[1, 1, width, seen]``; rows of padding see the first key, since a row that sees none is NaN to many."""
    mask = torch.zeros(width, seen, dtype=torch.bool, device=call.q.device)
    row = key = 0
    for document in call.documents:
        mask[row : row + document.queries, key : key + document.seen] = _seen(document, call, keywords)
        row, key = row + document.queries, key + document.seen
    mask[row:, 0] = True
    return mask[None, None]
