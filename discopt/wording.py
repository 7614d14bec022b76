"""What comes from elsewhere, in a message of one line: other people's errors, names of files, words of the user."""

from __future__ import annotations

__all__ = ["one_line"]

LONGEST = 300  # characters


def one_line(said: object, most: int = LONGEST) -> str:
    """The first line of what an error or a text says, or its type if that is nothing; so many characters at most.

    What cannot be printed is escaped, as `repr` does it.
    """
    text = (str(said).strip().splitlines() or [type(said).__name__])[0]
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return line if len(line) <= most else line[: most - 3] + "..."
