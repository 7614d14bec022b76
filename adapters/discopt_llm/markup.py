"""HTML and SVG that cannot go unescaped: plain text is escaped where it is put into a tag, markup is not."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["Markup", "join", "tag"]

_VOID = ("br", "hr", "meta")  # the tags of HTML that have no end
Attribute = str | float | bool | None


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str | Iterable[Markup], **attributes: Attribute) -> Markup:
    """`tag("a", "A & B", href="x", class_="y")` -> `<a href="x" class="y">A &amp; B</a>`.

    Children that are not `Markup` are escaped, as are all attributes. `stroke_width` and `class_` are written as
    `stroke-width` and `class`; None and False leave an attribute out, and numbers are rounded to hundredths.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str | Iterable[Markup]) -> Markup:
    """One after the other, escaped where they are plain text."""
    return Markup("".join(_child(child) for child in children))


def _child(child: str | Iterable[Markup]) -> str:
    if isinstance(child, Markup):
        return child
    return escape(child, quote=False) if isinstance(child, str) else join(*child)


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{round(value, 2):g}" if isinstance(value, float) else str(value)
