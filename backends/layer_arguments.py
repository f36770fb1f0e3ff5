"""Arguments of a user's class, as part of its backend's name: ``layer:my_layer.py:Layer(depth=2, mode='fast')``.

A name is what findings, regression cases and other processes know of a backend, so that the arguments are where it is.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attn_fuzz.backends.kernel import BackendUnavailable

_CLASS: Final = re.compile(r":[^\W\d]\w*(?=\()")
"""The name of a class, with what stands before it, where arguments follow."""

_GIVEN: Final = ("weights", "case")
"""What every layer is built with."""


def named(name: str, arguments: Mapping[str, Any]) -> str:
    """A backend's name with arguments, in alphabetical order.

    Args:
        name: without any.
        arguments: numbers, booleans, strings, None, and lists and dicts of them, by identifiers.
    """
    written = ", ".join(f"{key}={arguments[key]!r}" for key in sorted(arguments))
    return f"{name}({written})" if arguments else name


def taken_apart(name: str) -> tuple[str, dict[str, Any]]:
    """A backend's name without arguments, and those; the inverse of ``named``.

    Parentheses that are no arguments, as a path may have them, belong to the name.
    """
    for found in _CLASS.finditer(name):
        if (arguments := _read(name[found.end() :])) is not None:
            return name[: found.end()], arguments
    return name, {}


def _read(call: str) -> dict[str, Any] | None:
    """Keyword arguments of a call, such as ``(depth=2)``, or None where the text is anything else."""
    try:
        parsed = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(parsed, ast.Call) or not isinstance(parsed.func, ast.Name) or parsed.args:
            return None
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in parsed.keywords if keyword.arg}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def require_arguments(made: type, name: str, arguments: Mapping[str, Any], given: Sequence[str] = ()) -> None:
    """Sees that a class can be built with these arguments, beside weights, case, and what else it is always given.

    Raises:
        BackendUnavailable: where it cannot, with the reason in one sentence.
    """
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):
        # Building one will tell.
        return
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    # The first two are weights and case, whatever a class calls them.
    taken = [each.name for each in [*parameters.values()][len(_GIVEN) :] if each.kind in keywords]
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        taken += [key for key in arguments if key not in parameters]
    if unknown := sorted(key for key in arguments if key not in taken):
        known = f"it takes {', '.join(taken)}" if taken else "it takes none beside weights and case"
        raise BackendUnavailable(f"{name} takes no argument {unknown[0]!r}; {known}")
    required = [key for key in taken if key in parameters and parameters[key].default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in arguments and key not in given]:
        raise BackendUnavailable(f"{name} needs an argument {missing[0]!r}; give it by --set {missing[0]}=VALUE")
