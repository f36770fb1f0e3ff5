"""A user's own layer under test, right ones and broken ones; ``check-layer`` through the command line."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from commandline import Run, sentence
from hunts import first_failure, first_finding
from in_turn import InThisProcess
from rewritten import rewritten

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.campaign import limits
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.evaluation.seeded_faults import drawn
from attn_fuzz.oracle.examine import examine, some_probes
from attn_fuzz.oracle.symptoms import MissingResult
from attn_fuzz.reference.case import Case

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "my_layer.py"

# Each breaks one line of the example.
BREAKS = {
    "top_left_causal": ("(key <= row[:, None])", "(key <= row[:, None] - begin)"),
    "past_gradient_lost": ('*(step["leaf"] for step in self.steps)', '*(step["leaf"].detach() for step in self.steps)'),
    "documents_leak": ("(self.document[begin:end, None] == self.document[:end]) & ", ""),
    "scale_forgotten": (", scale=self.scale,", ","),
    "sixth_forgets": ("(key <= row[:, None])", "(key <= row[:, None]) & ((key >= begin) | (len(self.steps) < 5))"),
    "workspace": (
        "        return out.detach()",
        "        self.last = getattr(self, 'last', torch.zeros(999, len(out[0])))\n"
        "        self.last[: len(out)] = out.detach()\n        return self.last.to(out.dtype)[: len(out)]",
    ),
    "double_count": ("weight.grad = None", "pass"),
}


# Each replaces a few lines by others that are as right: nothing may be found.
VARIANTS = {
    "growing_buffer": (
        "    def key_value(self):\n        return None",
        "    def key_value(self):\n        own = [step['leaf'].detach() for step in self.steps]\n"
        "        return torch.cat(own).chunk(2, dim=1) if own else None",
    ),
    "parameter_gradients_as_autograd_adds_them": (
        "        self.gradients[name] = self.gradients[name] + weight.grad.float()\n                weight.grad = None",
        "        self.gradients[name] = weight.grad",
    ),
}


# The smallest case that shows each, as campaigns have shrunk it.
SMALLEST = {
    "top_left_causal": {"lengths": (2,), "cuts": (1,)},
    "past_gradient_lost": {"lengths": (2,), "cuts": (1,)},
    "documents_leak": {"lengths": (1, 1)},
    "scale_forgotten": {"lengths": (2,), "scale": 0.25},
    "sixth_forgets": {"lengths": (6,), "cuts": (1, 2, 3, 4, 5)},
    "workspace": {"lengths": (2,), "cuts": (1,)},
    "double_count": {"lengths": (2,), "cuts": (1,)},
}


OPTIONS = ("--device", "cpu", "--json", "--workers", "1")


written = functools.partial(rewritten, EXAMPLE)
"""The example with some of it replaced."""


def job(path: Path) -> Assignment:
    """What a campaign on a layer gives its worker."""
    backend = f"layer:{path}:Layer"
    return Assignment(backend=backend, device="cpu", seed=0, levels=("layer",), cases=200, stop_at_first=True)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_example_is_clean(attn_fuzz: Run) -> None:
    done = attn_fuzz("check-layer", f"{EXAMPLE}:Layer", *OPTIONS, "--cases", "12")
    assert done.status == 0, done.err
    # Twelve case by case, and twelve in batches.
    assert done.json["cases"] == 24
    assert done.json["findings"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *VARIANTS])
def test_a_right_layer_of_another_style_is_clean(name: str | None, tmp_path: Path) -> None:
    path = EXAMPLE if name is None else written(tmp_path, *VARIANTS[name])
    backend = registry.load(f"layer:{path}:Layer")
    for case in drawn(backend, seed=0, count=30):
        assert examine(case, backend, "cpu", probes=some_probes(case)).symptoms == (), case.to_json()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_shows_in_a_small_case(name: str, tmp_path: Path) -> None:
    case = Case(level="layer", head_dim=1, hidden=1, **SMALLEST[name])
    broken = registry.load(f"layer:{written(tmp_path, *BREAKS[name])}:Layer")
    assert examine(case, broken, "cpu").symptoms
    assert not examine(case, registry.load(f"layer:{EXAMPLE}:Layer"), "cpu").symptoms


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_convicted(name: str, tmp_path: Path) -> None:
    first_failure(job(written(tmp_path, *BREAKS[name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["workspace", "scale_forgotten"])
def test_a_broken_line_is_shrunk(name: str, tmp_path: Path) -> None:
    case = first_finding(job(written(tmp_path, *BREAKS[name]))).case
    assert len(case.lengths) <= 3
    assert case.tokens <= 40


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_command_convicts_and_shrinks(attn_fuzz: Run, tmp_path: Path) -> None:
    broken = written(tmp_path, *BREAKS["top_left_causal"])
    done = attn_fuzz("check-layer", f"{broken}:Layer", *OPTIONS, "--cases", "200", "--first")
    assert done.status == 1, done.err
    case = done.json["findings"][0]["case"]
    assert len(case["lengths"]) <= 3
    assert sum(case["lengths"]) <= 40


def test_a_class_without_the_methods_is_refused_in_one_sentence(attn_fuzz: Run, tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("class Layer:\n    pass\n")
    done = attn_fuzz("check-layer", f"{path}:Layer", *OPTIONS, "--cases", "1")
    assert sentence(done).endswith("is no layer: it has no method forward")


@pytest.mark.slow
def test_a_layer_that_raises_is_told_where(tmp_path: Path) -> None:
    source = EXAMPLE.read_text()
    line = "        x = x.detach().requires_grad_()\n"
    broken = written(tmp_path, line, "        assert begin == 0, 'no past yet'\n" + line)
    place = source[: source.index(line)].count("\n") + 1
    finding = first_finding(job(broken))
    assert finding.case == Case(level="layer", lengths=(2,), cuts=(1,), head_dim=1, hidden=1)
    assert f"no past yet (written.py, line {place})" in finding.messages[0]


# What is no layer, told before a campaign.

NO_LAYER = {
    "forward(self, x): return x": "forward should be called as forward(x, begin, end): too many positional arguments",
    "backward(self): return 0": "backward should be called as backward(dout): too many positional arguments",
    "__init__(self): pass": "it should be built as CLASS(weights, case): too many positional arguments",
}
USELESS = {
    "forward(self, *x): return None": "forward should give a tensor, but gave NoneType",
    "forward(self, *x): return super().forward(*x), 1": "forward should give a tensor, but gave tuple",
    "forward(self, *x): return super().forward(*x)[:, None]": "the shape of what forward gives is",
    "forward(self, *x): return super().forward(*x).double()": "the dtype of what forward gives is torch.float64",
    "forward(self, *x): import no_such_package": "ModuleNotFoundError: No module named 'no_such_package'",
    "backward(self, d): super().backward(d)": "backward should give a tensor, but gave NoneType",
    "parameter_gradients(self): return []": "parameter_gradients should give a dict of gradients by weight name",
    "parameter_gradients(self): return {}": "parameter_gradients should give gradients by weight name, but gave none",
    "key_value(self): return 3": "key_value should give two tensors, of keys and of values, or None",
    "key_value(self): return (torch.zeros(99, 2, 1, 64),) * 2": "key_value should give tensors [rows, 2, 64]",
}


def overridden(folder: Path, method: str) -> str:
    """The example with one method replaced."""
    path = folder / "overridden.py"
    path.write_text(f"{EXAMPLE.read_text()}\n\nclass Bad(Layer):\n    def {method}\n")
    return f"layer:{path}:Bad"


@pytest.mark.parametrize("method", NO_LAYER)
def test_a_class_that_cannot_be_called_as_a_layer_is_refused_before_anything_runs(method: str, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable) as told:
        registry.load(overridden(tmp_path, method))
    assert NO_LAYER[method] in str(told.value)


def test_a_function_or_a_coroutine_is_no_layer(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="forward returns before it has computed anything"):
        registry.load(overridden(tmp_path, "key(self): pass\n    async def forward(self, x, begin, end): return x"))
    path = tmp_path / "function.py"
    path.write_text("def Layer(weights, case): pass\n")
    with pytest.raises(BackendUnavailable, match="it is a function, and should be a class"):
        registry.load(f"layer:{path}:Layer")


@pytest.mark.parametrize("method", USELESS)
def test_a_layer_that_returns_something_else_is_told_in_one_sentence(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "Isolated", InThisProcess)
    name = overridden(tmp_path, method)
    with pytest.raises(BackendUnavailable) as told:
        limits.infer_limits(name, "cpu", ("fp32",), 1, lambda limit: None)
    assert str(told.value).startswith(f"{name.removeprefix('layer:')} cannot be tested: {USELESS[method]}")


def test_a_wrong_shape_now_and_then_is_a_finding(tmp_path: Path) -> None:
    name = overridden(tmp_path, "forward(self, *x): y = super().forward(*x); return y[:, None] if len(y) > 3 else y")
    few, many = (Case(lengths=(count,), head_dim=4, hidden=8) for count in (3, 4))
    backend = registry.load(name)
    assert examine(few, backend, "cpu").symptoms == ()
    assert type(examine(many, backend, "cpu").first) is MissingResult
