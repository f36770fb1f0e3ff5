"""The code of docs/adapters.md runs and is clean, and kernels of other people's shapes are adapted in five lines."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable, UnsupportedCase
from attn_fuzz.oracle.examine import Verdict, examine
from attn_fuzz.reference.case import Case

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "adapters.md").read_text(), re.MULTILINE | re.DOTALL)
HEADINGS = [
    heading
    for heading, text in re.findall(
        r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "adapters.md").read_text(), re.MULTILINE | re.DOTALL
    )
    for _ in range(text.count("```python"))
]
EXAMPLES = sorted((ROOT / "examples" / "adapted").glob("*.py"))

PLAIN = Case(level="kernel", lengths=(4, 3), heads=4, kv_heads=4, head_dim=16, causal=False)
CASES = (
    PLAIN.replace(causal=True, window=(1, -1), scale=0.6),
    PLAIN.replace(causal=True, scale=0.6, kv_heads=2),
    PLAIN.replace(causal=True, kv_heads=2),
    PLAIN.replace(causal=True, scale=0.6),
    PLAIN.replace(scale=0.6, key_lengths=(5, 4)),
    PLAIN,
)
MOST = 3
"""Cases that are tried of each, of those that it takes."""


def verdicts(name: str, device: str) -> list[Verdict]:
    """What comes of the cases that a kernel takes, which are some."""
    backend, found = registry.load(name), list[Verdict]()
    for case in CASES:
        if len(found) < MOST and backend.refusal(case, device) is None:
            # The rest is refused when it is called: keys as many as queries, where one tensor holds both.
            with contextlib.suppress(UnsupportedCase):
                found.append(examine(case, backend, device, probes=()))
    assert found
    return found


def require_clean(name: str, device: str = "cpu") -> None:
    assert [verdict.symptoms for verdict in verdicts(name, device) if verdict.symptoms] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[f"{i}: {heading}" for i, heading in enumerate(HEADINGS)])
def test_the_code_of_the_page_is_clean(block: str, tmp_path: Path) -> None:
    for package in re.findall(r"^import (\w+)$", block, re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    path = tmp_path / "my_kernel.py"
    path.write_text(block)
    require_clean(f"{path}:kernel")


def test_every_adapter_has_code_on_the_page() -> None:
    from attn_fuzz import adapters

    text = "\n".join(BLOCKS)
    assert {name for name in adapters.__all__ if f"adapters.{name}" not in text} == {"AdaptedKernel", "packed_kv"}


# Six kernels of others.


def adapter_lines(source: str) -> list[str]:
    """Lines of code but for imports, docstrings and comments."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body[1:] if not isinstance(node, (ast.Import, ast.ImportFrom))]
    kept = {line for node in tree.body for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = [line for number, line in enumerate(source.splitlines(), 1) if number in kept]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def test_there_are_six_of_at_most_five_lines() -> None:
    counted = {path.stem: len(adapter_lines(path.read_text())) for path in EXAMPLES}
    assert len(counted) == 6
    assert max(counted.values()) <= 5, counted
    page = (ROOT / "docs" / "adapters.md").read_text()
    assert all(f"examples/adapted/{path.name}" in page for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_those_of_packages_that_are_here_are_clean(path: Path) -> None:
    try:
        backend = registry.load(f"{path}:kernel")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    # Some compile for GPUs only, where there is one.
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    reasons = {device: backend.kernel.why_unavailable(device) for device in devices}
    for device in (each for each, reason in reasons.items() if not reason):
        require_clean(f"{path}:kernel", device)
    if all(reasons.values()):
        pytest.skip("; ".join(filter(None, reasons.values())))


# The same, where the packages are not: functions of their shapes, in plain torch.


def textbook(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """``[b, h, s, d]``, as many heads of all."""
    scores = (q.float() @ k.float().mT * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def repeated(x: Any, times: int, axis: int) -> Any:
    return x.repeat_interleave(times, axis)


def block_causal(lengths: list[Any]) -> Any:
    ids = torch.repeat_interleave(torch.arange(len(lengths[0])), lengths[0].long())
    return (ids[:, None] == ids).tril()[None]


def transformers_attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> Any:
    k, v = (repeated(x, module.num_key_value_groups, 1) for x in (k, v))
    return textbook(q, k, v, mask, scaling).transpose(1, 2), None


def windowed(queries: int, keys: int, left: int) -> Any:
    mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    return mask.triu(-left) if left >= 0 else mask


def olmo_module(head_dim: int, n_heads: int, n_kv_heads: int, scale: float, window_size: tuple[int, int]) -> Any:
    def forward(qkv: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        assert (q.shape[1], k.shape[1], q.shape[3]) == (n_heads, n_kv_heads, head_dim)
        k, v = (repeated(x, n_heads // n_kv_heads, 1) for x in (k, v))
        return textbook(q, k, v, windowed(q.shape[2], k.shape[2], window_size[0]), scale).transpose(1, 2)

    return forward


def ring(q: Any, k: Any, v: Any, *, causal: bool, bucket_size: int, ring_size: int) -> Any:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    mask = windowed(q.shape[2], k.shape[2], -1) if causal else torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return textbook(q, k, v, mask, q.shape[3] ** -0.5).transpose(1, 2)


def mha(q: Any, k: Any, v: Any, segment_ids: Any, sm_scale: float, causal: bool, **blocks: Any) -> Any:
    assert q.shape[1] % 64 == 0
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None]
    mask = same & (windowed(q.shape[1], k.shape[1], -1) if causal else True)
    return textbook(*(x.transpose(1, 2) for x in (q, k, v)), mask, sm_scale).transpose(1, 2)


STAND_INS: dict[str, dict[str, dict[str, Any]]] = {
    "torchtune_packed": {
        "torchtune.modules.attention_utils": {
            "create_block_causal_mask": block_causal,
            "_sdpa_or_flex_attention": lambda: (
                lambda q, k, v, mask, p, causal: textbook(q, k, v, mask, q.shape[3] ** -0.5)
            ),
        }
    },
    "transformers_sdpa": {
        "transformers.integrations.sdpa_attention": {"sdpa_attention_forward": transformers_attention}
    },
    "olmo_backend": {"olmo_core.nn.attention.backend": {"TorchAttentionBackend": olmo_module}},
    "ring_attention": {"ring_attention_pytorch.ring_flash_attention": {"ring_flash_attn": ring}},
    "pallas_mha": {
        "jax": {
            "dlpack": types.SimpleNamespace(from_dlpack=torch.from_dlpack),
            "block_until_ready": lambda x: x,
            "tree": types.SimpleNamespace(map=torch.utils._pytree.tree_map),
            "vjp": torch.func.vjp,
            "default_backend": lambda: "cpu",
        },
        "jax.experimental.pallas.ops.gpu.attention": {"BlockSizes": dict, "mha": mha},
    },
    "sglang_prefill": {
        "sglang.kernels.ops.attention.prefill_attention": {
            "context_attention_fwd": lambda q, k, v, out, starts, lengths, longest, causal, scale: out.copy_(
                prefilled(q, k, v, lengths, scale, causal=causal)
            )
        }
    },
}


def prefilled(q: Any, k: Any, v: Any, lengths: Any, scale: float, *, causal: bool) -> Any:
    k, v = (repeated(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = block_causal([lengths])[0]
    mask = mask if causal else mask | mask.T
    return textbook(*(x.transpose(0, 1) for x in (q, k, v)), mask, scale).transpose(0, 1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], str]:
    """Puts functions in the place of a package, and gives the example as one for CPUs."""

    def put(stem: str, folder: Path) -> str:
        for name, members in STAND_INS[stem].items():
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                module = ".".join(parts[:depth])
                if module not in STAND_INS[stem] or depth == len(parts):
                    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
            vars(sys.modules[name]).update(members)
        source = (ROOT / "examples" / "adapted" / f"{stem}.py").read_text()
        path = folder / f"{stem}.py"
        path.write_text(source.replace('"devices": ("cuda",), "dtypes": ("bf16",)', '"devices": ("cpu",)'))
        return f"{path}:kernel"

    return put


@pytest.mark.slow
@pytest.mark.parametrize("stem", STAND_INS)
def test_the_adapters_of_others_fit_functions_of_those_shapes(
    stem: str, stand_in: Callable[[str, Path], str], tmp_path: Path
) -> None:
    require_clean(stand_in(stem, tmp_path))


def test_a_mistake_in_such_a_function_is_found(
    stand_in: Callable[[str, Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stand_in("ring_attention", tmp_path)
    package = sys.modules["ring_attention_pytorch.ring_flash_attention"]
    monkeypatch.setattr(package, "ring_flash_attn", lambda q, k, v, **options: ring(q, k.roll(1, 1), v, **options))
    assert "WrongOutput" in {
        type(symptom).__name__ for verdict in verdicts(name, "cpu") for symptom in verdict.symptoms
    }
