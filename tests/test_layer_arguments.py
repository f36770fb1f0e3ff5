"""Arguments of a user's layer: set on the command line or from Python, kept by findings and saved cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import Run, sentence

from attn_fuzz.api import CheckError, check_layer
from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.layer_arguments import named, taken_apart
from attn_fuzz.backends.registry import found_from
from attn_fuzz.cli.arguments import UsageError
from attn_fuzz.cli.set_option import arguments_of, with_arguments
from attn_fuzz.oracle.examine import examine
from attn_fuzz.reference.case import Case

EXAMPLE = (Path(__file__).resolve().parent.parent / "examples" / "my_layer.py").read_text()
OWN = f"""{EXAMPLE}

class Own(Layer):
    def __init__(self, weights, case, factor=1.0, *, name="a", more=()):
        super().__init__(weights, case)
        self.scale = self.scale * factor


class Needing(Layer):
    def __init__(self, weights, case, *, depth):
        super().__init__(weights, case)


class Taking(Layer):
    def __init__(self, weights, case, **options):
        super().__init__(weights, case)
        assert set(options) <= {{"anything"}}
"""
OPTIONS = ("--device", "cpu", "--json", "--workers", "1")
CASE = Case(lengths=(2,), head_dim=2, hidden=2)

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"depth": 2},
    {"f": 1e-5, "big": -(10**20), "yes": True, "none": None},
    {"name": "a(b:c)=', \n {x}"},
    {"list": [1, {"key": [None, "x"]}], "empty": {}},
]


@pytest.fixture
def layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", ["layer:folder (2)/own.py:Own", "layer:package.module:Own", "layer:f(x=1).py:Own"])
def test_a_name_keeps_arguments(name: str, arguments: dict[str, Any]) -> None:
    assert taken_apart(named(name, arguments)) == (name, arguments)


def test_what_is_no_argument_belongs_to_the_name() -> None:
    for name in ("loop", "trigger:3,4:loop", "layer:a.py:Own(3)", "layer:my(a).py:Own", "a.py:f(", "a.py:f(x=open)"):
        assert taken_apart(name) == (name, {})


def test_a_name_with_arguments_is_found_from_elsewhere() -> None:
    assert found_from("layer:a.py:Own(name='b:c')", Path("/root")) == "layer:/root/a.py:Own(name='b:c')"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1.5e3", -1500.0),
        ("true", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("fast", "fast"),
        ('"3"', "3"),
        ("a=b", "a=b"),
        ("", ""),
        ("[1, [2]]", [1, [2]]),
        ('{"a": 1}', {"a": 1}),
        ("[1,", "[1,"),
    ],
)
def test_values_are_json_or_else_strings(text: str, value: object) -> None:
    (found,) = arguments_of([f"name={text}"]).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("given", [["a"], ["=3"], ["a b=3"], ["3=3"], ["a=1", "a=2"], ["a=NaN"], ["a=[Infinity]"]])
def test_what_sets_nothing_is_told(given: list[str]) -> None:
    with pytest.raises(UsageError, match="--set"):
        arguments_of(given)


def test_what_is_set_replaces_what_the_name_has() -> None:
    assert with_arguments("a.py:Own(x=1, y=2)", ["y=3"]) == "a.py:Own(x=1, y=3)"
    assert with_arguments("a.py:Own", None) == "a.py:Own"


def test_a_class_gets_its_arguments(layer: Path) -> None:
    wrong, right = (registry.load(named(f"layer:{layer}:Own", {"factor": factor})) for factor in (2.0, 1))
    assert examine(CASE, wrong, "cpu").symptoms
    assert not examine(CASE, right, "cpu").symptoms
    assert not examine(CASE, registry.load(f"layer:{layer}:Taking(anything=3)"), "cpu").symptoms


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Own(factr=2)", "own.py:Own takes no argument 'factr'; it takes factor, name, more"),
        ("Own(case=2)", "own.py:Own takes no argument 'case'; it takes factor, name, more"),
        ("Layer(depth=2)", "own.py:Layer takes no argument 'depth'; it takes none beside weights and case"),
        ("Needing", "own.py:Needing needs an argument 'depth'; give it by --set depth=VALUE"),
        ("Taking(case=3)", "own.py:Taking takes no argument 'case'; it takes none beside weights and case"),
    ],
)
@pytest.mark.usefixtures("layer")
def test_a_wrong_argument_is_told_in_one_sentence(name: str, said: str) -> None:
    with pytest.raises(BackendUnavailable) as told:
        registry.load(f"layer:own.py:{name}")
    assert str(told.value) == said


@pytest.mark.usefixtures("layer")
def test_the_command_says_so_with_status_2(attn_fuzz: Run) -> None:
    done = attn_fuzz("check-layer", "own.py:Own", *OPTIONS, "--cases", "1", "--set", "factr=2")
    assert sentence(done).endswith("own.py:Own takes no argument 'factr'; it takes factor, name, more")


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_finding_its_replay_and_its_saved_case_keep_them(
    layer: Path, attn_fuzz: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = attn_fuzz("check-layer", "own.py:Own", *OPTIONS, "--cases", "30", "--first", "--set", "factor=2.0")
    (finding,) = done.json["findings"]
    assert finding["backend"] == "layer:own.py:Own(factor=2.0)"
    store = ("--store", str(layer.parent / ".attn-fuzz" / "findings"))
    folder = layer.parent / "tests" / "regressions"
    assert attn_fuzz("save", finding["id"], "kept", "--folder", str(folder), *store).status == 0
    assert json.loads((folder / "kept.json").read_text())["backend"] == finding["backend"]
    (layer.parent / "elsewhere").mkdir()
    monkeypatch.chdir(layer.parent / "elsewhere")
    for named_so in (finding["id"], str(folder / "kept.json")):
        again = attn_fuzz("replay", named_so, "--json", *store)
        assert again.status == 1, again.err
        assert again.json["backends"][0]["name"] == f"layer:{layer.parent}/own.py:Own(factor=2.0)"
    layer.write_text(OWN.replace("* factor", "* 1"))
    assert attn_fuzz("replay", finding["id"], "--json", *store).status == 0


def test_python_tells_them_to_the_command(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []

    def run(words: list[str], **_: object) -> Any:
        told.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr("attn_fuzz.api.subprocess.run", run)
    with pytest.raises(KeyboardInterrupt):
        check_layer(f"{layer}:Own", arguments={"factor": 2.0, "name": "3"}, cases=3, set=["more=[1, null]"])
    words = told[0]
    given = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    assert arguments_of(given) == {"factor": 2.0, "name": "3", "more": [1, None]}
    for value in (object(), float("nan")):
        with pytest.raises(CheckError, match="told to another process as JSON"):
            check_layer(f"{layer}:Own", arguments={"factor": value})
