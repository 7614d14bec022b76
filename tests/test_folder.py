from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discopt import files as files_module
from discopt.errors import RunFolderError
from discopt.files import write_atomic
from discopt.folder import ARTEFACTS, RunFolder
from discopt.lock import LOCK, OWNER
from discopt.sealed import sealed_text

REQUEST = {"command": "solve", "options": {"generations": 3}, "seed": 7}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", REQUEST)


def strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def read(path: Path) -> Any:
    """A document's content without its checksum."""
    document = strict_json(path)
    assert len(document.pop("checksum")) == 64
    return document


def names(path: Path) -> list[str]:
    """What is in a folder, apart from the lock of its writer."""
    return sorted(entry.name for entry in path.iterdir() if entry.name not in (LOCK, OWNER))


def leftovers(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.name.endswith(".tmp")]


# making and opening


def test_run_json_says_what_was_asked_and_with_which_versions(folder: RunFolder) -> None:
    document = strict_json(folder.path / "run.json")
    assert (document["format"], document["version"]) == ("discopt-run", 1)
    assert {key: document[key] for key in REQUEST} == REQUEST
    assert document["versions"].keys() == {"python", "discopt", "numpy", "scipy", "platform"}
    assert document["versions"]["numpy"] == np.__version__


def test_a_request_may_add_versions(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", {**REQUEST, "versions": {"torch": "2.13"}})
    assert folder.request["versions"]["torch"] == "2.13"
    assert folder.request["versions"]["numpy"] == np.__version__


def test_an_opened_folder_has_the_request_it_was_made_with(folder: RunFolder) -> None:
    assert RunFolder.open(folder.path).request == folder.request


def test_a_changed_request_is_on_the_disk(folder: RunFolder) -> None:
    folder.update_request(options={"generations": 9})
    assert RunFolder.open(folder.path).request == {**folder.request, "options": {"generations": 9}}


def test_a_request_must_name_its_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must name its command, got \['seed'\]"):
        RunFolder.create(tmp_path / "run", {"seed": 1})


def test_an_existing_run_is_refused_without_force(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="run exists already; choose another --out, or pass --force to replace it"):
        RunFolder.create(folder.path, REQUEST)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, REQUEST).path == tmp_path


def test_force_removes_the_old_run_and_nothing_else(folder: RunFolder) -> None:
    for name in (*ARTEFACTS[:-1], "extra.json", ".checkpoint.json.0123.tmp", "notes.txt"):
        (folder.path / name).write_text("old")
    new = RunFolder.create(folder.path, {"command": "llm drop"}, force=True, artefacts=["extra.json"])
    assert names(folder.path) == ["notes.txt", "run.json"]
    assert new.request["command"] == "llm drop"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_run_keeps_its_files(tmp_path: Path, force: bool) -> None:
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds report.md but is not a run folder; choose another --out"):
        RunFolder.create(tmp_path, REQUEST, force=force)
    (tmp_path / "run.json").write_text('{"format": "of another program"}')
    with pytest.raises(RunFolderError, match="is not a run folder"):
        RunFolder.create(tmp_path, REQUEST, force=force)
    assert (tmp_path / "report.md").read_text() == "mine"


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunFolderError, match="run is a file, not a folder"):
        RunFolder.create(tmp_path / "run", REQUEST, force=True)
    with pytest.raises(RunFolderError, match=r"cannot make the run folder .*: Not a directory"):
        RunFolder.create(tmp_path / "run" / "deeper", REQUEST)


def test_a_folder_that_is_missing_or_empty_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nowhere does not exist"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no run.json"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "discopt-run", "versi', "is damaged: it is not whole JSON .*; start the run again"),
        ("[1]", "is damaged: expected a JSON object, got list"),
        ('{"format": "other", "version": 1}', "is not ours: expected the format 'discopt-run', got 'other'"),
        ('{"format": "discopt-run", "version": "new"}', "is damaged: it has no format version"),
        ('{"format": "discopt-run", "version": 2}', r"newer discopt \(format version 2, .* up to 1\); update discopt"),
        ('{"format": "discopt-run", "version": 1, "command": "solve"}', "is damaged: it has no checksum"),
        ('{"format": "discopt-run", "version": 1, "checksum": "0"}', "is damaged: its content does not match"),
        ('{"format": "discopt-run", "version": 1, "checksum": "0", "x": NaN}', "is damaged: its content does not"),
        (sealed_text({"format": "discopt-run", "version": 1}), "is damaged: it does not say which command"),
        ("[" * 100_000, "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
    ],
)
def test_a_run_json_that_is_not_ours_is_refused(folder: RunFolder, content: str | bytes, message: str) -> None:
    (folder.path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunFolderError, match=f"run.json .*{message}"):
        RunFolder.open(folder.path)


