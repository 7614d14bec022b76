"""One process at a time writes a folder."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from discopt.errors import RunFolderError
from discopt.folder import RunFolder
from discopt.lock import LOCK, OWNER, FolderLock

REQUEST = {"command": "solve", "seed": 1}
HOLDS = "import sys; from discopt.lock import FolderLock; lock = FolderLock(sys.argv[1], 'the bank').acquire();"
WAITS = HOLDS + "print('held', flush=True); sys.stdin.read()"


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that has the folder until it is killed, or its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_who_comes_second_is_told_who_is_first(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        with pytest.raises(RunFolderError) as refused:
            FolderLock(tmp_path, "the bank").acquire()
        owner = f"process {other.pid} on {socket.gethostname()} since 20"
        assert str(refused.value).startswith(f"the bank {tmp_path} is in use by {owner}")
        assert str(refused.value).endswith(f"(-c {tmp_path})")
        assert "\n" not in str(refused.value)
        with pytest.raises(RunFolderError, match=r"the run folder .* is in use by process"):
            RunFolder.create(tmp_path, REQUEST)
        (tmp_path / OWNER).write_text("{damaged")
        with pytest.raises(RunFolderError, match=r"is in use by another process$"):
            FolderLock(tmp_path, "the bank").acquire()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_the_lock_of_a_killed_process_is_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
    assert sorted(os.listdir(tmp_path)) == [LOCK, OWNER]
    with FolderLock(tmp_path, "the bank"):
        assert f'"pid": {os.getpid()}' in (tmp_path / OWNER).read_text()
    assert os.listdir(tmp_path) == []


def test_a_process_that_ends_leaves_nothing_of_its_lock(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", HOLDS, tmp_path], check=True)
    assert os.listdir(tmp_path) == []


def test_one_process_may_hold_a_folder_twice_and_has_it_until_the_last_is_released(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, "the bank").acquire(), FolderLock(tmp_path / ".", "the bank").acquire()
    first.release()
    first.release()
    assert sorted(os.listdir(tmp_path)) == [LOCK, OWNER]
    second.release()
    assert os.listdir(tmp_path) == []


def test_a_forgotten_lock_is_given_back(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "the bank").acquire()
    assert lock.acquire() is lock
    del lock
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_lock_beside_a_folder_needs_no_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "out", "the export", beside=True):
        assert sorted(os.listdir(tmp_path)) == [".out.lock", ".out.owner"]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"cannot lock .*missing: No such file or directory$"):
        FolderLock(tmp_path / "missing", "the bank").acquire()


def test_readers_of_a_run_need_no_lock(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, REQUEST).release()
    with holder(tmp_path):
        reader = RunFolder.open(tmp_path)
        assert (reader.request["seed"], reader.trace(), reader.load_checkpoint()) == (1, [], None)
        for write in (
            reader.hold,
            reader.remove_leftovers,
            reader.discard,
            lambda: reader.write_text("report.md", ""),
            lambda: reader.append_trace({}),
            lambda: reader.save_checkpoint({}),
            lambda: reader.truncate_trace(0),
            lambda: reader.update_request(seed=2),
            lambda: RunFolder.create(tmp_path, REQUEST, force=True),
            lambda: RunFolder.check_free(tmp_path, force=True),
        ):
            with pytest.raises(RunFolderError, match="is in use by process"):
                write()
    assert RunFolder.open(tmp_path).request["seed"] == 1
