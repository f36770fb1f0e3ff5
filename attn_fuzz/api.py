"""The Python API: ``check``, ``check_layer``, ``replay`` and ``assert_attention``; import them from ``attn_fuzz``.

A kernel or layer is tried in processes of their own, by the command line itself: what it prints, crashes or leaves
behind stays there, and a verdict says the same as the command does. So it has to be importable: a function or class of
a module or file, not one that is defined inside another function.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

    from attn_fuzz.findings.finding import Finding

_CHECKING: Final = "ATTN_FUZZ_CHECKING"
"""Set in the processes of a check: the module under test is imported there, and must not check again as it is."""


_KINDS: Final = {"kernel": "function", "layer": "class"}


class CheckError(RuntimeError):
    """A check that could not be made; the message is one sentence."""


class FoundError(AssertionError):
    """A check found something, or tested nothing; ``verdict`` says what."""

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check came to; true when something was tested and nothing found."""

    data: Mapping[str, Any]
    """What the command printed with ``--json``."""

    def __bool__(self) -> bool:
        return not self.findings and not self.troubles and not self.untested and self.cases > 0

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Shrunk failing cases, with what failed and how."""
        from attn_fuzz.findings.finding import Finding

        return tuple(Finding.from_dict(each) for each in self.data["findings"])

    @property
    def cases(self) -> int:
        """Cases that were tried."""
        return int(self.data["cases"])

    @property
    def documents(self) -> int:
        """Documents in them."""
        return int(self.data["documents"])

    @property
    def seconds(self) -> float:
        """Of wall-clock time."""
        return float(self.data["seconds"])

    @property
    def coverage(self) -> dict[str, int]:
        """Cases by kind: level or mode, and dtype."""
        found: dict[str, int] = {}
        for tally in self.data["backends"].values():
            for kind, cases in tally["by_kind"].items():
                found[kind] = found.get(kind, 0) + cases
        return found

    @property
    def limits(self) -> tuple[Mapping[str, Any], ...]:
        """What the kernel does not take of what it declares, each with a case; the check went on without it."""
        return tuple(self.data.get("limits", ()))

    @property
    def troubles(self) -> tuple[str, ...]:
        """What went wrong with the check itself."""
        return tuple(self.data.get("troubles", ()))

    @property
    def untested(self) -> tuple[str, ...]:
        """Why nothing, or too little, was tested."""
        return tuple(self.data.get("untested", ()))

    def to_json(self) -> str:
        """The JSON object of the command."""
        return json.dumps(self.data)

    def raise_if_found(self) -> None:
        """Raises FoundError for findings, and where nothing was tested."""
        if found := self.findings:
            lines = [f"{finding.messages[0]}\n    {finding.case.in_short()}" for finding in found]
            from attn_fuzz.findings.same import count_bugs

            raise FoundError(f"{count_bugs(found)} findings in {self.cases} cases:\n" + "\n".join(lines), self)
        if not self:
            raise FoundError(
                "; ".join((*self.troubles, *self.untested)) or "no case was tried, so nothing was tested", self
            )


def _bound_to(thing: object) -> tuple[str, str | None]:
    """The name and module that something is to be imported by: its own, or of a variable that holds it.

    What an adapter gives, a partial function or a lambda has another name than the variable that it was put into.
    """
    name, module = getattr(thing, "__qualname__", ""), getattr(thing, "__module__", None)
    home = sys.modules.get(module or "")
    if name.isidentifier() and (home is None or getattr(home, name, None) is thing):
        return name, module
    for other, held in [*sys.modules.items()]:
        for variable, value in [*getattr(held, "__dict__", {}).items()]:
            if value is thing:
                return variable, other
    return name, module


def _file_of(thing: object) -> str:
    """The file that something was defined in, or nothing."""
    try:
        return inspect.getfile(thing)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""


def _importable(thing: object, what: str) -> str:
    """The name that another process imports a function or class by: ``MODULE:NAME`` or ``PATH.py:NAME``.

    Raises:
        CheckError: when there is none.
    """
    if isinstance(thing, str):
        return thing
    if not callable(thing):
        raise CheckError(f"{what} should be a {_KINDS[what]} or the name of one, not {thing!r}")
    name, module = _bound_to(thing)
    if not name.isidentifier() or module is None:
        raise CheckError(f"{what} {name or thing!r} cannot be imported by another process: define it at a module's top")
    if module != "__main__" and importlib.util.find_spec(module) is not None:
        return f"{module}:{name}"
    path = getattr(sys.modules.get(module), "__file__", None) or _file_of(thing)
    if not Path(path).is_file():
        raise CheckError(f"{what} {name} is in no file that another process could import")
    return f"{Path(path).resolve()}:{name}"


def _run(command: str, name: str, options: Mapping[str, Any]) -> Verdict:
    """The verdict of a command.

    Raises:
        CheckError: when it could not do what was asked.
    """
    if os.environ.get(_CHECKING):
        raise CheckError('a module that calls check when it is imported: put that under `if __name__ == "__main__":`')
    words = [sys.executable, "-m", "attn_fuzz", command, name, "--json"]
    for key, value in options.items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] if value else []
        elif value is not None:
            several = value if isinstance(value, (list, tuple)) else [value]
            words += [word for each in several for word in (option, str(each))]
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, _CHECKING: "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    try:
        return Verdict(json.loads(done.stdout))
    except json.JSONDecodeError:
        said = [line for line in done.stderr.splitlines() if line.startswith("attn-fuzz: ")]
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        unsaid = f"the check ended with exit status {done.returncode} and without a verdict: {last}"
        raise CheckError(said[-1].removeprefix("attn-fuzz: ") if said else unsaid) from None


def check(kernel: Callable[..., Any] | str, **options: Any) -> Verdict:
    """Fuzzes a varlen kernel, by itself and inside the buffered layer.

    Args:
        kernel: a function, or ``MODULE:FUNCTION`` or ``PATH.py:FUNCTION``.
        options: those of ``attn-fuzz check``: ``seconds`` or ``cases``, ``device``, ``seed``, ``level``, ``dtype``,
            ``mode``, ``first``, ``workers``, ``store``, ``strict``; lists for several.

    Raises:
        CheckError: when the kernel cannot be imported, is none, or an option is unknown; one sentence.
    """
    return _run("check", _importable(kernel, "kernel"), options)


def check_layer(layer: type | str, *, arguments: Mapping[str, Any] | None = None, **options: Any) -> Verdict:
    """Fuzzes a buffered attention layer (docs/your_layer.md).

    Args:
        layer: a class, or ``MODULE:CLASS`` or ``PATH.py:CLASS``.
        arguments: of the class, by name, beside weights and case: numbers, booleans, strings, None, lists and dicts.
        options: those of ``attn-fuzz check-layer``, as of ``check``.

    Raises:
        CheckError: as ``check`` does, and for arguments that JSON has no words for.
    """
    try:
        given = [f"{name}={json.dumps(value, allow_nan=False)}" for name, value in (arguments or {}).items()]
    except (TypeError, ValueError) as error:
        raise CheckError(f"arguments of a layer are told to another process as JSON: {error}") from None
    return _run("check-layer", _importable(layer, "layer"), {**options, "set": [*given, *options.get("set", ())]})


def replay(case: str, backend: str | None = None, **options: Any) -> Mapping[str, Any]:
    """Runs one saved case and tells every check's verdict.

    Args:
        case: a ``CASE.json`` file, a finding's id, a regression case's name, or a case as JSON text.
        backend: what runs it; None for a finding's own, or all that there are.
        options: those of ``attn-fuzz replay``: ``device``, ``store``, ``root``.

    Returns:
        ``case``, ``device``, and ``backends``: each with ``name`` and ``checks`` that failed, or why it ``refused``.

    Raises:
        CheckError: when there is no such case or backend; one sentence.
    """
    return _run("replay", case, {"backend": backend, **options}).data


def assert_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    dout: torch.Tensor | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    causal: bool = False,
    window: Sequence[int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    arithmetic: Mapping[str, Any] | None = None,
) -> None:
    """Asserts that results are those of packed attention over these very inputs, element by element.

    The bound of each element is derived from the inputs and the dtype (docs/oracle.md), so there is no tolerance to
    choose; in half precision, where an element may be off by a percent, neither may a document's head be off by a
    factor as a whole. All tensors are of one dtype (float32, bfloat16, float16) and device, but for ``lse``.

    Args:
        out: ``[tokens_q, heads, head_dim]``.
        q: as ``out``.
        k: ``[tokens_k, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``.
        v: as ``k``.
        cu_seqlens_q: integers ``[documents + 1]``, rising from 0 to ``tokens_q``.
        cu_seqlens_k: the same of keys.
        dout: as ``out``, what the backward was given; needed with ``dq``, ``dk`` or ``dv``.
        dq: as ``q``.
        dk: as ``k``, and so is ``dv``.
        dv: see ``dk``.
        lse: ``[tokens_q, heads]`` in natural logarithms; -inf for rows without a key.
        causal: bottom-right: query i of a document with q queries and k keys sees keys up to i + k - q.
        window: keys to the left and right of a row's own place that it sees; -1 for no limit.
        softmax_scale: None for ``head_dim ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        arithmetic: facts about the kernel's arithmetic (docs/arithmetic.md), such as ``{"products": "tf32"}``.

    Raises:
        AttentionMismatch: an AssertionError that says which document, row, head and channel, got, expected, z.
        ReferencesDisagree: where a second reference, one document at a time, confirms no mismatch.
        ValueError: when shapes, dtypes, devices or prefix sums do not belong together.
    """
    from attn_fuzz.oracle.own_inputs import AttentionMismatch, Masking, wrong_elements
    from attn_fuzz.reference.answer import Inputs

    gradients = {"dq": dq, "dk": dk, "dv": dv}
    if dout is None and any(x is not None for x in gradients.values()):
        raise ValueError("gradients are of an output gradient: give dout, too")
    results = {name: x.detach() for name, x in {"out": out, "lse": lse, **gradients}.items() if x is not None}
    given = out.new_zeros(out.shape) if dout is None else dout
    inputs = Inputs(*(x.detach() for x in (q, k, v, given)))
    left, right = window
    masking = Masking(causal=causal, window=(left, right), softmax_scale=softmax_scale, softcap=softcap)
    if wrong := wrong_elements(results, inputs, (cu_seqlens_q, cu_seqlens_k), masking, arithmetic):
        raise AttentionMismatch(wrong)