# artefacts


def test_artefacts_are_strict_json_with_null_for_what_is_not_finite(folder: RunFolder) -> None:
    value = {
        "loss": math.nan,
        "all": np.array([1.0, np.inf]),
        "n": np.int64(3),
        "x": (np.float32(0.5), True),
        "p": folder.path,
    }
    folder.write_json("results.json", value)
    written = read(folder.path / "results.json")
    assert (written.pop("format"), written.pop("version")) == ("discopt-document", 1)
    assert written == {"loss": None, "all": [1.0, None], "n": 3, "x": [0.5, True], "p": str(folder.path)}
    assert folder.read_json("results.json") == written


def test_what_json_does_not_have_is_refused(folder: RunFolder) -> None:
    with pytest.raises(TypeError, match="written as JSON, got set"):
        folder.write_json("results.json", {"levels": {1, 2}})
    with pytest.raises(TypeError, match="names as keys, got 1"):
        folder.write_json("results.json", {1: 2})
    assert not folder.has("results.json")


def test_a_missing_artefact_is_named(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"profile.json does not exist"):
        folder.read_json("profile.json")


@pytest.mark.parametrize("name", ["../up.json", "/etc/passwd", "a\\b", "", ".."])
def test_names_cannot_leave_the_folder(folder: RunFolder, name: str) -> None:
    with pytest.raises(ValueError, match="plain name of a file in the run folder, got"):
        folder.write_text(name, "")


# trace


def test_the_trace_is_appended_line_by_line(folder: RunFolder) -> None:
    assert folder.trace() == []
    lines = [{"generation": i, "loss": math.inf if i == 1 else i / 3} for i in range(3)]
    for line in lines:
        folder.append_trace(line)
    assert folder.trace() == [lines[0], {"generation": 1, "loss": None}, lines[2]]


@pytest.mark.parametrize("torn", [b'{"generation": 2, "lo', b'{"generation": 2}', b"x" * 10_000])
def test_a_torn_last_line_is_ignored_and_written_over(folder: RunFolder, torn: bytes) -> None:
    folder.append_trace({"generation": 1})
    with open(folder.path / "trace.jsonl", "ab") as file:
        file.write(torn)
    assert folder.trace() == [{"generation": 1}]
    folder.append_trace({"generation": 3})
    assert folder.trace() == [{"generation": 1}, {"generation": 3}]


@pytest.mark.parametrize("line", [b"{oops\n", b"[1]\n", b"\n", b'{"generation": 2}\n', b'{"checksum": ""}\n'])
def test_a_damaged_line_in_the_middle_is_named(folder: RunFolder, line: bytes) -> None:
    folder.append_trace({"generation": 1})
    with open(folder.path / "trace.jsonl", "ab") as file:
        file.write(line)
    folder.append_trace({"generation": 3})
    with pytest.raises(RunFolderError, match=r"trace.jsonl is damaged: line 2: .*; start the run again"):
        folder.trace()


def test_the_trace_can_be_cut_back(folder: RunFolder) -> None:
    folder.truncate_trace(0)
    for i in range(5):
        folder.append_trace({"generation": i})
    folder.truncate_trace(3)
    assert [line["generation"] for line in folder.trace()] == [0, 1, 2]
    with pytest.raises(RunFolderError, match="has 3 whole lines, the checkpoint was made after 4"):
        folder.truncate_trace(4)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        folder.truncate_trace(-1)


# checkpoint


def test_a_checkpoint_comes_back_exactly(folder: RunFolder) -> None:
    assert folder.load_checkpoint() is None
    rng = np.random.default_rng(3)
    state = {
        "rng": rng.bit_generator.state,
        "losses": [0.1, 1e-300, -0.0, math.inf, -math.inf, *rng.random(5).tolist()],
        "population": [[2**62, -1], []],
        "name": "Größe",
        "none": None,
        "text": "NaN",
    }
    folder.save_checkpoint(state)
    strict_json(folder.path / "checkpoint.json")
    loaded = folder.load_checkpoint()
    assert loaded == state
    assert math.copysign(1, loaded["losses"][2]) == -1
    folder.save_checkpoint({"loss": math.nan})
    assert math.isnan(folder.load_checkpoint()["loss"])  # type: ignore[index]


