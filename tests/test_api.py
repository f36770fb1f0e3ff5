"""The Python API: checks from Python, and results of one's own calls held to the budget of their inputs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Done

import attn_fuzz
import attn_fuzz.api
from attn_fuzz import AttentionMismatch, CheckError, FoundError, Verdict, assert_attention
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import AttentionOptions
from attn_fuzz.backends.metadata import VarlenMetadata
from attn_fuzz.oracle.own_inputs import WrongElement
from attn_fuzz.reference.answer import kernel_inputs
from attn_fuzz.reference.case import Case

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "my_kernel.py"

# One's own results.

Tensors = dict[str, torch.Tensor]
BASE = Case(level="kernel", lengths=(5, 0, 9), key_lengths=(7, 3, 20), heads=4, kv_heads=2, head_dim=8)


@dataclasses.dataclass
class Call:
    """What a kernel made of a case, as arguments of ``assert_attention``."""

    given: Tensors
    results: Tensors
    options: dict[str, object]

    def judge(self) -> None:
        assert_attention(**self.given, **self.results, **self.options)  # type: ignore[arg-type]


def call(case: Case, name: str, device: str = "cpu") -> Call:
    """A backend's forward and backward over a case's tensors."""
    inputs = kernel_inputs(case, device)
    metadata = VarlenMetadata(
        lengths_q=case.packed_lengths, lengths_k=case.packed_key_lengths, device=torch.device(device)
    )
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    attended = registry.load(name).kernel.attend(*leaves, metadata, AttentionOptions.of(case))
    gradients = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(attended.out, leaves, inputs.dout), strict=True))
    sums = {"cu_seqlens_q": metadata.cu_seqlens_q, "cu_seqlens_k": metadata.cu_seqlens_k}
    options = {"causal": case.causal, "window": case.window, "softmax_scale": case.scale, "softcap": case.softcap}
    given = {name: getattr(inputs, name) for name in ("q", "k", "v", "dout")} | sums
    return Call(given, {"out": attended.out.detach(), **gradients}, options)


CASES = {
    "fp32": BASE,
    "bf16": BASE.replace(dtype="bf16"),
    "fp16, no mask": BASE.replace(dtype="fp16", causal=False),
    "window": BASE.replace(window=(3, 0)),
    "scale and softcap": BASE.replace(scale=0.7, softcap=5.0, dtype="bf16"),
    "large": BASE.replace(values="large", dtype="bf16"),
    "long": BASE.replace(lengths=(200, 64), key_lengths=(300, 64), dtype="bf16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["loop", "sdpa_dense", "sdpa_dense_flash", "sdpa_dense_math", "sdpa_nested", "backup"])
def test_right_results_pass(name: str, case: Case, attn_device: str) -> None:
    backend = registry.load(name)
    kind = attn_device.partition(":")[0]
    if backend.kernel.why_unavailable(kind) or backend.refusal(case, kind):
        pytest.skip("not taken here")
    call(case, name, attn_device).judge()


def test_a_gradient_of_ones_is_none_the_less_right() -> None:
    """Equal rows have equal roundings, of which more is allowed."""
    case = BASE.replace(lengths=(64, 64), key_lengths=(64, 64), dtype="bf16")
    found = call(case, "loop")
    leaves = [found.given[name].clone().requires_grad_() for name in ("q", "k", "v")]
    metadata = VarlenMetadata(lengths_q=case.packed_lengths, lengths_k=case.packed_key_lengths, device="cpu")  # type: ignore[arg-type]
    out = registry.load("loop").kernel.attend(*leaves, metadata, AttentionOptions.of(case)).out
    out.sum().backward()
    found.given["dout"] = torch.ones_like(out)
    found.results |= {f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True) if leaf.grad is not None}
    found.judge()


def shifted(tensor: str, place: tuple[int, ...], by: float) -> Callable[[Tensors], None]:
    """Adds to one element."""

    def change(results: Tensors) -> None:
        results[tensor][place] += by

    return change


def swapped_heads(results: Tensors) -> None:
    results["out"][3, [0, 1]] = results["out"][3, [1, 0]]


def dead_key(results: Tensors) -> None:
    """A document without queries has keys that get no gradient."""
    results["dk"][7, 0, 0] = 1e-30


def lost_row(results: Tensors) -> None:
    results["dv"][12] = 0.0


def scaled(results: Tensors) -> None:
    results["dq"][5:] *= 1.01


FAULTS: dict[str, tuple[Callable[[Tensors], None], str, dict[str, object]]] = {
    "out, an element": (shifted("out", (6, 2, 5), 1e-3), "out", {"document": 2, "row": 1, "head": 2, "channel": 5}),
    "out, NaN": (shifted("out", (0, 0, 0), torch.nan), "out", {"document": 0, "row": 0, "head": 0, "channel": 0}),
    "out, two heads": (swapped_heads, "out", {"document": 0, "row": 3}),
    "dq, an element": (shifted("dq", (4, 3, 7), -1e-3), "dq", {"document": 0, "row": 4, "head": 3, "channel": 7}),
    "dq, a document": (scaled, "dq", {"document": 2}),
    "dk, an element": (shifted("dk", (29, 1, 0), 2e-3), "dk", {"document": 2, "row": 19, "head": 1, "channel": 0}),
    "dk, a dead key": (dead_key, "dk", {"document": 1, "row": 0, "head": 0, "channel": 0, "z": torch.inf}),
    "dk, infinity": (shifted("dk", (2, 0, 3), torch.inf), "dk", {"document": 0, "row": 2, "head": 0, "channel": 3}),
    "dv, an element": (shifted("dv", (0, 0, 6), 1e-3), "dv", {"document": 0, "row": 0, "head": 0, "channel": 6}),
    "dv, a row": (lost_row, "dv", {"document": 2, "row": 2}),
}


@pytest.mark.parametrize(("fault", "tensor", "place"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_element_is_named_at_its_place(
    fault: Callable[[Tensors], None], tensor: str, place: dict[str, object]
) -> None:
    found = call(BASE, "loop")
    fault(found.results)
    with pytest.raises(AttentionMismatch) as raised:
        found.judge()
    (wrong,) = raised.value.wrong
    assert wrong.tensor == tensor
    assert {name: getattr(wrong, name) for name in place} == place
    assert str(raised.value).startswith(f"{tensor}: document {wrong.document}, ")


def test_the_lse_is_held_to_its_budget() -> None:
    case = Case(level="kernel", lengths=(2, 3), heads=1, head_dim=4, causal=False)
    found = call(case, "loop")
    q, k = found.given["q"].double(), found.given["k"].double()
    scores = torch.einsum("qhd,khd->qhk", q, k) / 2
    lse = torch.cat([scores[:2, :, :2].logsumexp(-1), scores[2:, :, 2:].logsumexp(-1)]).float()
    found.results["lse"] = lse
    found.judge()
    found.results["lse"] = torch.zeros_like(lse)
    with pytest.raises(AttentionMismatch, match="lse: document"):
        found.judge()


def test_arithmetic_that_is_declared_is_allowed_for() -> None:
    """Products of TF32 inputs are wrong for float32, and right where that is said."""
    case = BASE.replace(causal=False, lengths=(16,), key_lengths=(16,))
    found = call(case, "loop")
    cut = {
        name: (x.view(torch.int32) & ~0x1FFF).view(torch.float32) for name, x in found.given.items() if name in "qkv"
    }
    scores = torch.einsum("qhd,khd->hqk", cut["q"], cut["k"].repeat_interleave(2, 1)) * 8**-0.5
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), cut["v"].repeat_interleave(2, 1))
    given = {name: x for name, x in found.given.items() if name != "dout"}
    with pytest.raises(AttentionMismatch):
        assert_attention(out, **given)
    assert_attention(out, **given, arithmetic={"products": "tf32"})


WRONG = {
    "shape of out": ({"out": torch.zeros(14, 4, 7)}, {}, r"out has shape \[14, 4, 7\], but should have \[14, 4, 8\]"),
    "dtype of dq": ({"dq": torch.zeros(14, 4, 8).half()}, {}, "dq is torch.float16, but q is torch.float32"),
    "sums that fall": ({}, {"cu_seqlens_q": torch.tensor([0, 9, 5, 14])}, "cu_seqlens_q must rise from 0 to the 14"),
    "sums of another total": ({}, {"cu_seqlens_k": torch.tensor([0, 7, 10, 29])}, "cu_seqlens_k must rise from 0"),
    "fewer documents": ({}, {"cu_seqlens_k": torch.tensor([0, 30])}, "has 3 documents, but cu_seqlens_k has 1"),
    "gradients of nothing": ({}, {"dout": None}, "give dout"),
}


@pytest.mark.parametrize(("results", "given", "said"), WRONG.values(), ids=WRONG)
def test_what_does_not_belong_together_is_one_sentence(results: Tensors, given: Tensors, said: str) -> None:
    found = call(BASE, "loop")
    found.results |= results
    found.given |= given
    with pytest.raises(ValueError, match=said):
        found.judge()


def test_a_mismatch_is_readable() -> None:
    wrong = WrongElement("dk", 1, 3, 0, 5, 1.5, 1.25, 40.0, 2, 640, (1, 4))
    assert str(wrong) == (
        "dk: document 1, key 3, head 0, channel 5: got 1.5, expected 1.25, z = 40; 2 of 640 elements wrong, "
        "in documents 1, 4"
    )


# Checks.

BROKEN = EXAMPLE.read_text().replace("k_ends[i]", "k_ends[i] - 1")


def test_public_names_are_there() -> None:
    assert set(attn_fuzz.__all__) <= set(dir(attn_fuzz))
    assert all(getattr(attn_fuzz, name) for name in attn_fuzz.__all__)
    with pytest.raises(AttributeError, match="no attribute 'chekc'"):
        attn_fuzz.chekc  # noqa: B018


def told(**data: Any) -> Verdict:
    tally = {"by_kind": {"kernel fp32": 2, "batch bf16": 3}}
    return Verdict({"cases": 5, "documents": 9, "seconds": 1.5, "findings": [], "backends": {"mine": tally}, **data})


def test_a_clean_verdict_is_true() -> None:
    verdict = told()
    assert verdict
    assert (verdict.cases, verdict.documents, verdict.seconds, verdict.findings) == (5, 9, 1.5, ())
    assert verdict.coverage == {"kernel fp32": 2, "batch bf16": 3}
    assert '"findings": []' in verdict.to_json()
    verdict.raise_if_found()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"cases": 0}, "nothing was tested"),
        ({"troubles": ["the disk is full"]}, "the disk is full"),
        ({"untested": ["interrupted after 5 cases"]}, "interrupted after 5 cases"),
    ],
)
def test_nothing_tested_is_no_pass(data: dict[str, Any], said: str) -> None:
    verdict = told(**data)
    assert not verdict
    with pytest.raises(FoundError, match=said):
        verdict.raise_if_found()


LOOP = (ROOT / "docs" / "agents.md").read_text().partition("    # loop.py\n")[2].partition("\n\nWhat it prints")[0]


@pytest.mark.slow
def test_a_wrong_kernel_is_false_and_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked by the loop that is shown to agents."""
    path = tmp_path / "mine.py"
    path.write_text(
        EXAMPLE.read_text().replace("softmax_scale", "softmax_scale", 1) + "\nright = kernel\n"
        "def kernel(q, k, v, *rest, **options):\n    return right(q, k, v * 1.01, *rest, **options)\n\n"
        # Finding out what a kernel takes is most of the time of a short check.
        "kernel.capabilities = {'head_dims': (8,), 'gqa': False, 'memories': ('contiguous',)}\n"
    )
    options = {"cases": 20, "level": "kernel", "mode": "case", "workers": 1, "device": "cpu", "dtype": "fp32"}
    verdicts: list[Verdict] = []

    def check(kernel: str, **options: Any) -> Verdict:
        verdicts.append(attn_fuzz.api.check(kernel, **options))
        return verdicts[-1]

    monkeypatch.setattr(attn_fuzz, "check", check)
    loop: dict[str, Any] = {"__name__": "loop"}
    exec(textwrap.dedent(LOOP), loop)
    said = loop["answer"](f"{path}:kernel", store=tmp_path / "store", first=True, **options)
    (verdict,) = verdicts
    assert not verdict
    least = min(verdict.findings, key=lambda finding: finding.case.tokens)
    assert (said["verdict"], said["id"], said["case"]) == ("findings", least.id, least.case.to_dict())
    refused = loop["answer"](inside())
    assert refused["verdict"] == "trouble"
    assert "define it at a module's top" in refused["said"][0]
    assert verdict.findings[0].backend.endswith("mine.py:kernel")
    with pytest.raises(FoundError, match=r"1 findings in \d+ cases") as raised:
        verdict.raise_if_found()
    assert raised.value.verdict is verdict
    told = attn_fuzz.replay(verdict.findings[0].id, store=tmp_path / "store", device="cpu")
    assert told["backends"][0]["checks"]


