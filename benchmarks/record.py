"""What every benchmark's JSON says about where its figures come from, and the memory of this process."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "scipy", "torch", "transformers")
HERE = Path(__file__).resolve().parent


def provenance(seed: int, device: str | None = None) -> dict[str, Any]:
    """Device, versions, commit and seed; `device` is the accelerator's name, None for the CPU."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=HERE, capture_output=True, text=True, check=False)
    return {
        "device": device or f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() + ("+" if dirty.stdout.strip() else ""),
        "seed": seed,
    }


def write(path: Path, figures: dict[str, Any], *, seed: int, device: str | None = None) -> None:
    """Write the figures with their provenance as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(seed, device), **figures}, indent=2) + "\n")


def peak_memory() -> int:
    """Most memory this process held, bytes."""
    try:  # on Linux getrusage knows the peak of the process that started this one, too
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> int:
    """Give back what loading the model left free, and forget its peak, where the system can (Linux); the peak now."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
