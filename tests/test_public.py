from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import discopt


def test_the_public_names_are_sorted_and_there() -> None:
    assert discopt.__all__ == sorted(discopt.__all__)
    assert {name: getattr(discopt, name).__name__ for name in discopt.__all__}.keys() == set(discopt.__all__)
    assert set(discopt.__all__) <= set(dir(discopt))


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'minimise'"):
        discopt.minimise  # noqa: B018


@pytest.mark.parametrize("imported", ["import discopt", "from discopt import *", "import discopt.cli"])
def test_importing_the_engine_loads_no_torch(imported: str) -> None:
    script = f"{imported}\nimport sys\nprint(sorted({{'torch', 'transformers', 'scipy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engine_knows_nothing_of_the_adapter() -> None:
    script = "\n".join(f"import {name}" for name in _modules())
    script += "\nimport sys\nprint([name for name in sys.modules if name.split('.')[0] in ('torch', 'discopt_llm')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["discopt.optimizers", "discopt.problems"])
def test_packages_export_sorted_names(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def _modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(discopt.__path__, "discopt.")]
