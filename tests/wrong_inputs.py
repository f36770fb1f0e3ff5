"""Wrong inputs, what is said to each, and with which exit status.

``PYTHONPATH=. python tests/wrong_inputs.py`` writes docs/wrong_inputs.md. All run in this process: a kernel's processes
are stood in for, and a campaign that begins all the same is an error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from in_turn import InThisProcess

import attn_fuzz
from attn_fuzz.campaign import limits
from attn_fuzz.cli.app import main
from attn_fuzz.findings.finding import Finding
from attn_fuzz.findings.ledger import entry_of
from attn_fuzz.nights.database import Database
from attn_fuzz.reference.case import Case
from attn_fuzz.reference.case_format import FORMAT

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "wrong_inputs.md"
CASE: Final = '{"level": "kernel", "lengths": [2], "head_dim": 2}'
SIGNATURE: Final = "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)"
RANKS: Final = 'capabilities = {**Layer.capabilities, "ranks": [1, 2]}'
BUILT: Final = "\n    def __init__(self, weights, case, group=None):\n        pass"
MOST_LETTERS: Final = 260
"""Of a sentence in the table: lists of all that there is change with every backend."""


class Said(NamedTuple):
    """What came of a wrong input."""

    status: str
    sentence: str


class Wrong(NamedTuple):
    """A wrong input."""

    shown: str
    """As the table has it."""
    act: Callable[[], Said]


# Doing it.


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder of its own with no GPU, no processes and no campaign."""

    def no_campaign(*_: object) -> None:
        raise AssertionError("a campaign began")

    with tempfile.TemporaryDirectory(prefix="wrong-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr("attn_fuzz.cli.campaigns.Pool", no_campaign)
        patch.setattr("attn_fuzz.nights.supervisor.RoundPool", no_campaign)
        patch.setattr(limits, "Isolated", InThisProcess)
        patch.setattr("attn_fuzz.api.subprocess.run", in_this_process)
        yield Path(folder).resolve()


def command(*words: str) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", ["attn-fuzz", *words])
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, out.getvalue(), err.getvalue()


def in_this_process(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    """Stands for the process that the Python functions start."""
    status, out, err = command(*words[3:])
    return subprocess.CompletedProcess(words, status, out, err)


def shown(text: str) -> str:
    """A sentence without this machine's folders."""
    assert "\n" not in text, text
    for path, name in ((Path.cwd(), "FOLDER"), (ROOT, "CHECKOUT"), (Path(sys.prefix), "PYTHON")):
        text = text.replace(str(path.resolve()), name).replace(str(path), name)
    # The option parser calls a program by what has started it.
    text = re.sub(r"; see .*?((?: [a-z-]+)? --help)$", r"; see attn-fuzz\1", text)
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 4].rstrip() + " ..."


def of_command(*words: str) -> Said:
    """What a command says: the one line on standard error that is its own."""
    status, _, err = command(*words)
    assert "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("attn-fuzz: ")]
    return Said(str(status), shown(line.removeprefix("attn-fuzz: ")))


def wrong(words: str, *before: Callable[[], object]) -> Wrong:
    """A command that is wrong, after what comes before it."""

    def act() -> Said:
        for each in before:
            each()
        return of_command(*(CASE if word == "CASE" else word for word in words.split(" ")))

    return Wrong(f"`attn-fuzz {words}`", act)


def called(words: str, function: Callable[[], object]) -> Wrong:
    """A Python call that is wrong."""

    def act() -> Said:
        try:
            function()
        except (attn_fuzz.CheckError, ValueError) as error:
            return Said(type(error).__name__, shown(str(error)))
        raise AssertionError(f"{words} says nothing")

    return Wrong(f"`{words}`", act)


def file(name: str, text: str | bytes) -> Callable[[], object]:
    """Writes a file."""

    def write() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


FINDING: Final = Finding(
    backend="loop",
    device="cpu",
    symptom="WrongGradK",
    checks=("budget",),
    messages=("WrongGradK [budget] dk: wrong",),
    case=Case(level="kernel", lengths=(2,)),
    original_case=Case(level="kernel", lengths=(3, 4)),
    cases_to_find=17,
    seconds_to_find=0.125,
)


def stored(**changes: object) -> Callable[[], object]:
    """Writes a finding, some of it changed, under its id."""
    return file(f"store/{FINDING.id}.json", json.dumps(FINDING.to_dict() | changes))


def noted(note: str, row: Wrong) -> Wrong:
    """A row with what a command does not show of its state."""
    return Wrong(f"{row.shown}, {note}", row.act)


def disk(error: int, message: str) -> Callable[[], object]:
    """A disk that cannot be written to, for the one command that follows."""

    def fail(*_: object, **__: object) -> None:
        tempfile.NamedTemporaryFile = before  # type: ignore[misc]
        raise OSError(error, message)

    before = tempfile.NamedTemporaryFile

    def act() -> None:
        tempfile.NamedTemporaryFile = fail  # type: ignore[assignment,misc]

    return act


def kernel(note: str, body: str, command: str = "check kernel.py:kernel --device cpu") -> Wrong:
    """A kernel that is none."""
    return noted(note, wrong(command, file("kernel.py", body)))


def returning(note: str, body: str) -> Wrong:
    """A kernel of the right signature that does something else."""
    return kernel(note, f"import os\n\n\ndef kernel{SIGNATURE}:\n    {body}\n")


def layer(note: str, body: str, options: str = "") -> Wrong:
    """A layer that is none."""
    example = (ROOT / "examples" / "my_layer.py").read_text()
    command = f"check-layer layer.py:Own --device cpu{options}"
    return noted(note, wrong(command, file("layer.py", f"{example}\n\n{body}\n")))


def setting(words: str) -> Wrong:
    """Arguments of the example's layer, which takes none."""
    example = (ROOT / "examples" / "my_layer.py").read_text()
    return wrong(f"check-layer layer.py:Layer --device cpu {words}", file("layer.py", example))


def _inner() -> Callable[..., Any]:
    def inner(q: Any) -> Any:
        return q

    return inner


def _attention(**changes: torch.Tensor) -> None:
    q = torch.zeros(2, 1, 4)
    sums = torch.tensor([0, 2])
    given = {"out": q, "q": q, "k": q, "v": q, "cu_seqlens_q": sums, "cu_seqlens_k": sums} | changes
    attn_fuzz.assert_attention(**given)


SAVED: Final = file(
    "tests/regressions/kept.json", json.dumps({"format": FORMAT, "about": "", "case": json.loads(CASE)})
)

COMMANDS: Final = (
    wrong("dance"),
    wrong("run --quickly"),
    wrong("check"),
    wrong("run --backend flesh"),
    wrong("run --backend fault:M999"),
    wrong("run --backend trigger:3:loop"),
    wrong("run --backend flash --device cpu"),
    wrong("run --device tpu"),
    noted("without a GPU", wrong("run --device cuda")),
    noted("without a GPU", wrong("check kernel.py:kernel --device cuda:7")),
    wrong("run --seconds -1"),
    wrong("run --seconds soon"),
    wrong("run --cases 0"),
    wrong("run --seconds 5 --cases 5"),
    wrong("run --dtype fp8"),
    wrong("run --level model"),
    wrong("run --mode fast"),
    wrong("run --ask graphs"),
    wrong("run --ask same-in-company --mode packed"),
    wrong("run --ask same-in-company --mode batch"),
    wrong("run --ask replayed-alike --device cpu"),
    wrong("run --aim gaps"),
    wrong("run --aim colour=red"),
    wrong("run --aim gaps=some"),
    wrong("run --backend backup --device cpu --aim gaps=both"),
    wrong("run --poison arsenic"),
    wrong("run --workers 0"),
    wrong("run --seed -1"),
    wrong("run --ranks 0"),
    wrong("run --backend loop --ranks 8 --tensor-ranks 64"),
    wrong("run --ranks 2 --level kernel"),
    wrong("run --backend legacy:loop --mode batch --level layer --ranks 2"),
    wrong("run --backend legacy:loop --level kernel"),
    wrong("faults --only M999"),
    wrong("backends --device tpu"),
)

STORES: Final = (
    noted("which is a file", wrong("run --backend loop --store taken", file("taken", "mine"))),
    noted("on a full disk", wrong("run --backend loop", disk(errno.ENOSPC, "No space left on device"))),
    noted("on a read-only disk", wrong("run --backend loop", disk(errno.EROFS, "Read-only file system"))),
    noted("which is not there", wrong("list --store nowhere")),
    noted("which is not there", wrong("show abc --store nowhere")),
    noted("which is empty", wrong("show abc --store store", lambda: Path("store").mkdir())),
    wrong("show abc --store store", stored()),
    noted(
        "where two begin so",
        wrong(f"show {FINDING.id[:4]} --store store", stored(), file(f"store/{FINDING.id[:4]}000000.json", "{}")),
    ),
    noted("damaged", wrong(f"show {FINDING.id} --store store", file(f"store/{FINDING.id}.json", "{"))),
    noted("empty", wrong(f"replay {FINDING.id} --store store", file(f"store/{FINDING.id}.json", ""))),
    noted("with one that is damaged", wrong("list --store store", stored(), file("store/0123456789.json", "[]"))),
    noted("of a newer format", wrong(f"show {FINDING.id} --store store", stored(format=FORMAT + 1))),
    noted("with an unknown key", wrong(f"replay {FINDING.id} --store store", stored(colour="red"))),
    noted(
        "with an unknown key in its case",
        wrong(f"script {FINDING.id} --store store", stored(case={"level": "kernel", "lengths": [2], "colour": 1})),
    ),
)

CASES: Final = (
    noted("which is not there", wrong("replay case.json")),
    noted("which is a folder", wrong("replay case.json", lambda: Path("case.json").mkdir())),
    noted("which is no text", wrong("replay case.json", file("case.json", b"\xff\xfe\x00"))),
    noted("which is empty", wrong("replay case.json", file("case.json", ""))),
    noted("which is cut off", wrong("replay case.json", file("case.json", CASE[:-1]))),
    noted("which is a list", wrong("replay case.json", file("case.json", "[1, 2]"))),
    noted("with an unknown key", wrong("replay case.json", file("case.json", '{"length": [1]}'))),
    noted("of a newer format", wrong("replay case.json", file("case.json", json.dumps({"format": 9, "lengths": [1]})))),
    noted("with an unknown dtype", wrong("replay case.json", file("case.json", '{"lengths": [1], "dtype": "fp64"}'))),
    noted("with words for numbers", wrong("replay case.json", file("case.json", '{"lengths": "many"}'))),
    noted("with an impossible cut", wrong("replay case.json", file("case.json", '{"lengths": [2], "cuts": [5]}'))),
    wrong("replay nothing"),
    wrong("replay CASE --backend legacy:loop --device cpu"),
    wrong("script CASE"),
    noted(
        "of a layer", wrong("script case.json --backend fault:M01 --device cpu", file("case.json", '{"lengths": [2]}'))
    ),
    wrong("save CASE kept", SAVED),
    wrong("save CASE ../kept"),
    wrong("save CASE kept.json/"),
    wrong("save CASE kept --expect-failure flesh"),
    noted("which is a file", wrong("save CASE kept --folder taken", file("taken", "mine"))),
    noted("whose file is cut off", wrong("replay kept", file("tests/regressions/kept.json", '{"case": '))),
    noted(
        "whose file is of a newer version",
        wrong("replay kept", file("tests/regressions/kept.json", f'{{"format": {FORMAT + 1}, "case": {CASE}}}')),
    ),
    noted(
        "which names no controls",
        wrong("replay kept", file("tests/regressions/kept.json", f'{{"expected_failures": 3, "case": {CASE}}}')),
    ),
)


def database(*statements: str) -> Callable[[], object]:
    """Writes a campaign database, and changes it."""

    def write() -> None:
        with Database(Path("store.sqlite")):
            pass
        with contextlib.closing(sqlite3.connect("store.sqlite")) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()

    return write


def entered(text: Callable[[str], str]) -> Callable[[], object]:
    """Writes the ledger's entry of the finding, with another text."""
    entry = entry_of(FINDING)
    return file(f"store/ledger/{entry.id}.json", text(entry.to_json()))


ENTRY: Final = entry_of(FINDING).id
DAMAGED: Final = file("store.sqlite", "no database" * 100)

NIGHTS: Final = (
    wrong("campaign --backend flesh"),
    wrong("campaign --backend flash --device cpu"),
    wrong("campaign --device tpu"),
    wrong("campaign --mode fast"),
    wrong("campaign --level model"),
    wrong("campaign --seconds 0"),
    wrong("campaign --backend legacy:loop --device cpu --level kernel"),
    noted("which is a file", wrong("campaign --backend loop --device cpu --store taken", file("taken", "mine"))),
    noted("whose database is damaged", wrong("campaign --backend loop --device cpu --store store", DAMAGED)),
    noted(
        "whose database is of a newer version",
        wrong("campaign --backend loop --device cpu --store store", database("PRAGMA user_version = 99")),
    ),
    noted(
        "whose database is another program's",
        wrong("campaign --backend loop --device cpu --store store", database("PRAGMA user_version = 0")),
    ),
    noted(
        "whose database lacks a table",
        wrong("campaign --backend loop --device cpu --store store", database("DROP TABLE pairs")),
    ),
    noted("without a campaign", wrong("coverage --store store")),
    noted("whose database is damaged", wrong("coverage --store store", DAMAGED)),
    noted(
        "whose database has words for numbers",
        wrong("coverage --store store", database("INSERT INTO pairs VALUES (1, 1, 1, 'many')")),
    ),
    noted("which no campaign had", wrong("coverage --store store --backend loop", database())),
)

LEDGER: Final = (
    wrong("ledger nothing --store store", stored()),
    wrong("ledger --state reported --store store", stored()),
    wrong(f"ledger {ENTRY} --state gone --store store", stored()),
    wrong(f"ledger {ENTRY} --state fixed --store store", stored()),
    wrong(f"ledger {ENTRY} --state duplicate --store store", stored()),
    wrong(f"ledger {ENTRY} --found-by luck --store store", stored()),
    wrong("ledger --take nowhere --store store", stored()),
    noted("whose entry is cut off", wrong("ledger --store store", stored(), entered(lambda text: text[:-3]))),
    noted(
        "whose entry is of a newer version",
        wrong("ledger --store store", stored(), entered(lambda text: text.replace('"format": 1', '"format": 9'))),
    ),
    noted("with a finding that is damaged", wrong("ledger --store store", file(f"store/{FINDING.id}.json", "{"))),
    wrong("retest nothing --store store", stored()),
    wrong(f"retest {ENTRY} --device tpu --store store", stored()),
    noted("whose entry is empty", wrong(f"retest {ENTRY} --store store", stored(), entered(lambda text: ""))),
    wrong("report --verdict nowhere.json"),
    noted("which is a list", wrong("report --verdict verdict.json", file("verdict.json", "[]"))),
    noted("which is another JSON", wrong("report --verdict verdict.json", file("verdict.json", '{"a": 1}'))),
    wrong("report --repeat -1"),
    noted("which is not there", wrong("report --repeat 0 --output nowhere/report.html")),
    noted("whose database is damaged", wrong("report --repeat 0 --store store", DAMAGED)),
    noted(
        "with a finding that is damaged", wrong("report --repeat 0 --store store", file("store/0123456789.json", "[]"))
    ),
)

KERNELS: Final = (
    wrong("check kernel"),
    wrong("check no_such_module:kernel"),
    wrong("check nothing.py:kernel"),
    kernel("without it", "x = 1\n"),
    kernel("a module that raises", "raise RuntimeError('no licence')\n"),
    kernel("a module that imports what is not there", "import no_such_package\n"),
    kernel("a module that ends the process", "raise SystemExit(0)\n"),
    kernel("a string", "kernel = 'flash'\n"),
    kernel("a class", "class kernel:\n    pass\n"),
    kernel("a coroutine", f"async def kernel{SIGNATURE}:\n    return q\n"),
    kernel("of another signature", "def kernel(q, k, v):\n    return q\n"),
    wrong("check torch:addmm --device cpu"),
    returning("which returns 3", "return 3"),
    returning("which returns nothing", "pass"),
    returning("which returns (out, None)", "return q, None"),
    returning("which returns another shape", "return q.flatten(1)"),
    returning("which returns another dtype", "return q.double()"),
    returning("which returns on another device", "return q.to('meta')"),
    returning("which returns no gradient", "return q.detach()"),
    returning("which imports what is not there", "import no_such_package"),
    returning("which reads a variable that is not set", "return os.environ['NO_SUCH_VARIABLE']"),
    returning("which uses a name that is not there", "return undefined_name"),
    kernel("of capabilities unknown", f"def kernel{SIGNATURE}: pass\nkernel.capabilities = {{'colour': 1}}\n"),
    kernel("of dtypes unknown", f"def kernel{SIGNATURE}: pass\nkernel.capabilities = {{'dtypes': ['fp8']}}\n"),
    kernel("of CUDA alone", f"def kernel{SIGNATURE}: pass\nkernel.capabilities = {{'devices': ['cuda']}}\n"),
    kernel(
        "of bf16 alone",
        f"def kernel{SIGNATURE}: pass\nkernel.capabilities = {{'dtypes': ['bf16']}}\n",
        "check kernel.py:kernel --device cpu --dtype fp32",
    ),
    wrong("check-layer Layer"),
    layer("without methods", "class Own:\n    pass"),
    layer("a function", "def Own(weights, case):\n    pass"),
    layer("built otherwise", "class Own(Layer):\n    def __init__(self):\n        pass"),
    layer("which declares no ranks", "class Own(Layer):\n    pass", " --ranks 2"),
    layer("of other ranks", f"class Own(Layer):\n    {RANKS}{BUILT}", " --ranks 4"),
    layer("which takes no process group", f"class Own(Layer):\n    {RANKS}", " --ranks 2"),
    layer("called otherwise", "class Own(Layer):\n    def forward(self, x):\n        return x"),
    layer("which returns nothing", "class Own(Layer):\n    def forward(self, x, begin, end):\n        pass"),
    layer(
        "which returns another shape",
        "class Own(Layer):\n    def forward(self, x, begin, end):\n        return x[:, None]",
    ),
    layer("without gradients", "class Own(Layer):\n    def parameter_gradients(self):\n        return {}"),
    layer("of capabilities misspelt", "class Own(Layer):\n    capabilities = {'padding': 'none'}"),
    layer("reusable, without `restart`", "class Own(Layer):\n    capabilities = {'reusable': True}"),
    layer("with an argument that is not set", "class Own(Layer):\n    def __init__(self, weights, case, depth): ..."),
    setting("--set depth=3"),
    setting("--set depth"),
    setting("--set depth=1 --set depth=2"),
    setting("--set depth=NaN"),
)

PYTHON: Final = (
    called("attn_fuzz.check(lambda q: q)", lambda: attn_fuzz.check(lambda q: q)),
    called("attn_fuzz.check(inner_function)", lambda: attn_fuzz.check(_inner())),
    called("attn_fuzz.check(3)", lambda: attn_fuzz.check(3)),  # type: ignore[arg-type]
    called("attn_fuzz.check('kernel')", lambda: attn_fuzz.check("kernel")),
    called("attn_fuzz.check('nothing.py:kernel')", lambda: attn_fuzz.check("nothing.py:kernel")),
    called("attn_fuzz.check('math:floor', device='cpu')", lambda: attn_fuzz.check("math:floor", device="cpu")),
    called("attn_fuzz.check('math:floor', hours=3)", lambda: attn_fuzz.check("math:floor", hours=3)),
    called("attn_fuzz.check('math:floor', seconds=-1)", lambda: attn_fuzz.check("math:floor", seconds=-1)),
    called("attn_fuzz.check('math:floor', dtype='fp8')", lambda: attn_fuzz.check("math:floor", dtype="fp8")),
    called("attn_fuzz.check_layer('math:floor')", lambda: attn_fuzz.check_layer("math:floor", device="cpu")),
    called(
        "attn_fuzz.check_layer('layer.py:Layer', arguments={'depth': {3}})",
        lambda: attn_fuzz.check_layer("layer.py:Layer", arguments={"depth": {3}}),
    ),
    called("assert_attention(..., dq=dq)", lambda: _attention(dq=torch.zeros(2, 1, 4))),
    called("assert_attention(k of 3 channels, ...)", lambda: _attention(k=torch.zeros(2, 1, 3))),
    called("assert_attention(..., cu_seqlens_k=[0, 3])", lambda: _attention(cu_seqlens_k=torch.tensor([0, 3]))),
)

TABLES: Final = {
    "Commands and options": COMMANDS,
    "Stores and findings": STORES,
    "Cases and regression cases": CASES,
    "Campaigns and coverage": NIGHTS,
    "Ledger and reports": LEDGER,
    "Kernels and layers": KERNELS,
    "Python": PYTHON,
}


def said(row: Wrong) -> Said:
    """What comes of it."""
    with scratch():
        return row.act()


def without_phrasing(what: Said) -> Said:
    """The same without the words of the option parser, which change from one of its versions to the next."""
    sentence, see, where = what.sentence.partition("; see attn-fuzz")
    return what._replace(sentence=re.split(r"[:(]", sentence)[0] + see + where) if see else what


def committed() -> dict[str, Said]:
    """What the page has, by input."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows]
    return {row: Said(status, sentence) for row, status, sentence in cells}


def line(row: Wrong, what: Said) -> str:
    """A row of the page."""
    cells = (row.shown, what.status, what.sentence)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


HEAD: Final = """# Wrong inputs

What is said to each, and with which exit status: one sentence on standard error, and no traceback; Python
functions raise it. `CASE` stands for a case as JSON text; long lists are cut.
`PYTHONPATH=. python tests/wrong_inputs.py` writes this page.
"""


def page() -> str:
    """The page."""
    parts = [HEAD]
    for title, rows in TABLES.items():
        parts.append(f"\n## {title}\n\n| input | exit status | sentence |\n|---|---|---|\n")
        parts += [line(row, said(row)) + "\n" for row in rows]
    return "".join(parts)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "140")
    PAGE.write_text(page())
