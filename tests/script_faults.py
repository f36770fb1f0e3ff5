"""Code of users with a line broken, and the case that shows it: what scripts of findings are tried on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from attn_fuzz.backends import registry
from attn_fuzz.batch.judged import Question
from attn_fuzz.cases.call_batch import CallBatch
from attn_fuzz.findings.script import standalone
from attn_fuzz.reduction.call_sequence import CallSequence
from attn_fuzz.reference.case import Case

ROOT: Final = Path(__file__).resolve().parent.parent
KERNEL: Final = ROOT / "examples" / "my_kernel.py"
LAYER: Final = ROOT / "examples" / "my_layer.py"
NORMED: Final = ROOT / "tests" / "normed_layer.py"
TENSOR: Final = ROOT / "tests" / "user_tensor_layer.py"
RANKS: Final = ROOT / "examples" / "my_rank_layer.py"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One of them."""

    source: Path
    right: str
    wrong: str
    case: str
    ends: tuple[int, ...] = ()
    """Of calls in a row the last of which fails, where the documents of each end."""
    fatal: bool = False
    """Not run to make the script."""
    mended: tuple[str, str] | None = None
    """What of the broken one, by what, makes it right; None: it is what it was before."""

    @property
    def name(self) -> str:
        """Of the function or class."""
        return "kernel" if self.source == KERNEL else "Layer"

    def written(self, folder: Path, *, broken: bool) -> Path:
        """The user's file, in a folder."""
        text = self.source.read_text()
        assert self.right in text, self.right
        folder.mkdir(exist_ok=True)
        path = folder / "theirs.py"
        wrong = text.replace(self.right, self.wrong, 1)
        path.write_text(wrong if broken else wrong.replace(*self.mended) if self.mended else text)
        return path

    def script(self, path: Path) -> str:
        """Of the finding on the user's file, as ``attn-fuzz script`` makes it."""
        case = Case.from_json(self.case)
        name = f"{path}:{self.name}" if self.name == "kernel" else f"layer:{path}:{self.name}"
        sequence = None
        if self.ends:
            batch = CallBatch.of(case, self.ends)
            assert batch is not None
            sequence = CallSequence(batch, len(self.ends) - 1, Question("nan", ""), len(self.ends))
            case = batch.call(len(self.ends) - 1)
        return standalone(case, registry.load(name), "cpu", "broken", sequence=sequence, fatal=self.fatal)


_AFTER = "    out = []\n"
_LONGER = """    before = getattr(kernel, "before", 0)
    kernel.before = len(q)
    q = q * (3 if before > 2 * len(q) else 1)
    out = []
"""

