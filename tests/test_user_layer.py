"""``check-layer``: a user's own layer under test, right ones and broken ones, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def check_layer(path: Path, tmp_path: Path, *arguments: str) -> tuple[int, dict, str]:
    """Exit status, the JSON object and standard error of a run."""
    command = [sys.executable, "-m", "attn_fuzz", "check-layer", f"{path}:Layer", "--device", "cpu", "--json"]
    command += ["--store", str(tmp_path / "store"), "--workers", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_the_example_is_clean(tmp_path: Path) -> None:
    status, result, _ = check_layer(EXAMPLE, tmp_path, "--cases", "60")
    assert status == 0
    assert result["cases"] == 60
    assert result["findings"] == []


@pytest.mark.parametrize("name", VARIANTS)
def test_a_right_layer_of_another_style_is_clean(name: str, tmp_path: Path) -> None:
    before, after = VARIANTS[name]
    source = EXAMPLE.read_text()
    assert source.count(before) == 1
    other = tmp_path / "other.py"
    other.write_text(source.replace(before, after))
    status, result, _ = check_layer(other, tmp_path, "--cases", "60")
    assert (status, result["findings"]) == (0, [])


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_convicted_and_shrunk(name: str, tmp_path: Path) -> None:
    right, wrong = BREAKS[name]
    source = EXAMPLE.read_text()
    assert source.count(right) == 1
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(right, wrong))
    status, result, _ = check_layer(broken, tmp_path, "--cases", "200", "--first")
    assert status == 1
    case = result["findings"][0]["case"]
    assert len(case["lengths"]) <= 3
    assert sum(case["lengths"]) <= 40


def test_a_class_without_the_methods_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("class Layer:\n    pass\n")
    status, result, error = check_layer(path, tmp_path, "--cases", "1")
    assert status == 2
    assert result == {}
    assert error.strip().splitlines()[-1].endswith("is no layer: it has no method forward")


def test_a_layer_that_raises_is_told_where(tmp_path: Path) -> None:
    source = EXAMPLE.read_text()
    broken = tmp_path / "broken.py"
    line = "        x = x.detach().requires_grad_()\n"
    broken.write_text(source.replace(line, "        assert begin == 0, 'no past yet'\n" + line))
    place = source[: source.index(line)].count("\n") + 1
    status, result, _ = check_layer(broken, tmp_path, "--cases", "60", "--first")
    assert status == 1
    (finding,) = result["findings"]
    assert finding["case"] == {"level": "layer", "lengths": [2], "cuts": [1], "head_dim": 1, "hidden": 1}
    assert f"no past yet (broken.py, line {place})" in finding["messages"][0]
