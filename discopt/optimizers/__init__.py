"""Search algorithms, one file each, all with the same ask and tell."""

from discopt.optimizers.base import Measurement, Optimizer, StopReason
from discopt.optimizers.evopress import EvoPress, EvoPressSettings, Stage
from discopt.optimizers.random import RandomSearch

__all__ = ["EvoPress", "EvoPressSettings", "Measurement", "Optimizer", "RandomSearch", "Stage", "StopReason"]
