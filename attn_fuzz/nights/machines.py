"""Where campaigns can run, as the supervisor of several machines sees them; ``nights.ray_machines`` are some."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class ClusterError(RuntimeError):
    """Machines cannot be used; the message is one sentence that says what to do."""


class Lost(RuntimeError):
    """A machine, or the process there, is no more; a sentence says what is known of it."""


@dataclasses.dataclass(frozen=True)
class ClusterWishes:
    """What a campaign on several machines is asked for."""

    kinds: tuple[str, ...]
    """``cpu``, ``cuda``."""
    backends: tuple[str, ...]
    """None for all that run at a place."""
    levels: tuple[str, ...]
    mode: str
    workers: int | None
    """At each place; None for one a core."""
    seed: int
    seconds: float | None
    """None: until it is told to end."""


class Place(NamedTuple):
    """What one campaign has of a machine: a GPU and a share of its cores, or cores."""

    machine: str
    """Its id."""
    host: str
    kind: str
    """``cpu`` or ``cuda``."""
    number: int
    """Of the machine's places of this kind."""
    cores: int

    def __str__(self) -> str:
        return f"{self.host} ({self.kind}{f' {self.number}' if self.kind == 'cuda' else ''})"


class Machines(Protocol):
    """Places, and processes at them that hold a ``nights.node.Node`` each."""

    def places(self) -> Sequence[Place]:
        """Those that are there now."""

    def start(self, place: Place, name: str) -> Any:
        """A node at a place, with a folder of that name; at once, though it may take until its first answer."""

    def ask(self, node: Any, method: str, *arguments: Any) -> Any:
        """What a method of a node will have given, once it is ``answered``."""

    def answered(self, answers: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Those that are there, after at most so many seconds; at once if there is one."""

    def value(self, answer: Any) -> Any:
        """What came.

        Raises:
            Lost: when nothing will ever come.
        """

    def stop(self, node: Any) -> None:
        """Ends a node's process, if there is one, and what it has started."""

    def close(self) -> None:
        """Ends all of them."""
