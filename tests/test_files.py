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
    left = [tmp_path / f".last.t.{host}.{pid}.abc" for pid in (gone.pid, os.getppid())]
    left += [tmp_path / f".last.t_2.{host}.{gone.pid}.abc", tmp_path / f".last.t.elsewhere.{gone.pid}.abc"]
    for file in left:
        file.touch()
    with atomic(tmp_path / "last.t"):
        pass
    assert [file.exists() for file in left] == [False, True, True, True]
