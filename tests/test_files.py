"""Files that are whole or not there."""

import os
import socket
import subprocess
import sys

import pytest

from core.checkpoint import load_checkpoint
from core.files import atomic, is_regular, locate
from core.formats import read_json
from core.images import read_image
from data_manager import read_list
from tools.embedder import Embedder
from tools.search.file_index import FileIndex
from tools.search.labels import read_labels
from training.log import read_json_lines
from utils import InputError


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


READERS = {
    "image": (lambda file: read_image(file, (8, 4)), "is no regular file"),
    "table": (lambda file: read_labels(None, file), "is no regular file"),
    "JSON": (lambda file: read_json(file, dict, "r"), "cannot be read as JSON"),
    "list": (lambda file: read_list(file.parents[1], "a"), "cannot be read"),
    "checkpoint": (load_checkpoint, "no such file"),
    "network": (Embedder, "no such file"),
    "index": (FileIndex, "no such index"),
}


@pytest.mark.parametrize("name", READERS)
def test_files_of_the_kernel_are_not_read(name, tmp_path):
    """Some, which root may read, are waited for: /proc/kmsg."""
    read, words = READERS[name]
    (tmp_path / "idx").mkdir()
    file = tmp_path / "idx" / "a.txt"
    file.symlink_to("/proc/self/status")
    with pytest.raises(InputError, match=f"a.txt: .*{words}"):
        read(file)


def test_a_log_or_a_name_is_no_file_of_the_kernel(tmp_path):
    file = tmp_path / "a.t"
    file.symlink_to("/proc/self/limits")
    assert (read_json_lines(file), locate(file), locate("a.t", tmp_path), locate("a*", tmp_path)) == ([], *3 * [None])
    (tmp_path / "b.t").touch()
    (tmp_path / "c.t").symlink_to("b.t")
    with (tmp_path / "b.t").open() as open_file:
        assert is_regular(f"/proc/self/fd/{open_file.fileno()}")  # as `< b.t` gives it, by the name of /dev/stdin
    assert is_regular(tmp_path / "c.t")
