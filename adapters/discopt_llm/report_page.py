"""The page that holds a report: one HTML file without scripts, in light, in dark, on a phone and on paper."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from discopt.errors import RunFolderError
from discopt.files import write_atomic
from discopt.folder import DISTRIBUTION, distribution_version
from discopt_llm.markup import Markup, join, tag

__all__ = ["check_page", "code", "details", "facts", "figure", "page", "section", "table", "write_page"]

GENERATOR = "discopt llm report"  # by which a file is known to be ours
HEAD_BYTES = 2048  # of a file, in which that has to be

Cell = str | Markup


def page(title: str, *parts: Markup) -> Markup:
    """The whole file."""
    style = resources.files("discopt_llm").joinpath("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    version = f"Made by discopt {distribution_version(DISTRIBUTION)}; this file needs no other, nor a network."
    body = tag("body", tag("main", tag("h1", title), *parts), tag("footer", tag("p", version)))
    return join(Markup("<!DOCTYPE html>\n"), tag("html", head, "\n", body, lang="en"), "\n")


def section(title: str, *parts: Markup) -> Markup:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), *parts)


def figure(picture: Markup, caption: str) -> Markup:
    """A picture and what it shows."""
    return tag("figure", picture, tag("figcaption", caption))


def details(summary: str, *parts: Markup) -> Markup:
    """What is there when one asks for it, and on paper where the browser can."""
    return tag("details", tag("summary", summary), *parts)


def facts(entries: Iterable[tuple[str, Cell]]) -> Markup:
    """Names and what they are."""
    return tag("dl", (tag("div", tag("dt", name), tag("dd", value)) for name, value in entries))


def code(text: str) -> Markup:
    """A command to copy."""
    return tag("pre", tag("code", text), tabindex="0")


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], *, words: int = 1, marked: int | None = None
) -> Markup:
    """A table that scrolls by itself: the first cell of a row names it, and the first `words` columns are text.

    `marked` is the row to stand out.
    """
    columns = tag("tr", (tag("th", name, scope="col", class_=_side(i, words)) for i, name in enumerate(head)))
    body = []
    for number, row in enumerate(rows):
        first = tag("th", row[0], scope="row", class_=_side(0, words))
        rest = (tag("td", cell, class_=_side(i, words)) for i, cell in enumerate(row[1:], start=1))
        body.append(tag("tr", first, rest, class_="found" if number == marked else None))
    inside = tag("table", tag("caption", tag("span", caption)), tag("thead", columns), tag("tbody", body))
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _side(column: int, words: int) -> str | None:
    return None if column < words else "number"


def check_page(path: Path, *, force: bool) -> None:
    """Raise RunFolderError if there is something at `path` that is not a page of ours, unless `force` is on."""
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder; give --out the name of a file")
    if force or not path.exists():
        return
    try:
        with open(path, "rb") as file:
            ours = f'content="{GENERATOR}"'.encode() in file.read(HEAD_BYTES)
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
    if not ours:
        raise RunFolderError(f"{path} is not a report of ours; choose another --out, or pass --force to replace it")


def write_page(path: Path, content: Markup) -> None:
    """Write the page, whole or not at all; bytes of a name that are not text are replaced."""
    try:
        os.makedirs(path.parent, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
    write_atomic(path, content.encode("utf-8", "replace"))
