"""The errors a caller may want to catch by name; everything else is a plain ValueError or TypeError.

The command line turns any `DiscoptError` into one line on standard error and exit code 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from discopt.objective import Query


class DiscoptError(Exception):
    """Base of all errors that the person at the keyboard can mend."""


class BudgetError(DiscoptError):
    """No profile of the space meets the budget."""


class ObjectiveError(DiscoptError):
    """The objective failed, or answered with something that is not one loss per row."""

    def __init__(self, message: str, query: Query) -> None:
        super().__init__(message)
        self.query = query


class RunFolderError(DiscoptError):
    """A run folder exists already, is missing, is damaged, or belongs to something else."""


class WorkersError(DiscoptError):
    """Workers cannot be started or reached, or none is left."""