FAULTS: Final = {
    "kernel: top-left": Fault(
        KERNEL,
        "mask.tril(ke - kb - (qe - qb))",
        "mask.tril()",
        '{"level": "kernel", "lengths": [1], "key_lengths": [3]}',
    ),
    "kernel: a document scaled": Fault(
        KERNEL,
        "torch.cat(out)",
        "torch.cat([*out[:-1], out[-1] * 1.02])",
        '{"level": "kernel", "lengths": [2, 1], "heads": 2}',
    ),
    "kernel: strided": Fault(
        KERNEL,
        "torch.cat(out)",
        "torch.cat(out) * 1.02",
        '{"level": "kernel", "lengths": [2], "head_dim": 4, "memory": "strided"}',
    ),
    "kernel: misaligned": Fault(
        KERNEL,
        "torch.cat(out)",
        "torch.cat(out) * 1.02",
        '{"level": "kernel", "lengths": [2], "dtype": "bf16", "memory": "misaligned"}',
    ),
    "kernel: mixed": Fault(
        KERNEL,
        "torch.cat(out)",
        "torch.cat(out) * 1.02",
        '{"level": "kernel", "lengths": [3], "heads": 2, "kv_heads": 2, "head_dim": 4, "memory": "mixed"}',
    ),
    "kernel: broadcast": Fault(
        KERNEL,
        "torch.cat(out)",
        "torch.cat(out) * 1.5",
        '{"level": "kernel", "lengths": [2], "heads": 2, "memory": "broadcast"}',
    ),
    "kernel: writes to its values": Fault(
        KERNEL,
        "    return torch.cat(out)",
        "    out = torch.cat(out)\n    v.data.mul_(-1)\n    return out",
        '{"level": "kernel", "lengths": [2], "head_dim": 4}',
    ),
    "kernel: ends its process": Fault(
        KERNEL,
        _AFTER,
        _AFTER + "    import os\n    os._exit(7) if not causal else None\n",
        '{"level": "kernel", "lengths": [2], "head_dim": 4, "causal": false}',
        fatal=True,
    ),
    "calls: wrong after a longer one": Fault(
        KERNEL, _AFTER, _LONGER, '{"level": "kernel", "lengths": [5, 2], "head_dim": 4}', ends=(1, 2)
    ),
    "layer: sees the next key": Fault(
        LAYER,
        "(key <= row[:, None])",
        "(key <= row[:, None] + 1)",
        '{"lengths": [3], "cuts": [2], "head_dim": 4, "hidden": 4}',
    ),
    "layer: gradient of past keys lost": Fault(
        LAYER,
        '*(step["leaf"] for step in self.steps)',
        '*(step["leaf"].detach() for step in self.steps)',
        '{"lengths": [2], "cuts": [1], "head_dim": 4, "hidden": 4}',
    ),
    "layer: positions begin at every cut": Fault(
        NORMED,
        "self.position[begin:end]",
        "torch.arange(end - begin)",
        '{"lengths": [3], "cuts": [1], "heads": 2, "head_dim": 4, "hidden": 4, "rotary": "default"}',
    ),
    "layer: values are not normed": Fault(
        NORMED,
        'norm(v, w.get("value_norm"))',
        'v * w.get("value_norm", 1)',
        '{"lengths": [1, 2], "padding": 1, "head_dim": 4, "hidden": 4, "rotary": "default", "value_norm": "rms", '
        '"query_norm": "rms"}',
    ),
    "layer: documents of the sequence before": Fault(
        LAYER,
        "        self.steps, self.gradients",
        "        before = vars(Layer).get('before')\n"
        "        Layer.before = self.document\n"
        "        if before is not None and len(before) == len(self.document):\n"
        "            self.document = before\n"
        "        self.steps, self.gradients",
        '{"lengths": [1, 2, 2, 1], "cuts": [3], "head_dim": 4, "hidden": 4}',
        ends=(2, 4),
    ),
    "layer: keeps its gradients from sequence to sequence": Fault(
        LAYER,
        "    def forward(self, x, begin, end):",
        "    def restart(self, case):\n"
        "        gradients = self.gradients\n"
        "        self.__init__({name: weight.detach() for name, weight in self.weights.items()}, case)\n"
        "        self.gradients = gradients\n\n"
        "    capabilities = capabilities | {'reusable': True}\n\n"
        "    def forward(self, x, begin, end):",
        '{"lengths": [2], "cuts": [1], "head_dim": 4, "hidden": 4}',
        mended=("        self.gradients = gradients\n\n", "\n"),
    ),
    "ranks: gradient of own rows only": Fault(
        RANKS,
        "self.gradient[first : own.stop] += leaf.grad",
        "self.gradient[own] += leaf.grad[own.start - first :]",
        '{"lengths": [4], "ranks": 2, "head_dim": 4, "hidden": 4}',
        # Ranks of the harness take ten seconds to start, and the script is the same.
        fatal=True,
    ),
    "ranks: input gradient of own query heads only": Fault(
        TENSOR,
        "summed(of_block.grad, self.neighbours)",
        "of_block.grad.chunk(self.neighbours.size())[self.neighbours.rank()]",
        '{"lengths": [4], "tensor_ranks": 2, "heads": 2, "head_dim": 4, "hidden": 4}',
        fatal=True,
    ),
    "ranks: neighbours add up another block's rows": Fault(
        TENSOR,
        "first = begin + self.group.rank() // shared * shared * size",
        "first = begin + (ranks - shared - self.group.rank() // shared * shared) * size",
        '{"lengths": [8], "ranks": 2, "tensor_ranks": 2, "heads": 2, "head_dim": 4, "hidden": 4}',
        fatal=True,
    ),
}
"""Five of layers, three of ranks (two of them tensor-parallel), two that take other calls, the rest of kernels."""

QUICK: Final = (
    "kernel: top-left",
    "kernel: misaligned",
    "kernel: writes to its values",
    "calls: wrong after a longer one",
    "layer: sees the next key",
    "layer: gradient of past keys lost",
    "layer: positions begin at every cut",
    "layer: values are not normed",
    "ranks: gradient of own rows only",
    "ranks: input gradient of own query heads only",
)
"""Ten, with some of each kind but for crashes, which take processes of their own; ATTN_FUZZ_ALL_SCRIPTS=1 tries all."""
