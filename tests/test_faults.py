"""What `benchmarks/faults.py` does, in small: faults leave the undisturbed answer, or one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import fault_jobs  # noqa: E402
import faults  # noqa: E402
from fault_damage import DAMAGED, Damaged, damage_trials  # noqa: E402
from fault_jobs import Ended, Yard  # noqa: E402

QUICK = [damaged for damaged in DAMAGED if damaged.share >= 0.5 and not damaged.what.startswith("report")]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fault_jobs, "LIMIT", 60.0)
        patch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
        yield Yard(tmp_path_factory.mktemp("yard"))


def recovered(row: faults.Row, least: int = 1) -> None:
    assert row.tried >= least
    assert row.failures == []
    assert row.recovered == row.tried


@pytest.mark.parametrize("damaged", QUICK, ids=lambda damaged: damaged.what)
def test_a_damaged_file_is_refused_in_one_line_or_changes_nothing(yard: Yard, damaged: Damaged) -> None:
    row = faults.Row("damage", damaged.what)
    damage_trials(yard, damaged, 10, np.random.default_rng(0), row)
    recovered(row, 5)
    assert row.refused > 0


@pytest.mark.parametrize("job", [fault_jobs.BANK, fault_jobs.SOLVE], ids=lambda job: job.name)
def test_a_command_that_is_killed_again_and_again_ends_in_the_undisturbed_answer(
    yard: Yard, job: fault_jobs.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "KILLS", 4)
    answer, seconds = faults.undisturbed(yard, job)
    row = faults.Row("kill", job.name)
    faults.kill_trials(yard, job, answer, seconds, 1, np.random.default_rng(1), row)
    recovered(row)


def test_two_processes_on_one_folder_leave_the_answer_of_one(yard: Yard) -> None:
    job = fault_jobs.SOLVE
    row = faults.Row("two", job.name)
    faults.two_trials(yard, job, *faults.undisturbed(yard, job), 1, np.random.default_rng(1), row)
    recovered(row)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_mount", lambda *_: False)  # which not everybody may
    job = fault_jobs.SOLVE
    row = faults.Row("disk", job.name)
    faults.disk_trials(yard, job, *faults.undisturbed(yard, job), 1, np.random.default_rng(1), row)
    recovered(row, 0)


def test_only_one_line_that_says_error_is_a_refusal() -> None:
    assert Ended(1, "bank: x\nerror: it is damaged\n", 0).refusal == "error: it is damaged"
    assert Ended(0, "error: it is damaged\n", 0).refusal is None
    assert Ended(1, "Traceback (most recent call last):\nerror: it is damaged\n", 0).refusal is None
    assert Ended(None, "error: it is damaged\n", 0).refusal is None


@pytest.mark.slow
def test_all_kinds_of_faults_are_recovered_from(tmp_path: Path) -> None:
    kinds = ["kill", "disk", "two", "damage", "worker"]
    for row in faults.trials(Yard(tmp_path), kinds, 1, np.random.default_rng(0)):
        recovered(row, 0)
