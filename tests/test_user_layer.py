"""A user's own layer under test, right ones and broken ones; ``check-layer`` through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import Run, sentence
from hunts import first_failure, first_finding

from attn_fuzz.backends import registry
from attn_fuzz.campaign.messages import Assignment
from attn_fuzz.evaluation.seeded_faults import drawn
from attn_fuzz.oracle.examine import examine, some_probes
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


def written(folder: Path, before: str, after: str) -> Path:
    """The example with some of it replaced."""
    source = EXAMPLE.read_text()
    assert source.count(before) == 1
    path = folder / "written.py"
    path.write_text(source.replace(before, after))
    return path


def job(path: Path) -> Assignment:
    """What a campaign on a layer gives its worker."""
    backend = f"layer:{path}:Layer"
    return Assignment(backend=backend, device="cpu", seed=0, levels=("layer",), cases=200, stop_at_first=True)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_example_is_clean(attn_fuzz: Run) -> None:
    done = attn_fuzz("check-layer", f"{EXAMPLE}:Layer", *OPTIONS, "--cases", "12")
    assert done.status == 0, done.err
    assert done.json["cases"] == 12
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
