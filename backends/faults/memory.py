"""Memory that is not written, read too far, or assumed to lie otherwise than it does."""

from __future__ import annotations

import torch

from attn_fuzz.backends.faults.fault import KernelFault
from attn_fuzz.backends.kernel import Capabilities
from attn_fuzz.backends.loop import Call, Document, Gradients

_TILE = 16


class _TailUnwritten(KernelFault):
    capabilities = Capabilities(covers_all_rows=True)
    unwritten = "out"

    def allocate(self, like: torch.Tensor, name: str) -> torch.Tensor:
        if name == self.unwritten:
            return super().allocate(like, name)
        return torch.full_like(super().allocate(like, name), -torch.inf if name == "lse" else 0.0)


class OutTailUnwritten(_TailUnwritten):
    """Output rows behind the last document are promised to be zero and never written."""

    id = "M02-out"
    reports = ("Dao-AILab/flash-attention#1228", "#1661")


class DqTailUnwritten(_TailUnwritten):
    """dQ rows behind the last document are promised to be zero and never written."""

    id, unwritten = "M02-dq", "dq"
    reports = ("pytorch#176793",)


class DkTailUnwritten(_TailUnwritten):
    """dK rows behind the last document are promised to be zero and never written."""

    id, unwritten = "M02-dk", "dk"
    reports = ("pytorch#176793", "fla#892")


class DvTailUnwritten(_TailUnwritten):
    """dV rows behind the last document are promised to be zero and never written."""

    id, unwritten = "M02-dv", "dv"
    reports = ("pytorch#176793", "Dao-AILab/flash-attention#752")


class ScratchByHeadDim(KernelFault):
    """The accumulator of dQ is sized by head_dim instead of max_seqlen: later rows of a document are lost."""

    id = "M05"
    reports = ("pytorch#186142", "cudnn-frontend#462")

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if name == "dq":
            value = value.clone()
            value[:, value.shape[2] :] = 0
        super().write(result, rows, value, name)


class DenseLse(KernelFault):
    """The backward indexes the LSE as batch * max_seqlen + row instead of by prefix sums."""

    id = "M06"
    reports = ("TransformerEngine#3249", "FlagGems#898")

    def saved_lse(self, call: Call, lse: torch.Tensor, document: Document) -> torch.Tensor:
        rows = torch.arange(document.queries) + document.index * call.metadata.max_seqlen_q
        return lse[:, rows % lse.shape[1]]