def test_every_flipped_bit_and_every_cut_of_a_checkpoint_is_noticed(folder: RunFolder) -> None:
    folder.save_checkpoint({"losses": [0.25, math.inf], "generation": 12})
    path = folder.path / "checkpoint.json"
    whole = path.read_bytes()
    expected = folder.load_checkpoint()
    refused = 0
    for position in range(len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        for content in (bytes(damaged), whole[:position]):
            path.write_bytes(content)
            try:
                loaded = folder.load_checkpoint()
            except RunFolderError:
                refused += 1
            else:
                assert loaded == expected  # a flip that means the same, such as another kind of white space
    assert refused > 1.9 * (len(whole) - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": {"generation": 13}}, "is damaged: its content does not match its checksum; start the run again"),
        ({"state": [1]}, "is damaged"),
        ({"checksum": None}, "is damaged"),
        ({"more": 1}, "is damaged: its content does not match its checksum"),
        ({"format": "safetensors"}, "is not ours: expected the format 'discopt-checkpoint', got 'safetensors'"),
        ({"version": 5}, "newer discopt .*; update discopt"),
        ({"version": True}, "has no format version"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_saved_is_refused(
    folder: RunFolder, changes: dict[str, Any], message: str
) -> None:
    folder.save_checkpoint({"generation": 12})
    path = folder.path / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RunFolderError, match=f"checkpoint.json .*{message}"):
        folder.load_checkpoint()


# failures while writing


def test_write_atomic_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", b"n\xc3\xa9w")
    assert (tmp_path / "a").read_text() == "néw"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_written_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_file_survives_a_failure_at_any_step(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder.save_checkpoint({"generation": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files_module.os, step, full)
    with pytest.raises(RunFolderError, match=r"cannot write .*run/checkpoint.json: No space left on device$"):
        folder.save_checkpoint({"generation": 2})
    monkeypatch.undo()
    assert folder.load_checkpoint() == {"generation": 1}
    assert leftovers(folder.path) == []


def test_ctrl_c_while_writing_leaves_the_old_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("report.md", "old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files_module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folder.write_text("report.md", "new")
    assert (folder.path / "report.md").read_text() == "old"
    assert leftovers(folder.path) == []


def test_a_folder_that_went_away_is_one_line(folder: RunFolder) -> None:
    shutil.rmtree(folder.path)
    with pytest.raises(RunFolderError, match=r"cannot write .*profile.json: No such file or directory$"):
        folder.write_json("profile.json", {})
    with pytest.raises(RunFolderError, match=r"cannot write .*trace.jsonl: No such file or directory$"):
        folder.append_trace({})


def test_leftovers_of_a_killed_process_can_be_removed(folder: RunFolder) -> None:
    (folder.path / ".checkpoint.json.0a1b.tmp").write_text("half")
    (folder.path / ".mine.tmp").write_text("mine")
    folder.remove_leftovers()
    assert leftovers(folder.path) == [".mine.tmp"]


FULL_DISK = """
import resource, signal, sys
from discopt.errors import RunFolderError
from discopt.folder import RunFolder

folder = RunFolder.open(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # from here on no file of this process passes 4000 bytes
for attempt in (
    lambda: folder.save_checkpoint({"population": list(range(5000))}),
    lambda: folder.append_trace({"padding": "x" * 5000}),
    lambda: folder.write_text("report.md", "x" * 5000),
):
    try:
        attempt()
    except RunFolderError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_keeps_the_old_files(folder: RunFolder) -> None:
    folder.save_checkpoint({"generation": 1})
    folder.append_trace({"generation": 1})
    folder.write_text("report.md", "old")
    folder.release()
    before = {entry.name: entry.read_bytes() for entry in folder.path.iterdir()}
    run = subprocess.run([sys.executable, "-c", FULL_DISK, folder.path], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        f"cannot write {folder.path / name}: File too large" for name in ("checkpoint.json", "trace.jsonl", "report.md")
    ]
    assert {entry.name: entry.read_bytes() for entry in folder.path.iterdir()} == before
