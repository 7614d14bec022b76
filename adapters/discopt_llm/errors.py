"""The errors of the adapter, each of which becomes one line on the command line, and what such lines are made of."""

from __future__ import annotations

import reprlib

from discopt.errors import DiscoptError
from discopt.wording import one_line as one_line

_REPR = reprlib.Repr()
_REPR.maxstring = 100  # characters of a wrong value or a name
_LONGEST = 300  # characters of a line that is not ours


class ModelError(DiscoptError):
    """A model that cannot be loaded, or whose structure cannot be read."""


class DataError(DiscoptError):
    """Calibration or evaluation text that is missing, unreadable or too short."""


class ProfileError(DiscoptError):
    """A profile that is damaged, or belongs to another model."""


class DeviceError(DiscoptError):
    """A device or data type that this machine does not have."""


class BankError(DiscoptError):
    """A bank that is damaged, unfinished, in the way, or belongs to another model."""


class MemoryPlanError(DiscoptError):
    """A bound on memory that is too low for what is to be done."""


def short(value: object) -> str:
    """A value in an error message: its beginning and end, if it is long."""
    return _REPR.repr(value)


def typed_line(error: Exception) -> str:
    """The type of an error, and the first line of what it says."""
    text = (str(error).strip() or "no message").splitlines()[0].rstrip(" :")
    return one_line(f"{type(error).__name__}: {text}")
