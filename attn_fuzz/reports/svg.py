"""Pictures as inline SVG: colours are classes, which the page's style sheet has for light and dark."""

from __future__ import annotations

import html


def _number(x: float) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")


class Figure:
    """One picture, drawn piece by piece; lengths are in pixels, from the upper left corner.

    Args:
        width: of it.
        height: of it.
        label: what it shows, for who does not see it.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._parts: list[str] = []

    def rectangle(self, place: tuple[float, float], size: tuple[float, float], kind: str, title: str = "") -> None:
        """A rectangle of a class, with what shows when it is pointed at."""
        (x, y), (width, height) = place, size
        told = f"<title>{html.escape(title)}</title>" if title else ""
        body = f'<rect class="{kind}" x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" '
        self._parts.append(f'{body}height="{_number(height)}"' + (f">{told}</rect>" if told else "/>"))

    def shaded(
        self, place: tuple[float, float], size: tuple[float, float], kind: str, share: float, title: str
    ) -> None:
        """A rectangle whose class shows by a share of its opacity."""
        (x, y), (width, height) = place, size
        self._parts.append(
            f'<rect class="{kind}" x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" '
            f'height="{_number(height)}" fill-opacity="{share:.2f}"><title>{html.escape(title)}</title></rect>'
        )

    def text(self, place: tuple[float, float], words: str, anchor: str = "start") -> None:
        """Words, their baseline's beginning, middle or end at a place."""
        x, y = place
        self._parts.append(
            f'<text x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}">{html.escape(words)}</text>'
        )

    def line(self, begin: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        """A straight line of a class."""
        self._parts.append(
            f'<line class="{kind}" x1="{_number(begin[0])}" y1="{_number(begin[1])}" x2="{_number(end[0])}" '
            f'y2="{_number(end[1])}"/>'
        )

    def path(self, points: list[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        told = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._parts.append(f'<polyline class="{kind}" points="{told}"/>')

    def __str__(self) -> str:
        size = f'viewBox="0 0 {_number(self.width)} {_number(self.height)}" style="width:{_number(self.width)}px"'
        return f'<svg {size} role="img" aria-label="{html.escape(self.label)}">{"".join(self._parts)}</svg>'
