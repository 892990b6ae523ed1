"""Files that are whole or not there."""

import os
import socket
import subprocess
import sys

from core.files import atomic


def test_temporaries_of_killed_processes_are_removed_by_the_next_write(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    left = [tmp_path / f".last.t.{host}.{pid}.0123abcd" for pid in (gone.pid, os.getppid())]
    left += [tmp_path / f".last.t_2.{host}.{gone.pid}.0123abcd", tmp_path / f".last.t.elsewhere.{gone.pid}.0123abcd"]
    left += [tmp_path / f".last.t.{host}.eu.{gone.pid}.0123abcd", tmp_path / f".last.t.{host}.backup"]
    for file in left:
        file.touch()
    folder = tmp_path / f".last.t.{host}.{gone.pid}.4567abcd"
    (folder / "demo" / "cam1").mkdir(parents=True)
    with atomic(tmp_path / "last.t"):
        pass
    assert [file.exists() for file in [*left, folder]] == [False, *5 * [True], False]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Or a power failure could leave the new name with nothing in it."""
    events, fsync, replace = [], os.fsync, os.replace

    def record_fsync(file):
        events.append(("fsync", file.name))
        fsync(file)

    def record_replace(source, target):
        events.append(("replace", source))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic(tmp_path / "last.t") as temporary:
        temporary.write_bytes(b"new")
    assert events == [("fsync", str(temporary)), ("replace", temporary)]
    assert (tmp_path / "last.t").read_bytes() == b"new"
