"""A folder that appears whole or not at all, also when the process that writes it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from discopt.errors import RunFolderError
from discopt.sealed import sealed_text, unsealed
from discopt_llm.export.folder import check_target, new_file, new_folder, set_aside

NOTE = "note.json"
NEEDS_SIGNALS = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and locks on folders")

KILLED = """
import os, signal, sys
from pathlib import Path
from discopt_llm.export import folder

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

target, moment = Path(sys.argv[1]), sys.argv[2]
replace, left = os.replace, {"writing": 0, "moved": 1, "renamed": 2}[moment]
def replace_then_die(source, to):
    global left
    replace(source, to)
    if not str(to).endswith(".owner"):
        left -= 1
        left or die()

folder.os.replace = replace_then_die
with folder.new_folder(target) as new:
    (new / "note.json").write_text(sys.argv[3])
    left or die()
"""


def write(target: Path, text: str) -> None:
    with new_folder(target) as folder:
        (folder / NOTE).write_text(note(text))


def note(text: str) -> str:
    return sealed_text({"text": text})


def text_in(folder: Path) -> str:
    return str(unsealed((folder / NOTE).read_bytes())["text"])


def kill_at(moment: str, target: Path) -> None:
    """Let a process die while it replaces the target: `writing`, when the old one is `moved`, the new one `renamed`."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED, target, moment, note("new")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == -signal.SIGKILL


def test_nothing_else_is_left(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "out", text)
        assert text_in(tmp_path / "out") == text
        assert os.listdir(tmp_path) == ["out"]


@NEEDS_SIGNALS
@pytest.mark.parametrize(
    ("moment", "hidden", "text"), [("writing", 1, "old"), ("moved", 2, "old"), ("renamed", 1, "new")]
)
def test_the_next_one_clears_up_after_a_killed_one(tmp_path: Path, moment: str, hidden: int, text: str) -> None:
    out = tmp_path / "out"
    write(out, "old")
    kill_at(moment, out)
    assert len([name for name in os.listdir(tmp_path) if name.endswith((".tmp", ".old"))]) == hidden
    with pytest.raises(RunFolderError, match="out exists already"):
        check_target(out, NOTE, force=False)
    assert text_in(out) == text
    check_target(out, NOTE, force=True)
    write(out, "newest")
    assert text_in(out) == "newest"
    assert os.listdir(tmp_path) == ["out"]


@NEEDS_SIGNALS
def test_an_old_folder_is_never_removed_before_there_is_a_new_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    kill_at("moved", out)
    with pytest.raises(RunFolderError, match="cannot write"), new_folder(out):
        raise OSError(28, "No space left on device")
    check_target(out, NOTE, force=True)
    assert text_in(out) == "old"


WRITING = """
import sys
from pathlib import Path
from discopt_llm.export.folder import new_folder

with new_folder(Path(sys.argv[1])) as new:
    print("writing", flush=True)
    (new / "note.json").write_text(sys.stdin.read())
"""


def test_a_folder_that_another_process_writes_is_left_to_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITING, str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        with pytest.raises(RunFolderError, match=rf"the place .*out is in use by process {process.pid} on "):
            check_target(out, NOTE, force=True)
        with pytest.raises(RunFolderError, match="is in use by process"):
            write(out, "second")
        process.communicate(note("first"))
    assert text_in(out) == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_what_came_to_the_place_meanwhile_is_seen(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_target(out, NOTE, force=False)
    write(out, "of another process")
    with (
        pytest.raises(RunFolderError, match="out exists already"),
        new_folder(out, lambda: check_target(out, NOTE, force=False)),
    ):
        raise AssertionError
    assert text_in(out) == "of another process"


@pytest.mark.parametrize("damaged", ["", "{", '{"format": "discopt-hf", "version": 1}', '{"mine": 1}'])
def test_a_folder_whose_note_is_not_ours_is_never_replaced(tmp_path: Path, damaged: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / NOTE).write_text(damaged)
    with pytest.raises(RunFolderError, match=r"note\.json is (damaged: .*; remove .*out yourself|not ours)"):
        check_target(out, NOTE, force=True)
    assert (out / NOTE).read_text() == damaged


def _fill_disk(target: Path) -> None:
    with new_file(target) as file:
        file.write_text("half")
        raise OSError(28, "No space left on device")


def test_a_new_file_clears_up_after_a_killed_process_and_nothing_else(tmp_path: Path) -> None:
    kept = [".model.0123456789ab.txt", ".model.mine.gguf", ".other.0123456789ab.gguf", "model.0123456789ab.gguf"]
    for name in (*kept, ".model.0123456789ab.gguf"):
        (tmp_path / name).write_text("half")
    with new_file(tmp_path / "model.gguf") as file:
        file.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "model.gguf"])
    with pytest.raises(RunFolderError, match=r"cannot write .*model\.gguf: No space left"):
        _fill_disk(tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "model.gguf"])


@NEEDS_SIGNALS
def test_only_leftovers_of_the_same_target_are_removed(tmp_path: Path) -> None:
    mark = "0123456789ab"
    others = [f".out.v2.{mark}.tmp", f".outer.{mark}.tmp", ".out.mine.tmp", f".out.{mark}0.tmp", f"out.{mark}.tmp"]
    for name in (*others, f".out.{mark}.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out.{mark[::-1]}.tmp").write_text("a file is not ours")
    (tmp_path / f".out.{'f' * 12}.tmp").symlink_to(others[0])
    write(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, f".out.{mark[::-1]}.tmp", f".out.{'f' * 12}.tmp", "out"])


# what does not verify


def _write_wrongly(target: Path, content: str) -> None:
    with new_folder(target) as folder:
        (folder / NOTE).write_text(note(content))
        assert set_aside(folder, target, NOTE) == target.with_name("out.unverified")
        raise ValueError(content)


def test_a_folder_set_aside_replaces_an_older_one_of_ours_and_nothing_else(tmp_path: Path) -> None:
    target, kept = tmp_path / "out", tmp_path / "out.unverified"
    for content in ("first", "second"):
        with pytest.raises(ValueError, match=content):
            _write_wrongly(target, content)
        assert os.listdir(tmp_path) == ["out.unverified"]
        assert text_in(kept) == content
    (kept / NOTE).rename(kept / "mine")
    with pytest.raises(RunFolderError, match=r"out\.unverified is in the way"):
        _write_wrongly(target, "third")
    assert os.listdir(kept) == ["mine"]
    assert os.listdir(tmp_path) == ["out.unverified"]


def test_a_file_set_aside_replaces_a_file_and_no_folder(tmp_path: Path) -> None:
    target, kept = tmp_path / "model.gguf", tmp_path / "model.gguf.unverified"
    for content in ("first", "second"):
        (tmp_path / "written").write_text(content)
        assert set_aside(tmp_path / "written", target) == kept
        assert kept.read_text() == content
    kept.unlink()
    kept.mkdir()
    (tmp_path / "written").write_text("third")
    with pytest.raises(RunFolderError, match="is in the way"):
        set_aside(tmp_path / "written", target)
    (tmp_path / "written").unlink()
    with pytest.raises(RunFolderError, match=r"cannot keep what did not verify at .*: No such file"):
        set_aside(tmp_path / "written", tmp_path / "other.gguf")
