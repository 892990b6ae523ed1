"""Memory, shared memory, open files and processes that run out: one line with a remedy, never a wait for ever."""

import errno
import multiprocessing.synchronize
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data_loader
import testa
import train_ext_test0
import utils
from conftest import exit_status, search_flags, tiny_flags
from core.files import atomic, check_output, writing
from core.images import read_image
from tools import demo_data
from utils import InputError

needs_fork = pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="needs fork")
SHARED = "unable to allocate shared memory(shm) for file </torch_1>: Success (0)"


def script(act, *flags):
    """A program with some flags that does `act`."""

    def main():
        parser = utils.ArgumentParser(prog="script.py")
        for flag in flags:
            parser.add_argument(flag)
        parser.parse_args([])
        act()

    return SimpleNamespace(main=main, __file__="script.py")


def fails(error):
    def act(*_, **__):
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "flags", "words"),
    [
        (
            OSError(errno.EMFILE, "Too many open files"),
            ["--workers"],
            "pass --workers 0, or raise the limit: ulimit -n",
        ),
        (RuntimeError(SHARED), ["--workers"], "pass --workers 0, or enlarge it: docker run --shm-size=8g"),
        (RuntimeError(SHARED), [], "(shm) for file </torch_1>: Success (0)); enlarge it: docker run --shm-size=8g"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), ["--workers"], "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), ["--workers"], "lower --workers, or"),
        (RuntimeError("can't start new thread"), ["--workers"], "pass --workers 0, or raise the limit: ulimit -u"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), [], "no more processes can be started"),
        (MemoryError(), ["--test_batch", "--workers"], "the memory is full (MemoryError); lower --test_batch, --wor"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["--batch_size"], "lower --batch_size, or"),
        (RuntimeError("could not create a primitive"), ["--batch_size"], "lower --batch_size, or"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), ["--batch_size", "--workers"], "lower --batch_size, or"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n"), [], "n: File name too long; choose a shorter name"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), [], "f: Permission denied; correct its permissions"),
    ],
)
def test_one_line_with_what_helps(error, flags, words, capsys):
    assert exit_status(script(fails(error), *flags), []) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert words in line


def test_what_has_caused_an_error_decides_but_a_name_does_not(capsys):
    def act():
        try:
            raise MemoryError
        except MemoryError as error:
            raise InputError("a.t: is damaged; train again") from error

    assert exit_status(script(act), []) == 2
    assert capsys.readouterr().err == "script.py: error: the memory is full (MemoryError); free some\n"
    assert exit_status(script(fails(InputError("shared memory.jpg: remove it"))), []) == 2
    assert capsys.readouterr().err == "script.py: error: shared memory.jpg: remove it\n"


class Batches(torch.utils.data.Dataset):
    """A batch that fails by `act` in the loading process."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return self.act()


class Unsent:
    def __reduce__(self):
        raise OSError(errno.EMFILE, "Too many open files")


@needs_fork
@pytest.mark.parametrize("act", [Unsent, lambda: os.kill(os.getpid(), signal.SIGKILL)], ids=["unsent", "killed"])
def test_a_loading_process_that_cannot_go_on_is_no_wait_for_ever(act, capfd):
    loader = torch.utils.data.DataLoader(Batches(act), batch_size=None, timeout=3, **data_loader.worker_options(1))
    assert exit_status(script(lambda: next(iter(loader)), "--workers"), []) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "a process was killed or could not go on" in line


@needs_fork
def test_training_without_room_in_shared_memory_is_one_line(tiny_tree, tmp_path, monkeypatch, capfd):
    """The main process used to wait for ever. The loading process is forked, with the changed method."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", fails(RuntimeError(SHARED)))
    argv = tiny_flags(tiny_tree, tmp_path, "--workers", "1", "--cache", "disk")
    assert exit_status(train_ext_test0, argv) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "pass --workers 0" in line
    assert "docker run --shm-size" in line


def mapped(*arguments):
    with utils.map_processes(*arguments) as done:
        return list(done)


def process(_):
    time.sleep(0.05)
    return os.getpid()