def inside() -> Callable[..., None]:
    def kernel() -> None: ...

    return kernel


@pytest.fixture
def commands_here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The command that a check runs is run in this process."""

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert words[:3] == [sys.executable, "-m", "attn_fuzz"]
        done: Done = request.getfixturevalue("attn_fuzz")(*words[3:])
        return subprocess.CompletedProcess(words, done.status, done.out, done.err)

    monkeypatch.setattr("attn_fuzz.api.subprocess.run", run)


@pytest.mark.usefixtures("commands_here")
@pytest.mark.parametrize(
    ("kernel", "options", "said"),
    [
        (inside(), {}, "define it at a module's top"),
        ("none.py:kernel", {}, "there is no file none.py"),
        (f"{EXAMPLE}:kernel", {"seconds": 1, "cases": 1}, "exclude each other"),
        (f"{EXAMPLE}:kernel", {"colour": "red"}, "--colour"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(kernel: object, options: dict[str, object], said: str) -> None:
    with pytest.raises(CheckError, match=said) as raised:
        attn_fuzz.check(kernel, **options)  # type: ignore[arg-type]
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.slow
def test_a_script_that_checks_when_it_is_imported_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(EXAMPLE.read_text() + "\nimport attn_fuzz\nattn_fuzz.check(kernel, cases=1)\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]