class PaddedDelta(KernelFault):
    """Row sums of dO O are read at offsets padded to tiles of 16, but written at offsets padded to tiles of 8."""

    id = "A11"
    reports = ("Dao-AILab/flash-attention#2337", "MagiAttention#329")

    def delta(self, call: Call, document: Document, out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        right = super().delta(call, document, out, dout)
        begin = document.rows.start
        shift = (begin + document.index * 16) // 16 * 16 - (begin + document.index * 8) // 8 * 8
        return right.roll(shift % max(1, right.shape[1]), 1) if shift else right


class KeysToMaxSeqlen(KernelFault):
    """Keys reach to max_seqlen_k from a document's begin, not to its own end."""

    id = "M07"
    reports = ("Dao-AILab/flash-attention#1192", "xformers#1122")

    def bounds(self, call: Call, side: str, *, backward: bool) -> list[tuple[int, int]]:
        found = super().bounds(call, side, backward=backward)
        if side == "q":
            return found
        total = found[-1][1]
        return [(begin, min(begin + call.metadata.max_seqlen_k, total)) for begin, _ in found]

    def shift(self, call: Call, document: Document) -> int:
        lengths = (call.metadata.lengths_q[document.index], call.metadata.lengths_k[document.index])
        return lengths[1] - lengths[0]


class MaskedTailTimesValue(KernelFault):
    """P is zero behind a document's last key, but multiplied with what lies there: 0 * NaN."""

    id = "M08"
    reports = ("cudnn-frontend#624", "#646", "SageAttention#377")

    def weighted(self, call: Call, document: Document, probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        end = document.keys.start + -(-document.seen // _TILE) * _TILE
        rows = slice(document.keys.start, min(end, len(v)))
        tile = self.expand(call, self.read(call, v, rows, "v"), False)
        padded = torch.nn.functional.pad(probabilities, (0, tile.shape[1] - document.seen))
        return padded.to(call.dtype).float() @ tile


class TailLanes(KernelFault):
    """Query lanes behind a document's last row, filled by the next document's, contribute to dV."""

    id = "M10"
    reports = ("FlagGems#898",)

    def backward(self, call: Call, *saved: torch.Tensor) -> Gradients:
        dq, dk, dv = super().backward(call, *saved)
        *_, dout = saved
        for rows, keys in zip(
            self.bounds(call, "q", backward=True), self.bounds(call, "k", backward=True), strict=True
        ):
            if rows[1] < len(dout) and keys[1] > keys[0] and rows[1] > rows[0] and (rows[1] - rows[0]) % _TILE:
                dv[keys[1] - 1] += dout[rows[1], :: call.group]
        return dq, dk, dv


class StrideAssumed(KernelFault):
    """K rows are taken to lie heads * head_dim apart, whatever the tensor's strides say."""

    id = "M32-row"
    reports = ("pytorch#112577", "#187506", "Dao-AILab/flash-attention#2541")

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        if name == "k":
            width = x.shape[1] * x.shape[2]
            x = x.as_strided(x.shape, (width, x.shape[2], 1), x.storage_offset())
        return super().read(call, x, rows, name)


class HeadStrideAssumed(KernelFault):
    """Heads of V are taken to lie head_dim apart."""

    id = "M32-head"
    reports = ("cudnn-frontend#516", "#540")

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        if name == "v":
            x = x.as_strided(x.shape, (x.stride(0), x.shape[2], x.stride(2)), x.storage_offset())
        return super().read(call, x, rows, name)


class ValueStrideAssumed(KernelFault):
    """Rows of V are taken to lie as far apart as those of K."""

    id = "M32-value"

    def documents(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backward: bool
    ) -> list[Document]:
        v = v.as_strided(v.shape, (k.stride(0), *v.stride()[1:]), v.storage_offset())
        return super().documents(call, q, k, v, backward=backward)


class LastStrideAssumed(KernelFault):
    """Channels of Q are taken to lie next to one another."""

    id = "M32-inner"
    reports = ("Dao-AILab/flash-attention#2777", "pytorch#191937")

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        if name == "q":
            x = x.as_strided(x.shape, (x.stride(0), x.stride(1), 1), x.storage_offset())
        return super().read(call, x, rows, name)


class GradientStrideAssumed(KernelFault):
    """The output gradient is taken to be contiguous: that of a sum has stride 0."""

    id = "M32-dout"
    reports = ("pytorch#194818", "pytorch#112577")

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        if name == "dout":
            heads, width = x.shape[1], x.shape[1] * x.shape[2]
            room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
            x = x.as_strided((min(len(x), room // width), heads, x.shape[2]), (width, x.shape[2], 1))
            # Rows that the storage does not have are read as the last ones it has.
            index = torch.arange(rows.start, rows.stop).clamp_max(len(x) - 1)
            return x[index].float().transpose(0, 1)
        return super().read(call, x, rows, name)


class OffsetWraps(KernelFault):
    """The row offset into dO is kept in 5 bits: a document beyond row 32 reads another one's rows."""

    id = "F4"
    reports = ("Dao-AILab/flash-attention#2611", "pytorch#187227")

    def read(self, call: Call, x: torch.Tensor, rows: slice, name: str) -> torch.Tensor:
        if name == "dout":
            return x[torch.arange(rows.start, rows.stop) % 32].float().transpose(0, 1)
        return super().read(call, x, rows, name)


class HeadChunks(KernelFault):
    """More than two heads are worked on in chunks, and every chunk's dQ is written to the first."""

    id = "F8"
    reports = ("pytorch#142228", "#177985")

    def write(self, result: torch.Tensor, rows: slice, value: torch.Tensor, name: str) -> None:
        if name == "dq" and len(value) > 2:
            value = value.clone()
            value[:2] = value[-2:].clone()
        super().write(result, rows, value, name)


class WritesInput(KernelFault):
    """Q is scaled in place and scaled back: its bits do not all return."""

    id = "X01"

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = super().forward(call, q, k, v)
        with torch.no_grad():
            q.data.mul_(call.options.scale * 1.1).div_(call.options.scale * 1.1)
        return result


class WritesMargin(KernelFault):
    """A whole vector is stored behind the last row of Q."""

    id = "X02"

    def forward(
        self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        last = q.storage_offset() + sum((size - 1) * step for size, step in zip(q.shape, q.stride(), strict=True))
        if q.untyped_storage().nbytes() // q.element_size() > last + 1:
            q.data.as_strided((1,), (1,), last + 1).zero_()
        return super().forward(call, q, k, v)