def test_there_are_no_more_processes_than_cores(monkeypatch):
    monkeypatch.setattr(utils, "cores", lambda: 2)
    assert len(set(mapped(process, range(12), 500))) == 2


POOL = """
import multiprocessing.queues, os, threading
import utils

def fails(*_, **__):
    raise RuntimeError("can't start new thread")

def main():
    {}
    with utils.map_processes(abs, range(3), 1) as done:
        list(done)

utils.cli(main)
"""


@needs_fork
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "multiprocessing.queues.Queue._start_thread = fails",
            "no more processes can be started (RuntimeError: can't start new thread); raise the limit: ulimit -u",
        ),
        (
            "os.register_at_fork(after_in_child=lambda: setattr(threading, 'Thread', fails))",
            "a process was killed or could not go on (BrokenProcessPool: A process in the process pool was terminated "
            "abruptly while the future was running or pending.); free some memory",
        ),
    ],
    ids=["its own", "in a process"],
)
def test_a_pool_that_has_no_room_for_threads_is_one_line(change, line, tmp_path):
    """Python's waits for ever once its own thread has died, and prints tracebacks of it and of its processes."""
    run = run_pool(change, tmp_path)
    assert (run.returncode, run.stderr) == (2, f"pool.py: error: {line}\n")


def run_pool(change, folder):
    (folder / "pool.py").write_text(POOL.format(change))
    environment = os.environ | {"PYTHONPATH": str(Path(utils.__file__).parent)}
    command = [sys.executable, folder / "pool.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_what_else_a_pool_dies_of_keeps_its_traceback(tmp_path):
    assert (
        "ZeroDivisionError" in run_pool("multiprocessing.queues.Queue._start_thread = lambda _: 1 / 0", tmp_path).stderr
    )


WORK = """
import os, time
import utils

def work(_):
    os.write(1, b"%d\\n" % os.getpid())  # at once: print writes the end of a line by itself
    time.sleep(0.2)

if __name__ == "__main__":
    with utils.map_processes(work, range(1000), 2) as done:
        list(done)
"""


@pytest.mark.slow
def test_processes_end_when_the_main_one_is_killed(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    environment = os.environ | {"PYTHONPATH": str(Path(utils.__file__).parent)}
    with subprocess.Popen([sys.executable, tmp_path / "work.py"], stdout=subprocess.PIPE, env=environment) as main:
        pids = {int(main.stdout.readline()) for _ in range(9)}
        main.kill()
    assert len(pids) == min(2, utils.cores())
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_semaphores_are_in_shared_memory(monkeypatch, tmp_path, capsys):
    """So a full disk, which has the same error, is not what is full."""
    full = SimpleNamespace(SemLock=fails(OSError(errno.ENOSPC, "No space left on device")))
    monkeypatch.setattr(multiprocessing.synchronize, "_multiprocessing", full)

    def act():
        with writing("a.npy"):
            mapped(len, ["a"], 1)

    assert exit_status(script(act), []) == 2
    assert "/dev/shm is too small or missing" in capsys.readouterr().err
    flags = ["--out", tmp_path / "demo", "--ids", "5", "--images", "1", "--layout", "regdb", "--workers"]
    assert exit_status(demo_data, [*flags, "2"]) == 2
    assert "pass --workers 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert exit_status(demo_data, [*flags, "0"]) == 0


@needs_fork
def test_a_killed_process_of_a_pool_is_one_line(capsys):
    def act():
        mapped(kill, [0], 1)

    assert exit_status(script(act), []) == 2
    assert "a process was killed or could not go on (BrokenProcessPool" in capsys.readouterr().err
    assert mapped(lambda _: os.getpid(), [0], 0) == [os.getpid()]


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_image_is_not_unreadable_because_something_has_run_out(sysu_tree, monkeypatch):
    """Or it would be left out, or dropped from an index."""
    path = next(sysu_tree.glob("cam1/*/*.jpg"))
    monkeypatch.setattr(Image, "open", fails(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(OSError, match="Too many open files"):
        read_image(path, (8, 4))


def test_long_names_are_written_or_refused_before_the_work(tmp_path):
    files = [tmp_path / f"{'ü' * 120}{end}.json" for end in "ab"]
    with atomic(files[0]) as first, atomic(files[1]) as second:
        first.write_text("0")
        second.write_text("1")
    assert [file.read_text() for file in files] == ["0", "1"]
    assert sorted(tmp_path.iterdir()) == files
    with pytest.raises(OSError, match="File name too long"):
        check_output(tmp_path / ("n" * 300))


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/a/b: cannot write there \(.*/file is a file\); choose a folder"):
        check_output(tmp_path / "file" / "a" / "b")

    def temporary_file(dir):
        raise OSError(errno.EROFS, f"{dir} is read-only")

    monkeypatch.setattr("core.files.tempfile.TemporaryFile", temporary_file)
    with pytest.raises(InputError, match=rf"new/b: cannot write there \({tmp_path}/new is read-only\); choose"):
        check_output(tmp_path / "new" / "b")


def test_a_file_of_another_user_in_a_shared_folder_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").touch()
    (tmp_path / "theirs").chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1, raising=False)
    check_output(tmp_path / "ours" / "a.json")
    check_output(tmp_path / "theirs" / "b.json")
    with pytest.raises(InputError, match="theirs/a.json: is another user's, who alone may replace it there; name ano"):
        check_output(tmp_path / "theirs" / "a.json")
    monkeypatch.undo()
    check_output(tmp_path / "theirs" / "a.json")
    with pytest.raises(SystemExit):
        utils.cli(lambda: os.replace(tmp_path / "ours" / "a.json", tmp_path / "theirs"))
    assert f": error: {tmp_path}/theirs: Is a directory; correct this" in capsys.readouterr().err


def test_the_command_that_prepares_again_can_be_pasted(sysu_tree, tmp_path):
    place = tmp_path / "my data; $x"
    place.symlink_to(sysu_tree)
    with pytest.raises(InputError) as caught:
        data_loader.sysu_train(place, (7, 9))
    words = shlex.split(str(caught.value).partition("; run: ")[2])
    words = words or shlex.split(str(caught.value).rpartition("run: ")[2])
    assert words == ["python", "pre_process_sysu.py", "--data_path", str(place), "--img_h", "7", "--img_w", "9"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize(
    ("limit", "remedy"),
    [
        ("ulimit -n 16", "ulimit -n 4096"),
        ("mount -t tmpfs -o size=64k tmpfs /dev/shm", "docker run --shm-size=8g"),
        ("mount -t tmpfs -o size=4k tmpfs /dev/shm", "docker run --shm-size=8g"),
    ],
)
def test_a_real_limit(limit, remedy, trained, sysu_tree):
    unshare = ["unshare", "-m"] if "mount" in limit else []
    if unshare and subprocess.run([*unshare, "sh", "-c", limit], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    flags = search_flags(sysu_tree, trained[0]["last"], "--test_batch", 4)
    program = shlex.join([sys.executable, str(Path(testa.__file__)), *flags, "--workers", "2"])
    command = [*unshare, "bash", "-c", f"{limit}; exec {program}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert (
        f"pass --workers 0, or {'raise the limit' if 'ulimit' in remedy else 'enlarge it'}: {remedy}" in result.stderr
    )


def test_a_path_of_an_image_is_no_shortage(tmp_path):
    path = tmp_path / "Bus error.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match="Bus error.jpg: cannot be read as an image"):
        read_image(path, (8, 8))


def test_what_the_user_wrote_is_no_shortage():
    """Nor does a long text take long: a search from each of its characters would take minutes."""
    error = InputError("--from: is no time")
    error.__cause__ = ValueError(f"Invalid time: new thread {'a' * 10**6}")
    assert utils.shortage(error) is None
    assert utils.shortage(OSError(errno.ENOENT, "No such file", "Too many open files.jpg")) is None
    assert "the memory is full" in utils.shortage(RuntimeError(f"{'a' * 10**6}\nbad alloc"))
    error.__cause__ = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")  # of a lock
    assert utils.shortage(error) is None
