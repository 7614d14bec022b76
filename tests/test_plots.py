from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from discopt.errors import DiscoptError, RunFolderError
from discopt.plots import new_figure, plot_trace

pytest.importorskip("matplotlib")


def make_trace(generations: int = 20, scale: float = 1.0) -> list[dict[str, Any]]:
    lines = [
        {
            "stage": 0,
            "fidelity": 2,
            "loss": scale * 4.0,
            "median": scale * 9.0,
            "best": scale * 4.0,
            "total_fidelity": 32,
        }
    ]
    for generation in range(generations):
        for stage, fidelity in ((1, 2), (2, 10)):
            loss = scale / (1 + generation)
            spent = lines[-1]["total_fidelity"] + 8 * fidelity
            best = loss if stage == 2 else lines[-1]["best"]
            lines.append(
                {
                    "stage": stage,
                    "fidelity": fidelity,
                    "loss": loss,
                    "median": 2 * loss,
                    "best": best,
                    "total_fidelity": spent,
                }
            )
    return lines


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, in pixels."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(("generations", "scale"), [(0, 1.0), (1, 1.0), (20, 1e-9), (20, -1.0), (1000, 1.0)])
def test_a_trace_of_any_length_and_scale_becomes_a_png(tmp_path: Path, generations: int, scale: float) -> None:
    path = plot_trace(make_trace(generations, scale), tmp_path / "trace.png", "tokens", loss="KL, nats", title="drop")
    width, height = size(path)
    assert width > height > 300


def test_lines_without_a_finite_number_are_left_out(tmp_path: Path) -> None:
    trace = make_trace(4)
    trace[3].update(loss=None, median=None, best=None)
    plot_trace([{"generation": 0}, *trace], tmp_path / "trace.png")
    assert (tmp_path / "trace.png").exists()


@pytest.mark.parametrize("trace", [[], [{"total_fidelity": 4, "best": None, "stage": 1}]])
def test_a_trace_without_a_measurement_is_refused(tmp_path: Path, trace: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=f"at least one measured best is needed, got {len(trace)} lines without"):
        plot_trace(trace, tmp_path / "trace.png")
    assert not (tmp_path / "trace.png").exists()


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"cannot write .*nowhere/trace.png: No such file or directory"):
        plot_trace(make_trace(), tmp_path / "nowhere" / "trace.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DiscoptError, match=r"needs the extra plot: pip install 'discopt-search\[plot\]'"):
        new_figure(4, 3)


def test_drawing_leaves_the_global_state_alone(tmp_path: Path) -> None:
    code = (
        "import sys, discopt.plots; assert 'matplotlib' not in sys.modules;"
        "discopt.plots.plot_trace([{'total_fidelity': 1, 'best': 1.0, 'stage': 1}], sys.argv[1]);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=False)
    assert run.returncode == 0
