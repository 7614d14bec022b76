"""The errors of the adapter; each becomes one line on the command line."""

from __future__ import annotations

from discopt.errors import DiscoptError


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
