"""Runs that are killed, stopped, started twice, or find the disk full: the next start works, and nothing is lost."""

import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import pre_process_sysu
import train_ext_test0
import utils
from ChannelAug import TrainAugmentation
from conftest import SIZE, log_entries, tiny_flags
from core.checkpoint import load_checkpoint
from data_loader import sysu_train_files

REPO = Path(utils.__file__).parent
PROCESSES = multiprocessing.get_context("forkserver")  # forked from a process that has imported everything
PROCESSES.set_forkserver_preload(["train_ext_test0", "pre_process_sysu", "torch.utils.tensorboard"])


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """A test that fails leaves no training behind."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


def start(script, arguments, errors=os.devnull, file_size=resource.RLIM_INFINITY):
    """A script in a process of its own. errors: file for its stderr; file_size: most bytes of any file it writes."""
    process = PROCESSES.Process(target=_run, args=(script.__name__, [*map(str, arguments)], str(errors), file_size))
    process.start()
    return process


def _run(name, arguments, errors, file_size):
    for stream, file in ((sys.stdout, os.devnull), (sys.stderr, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *arguments]
    utils.cli({"train_ext_test0": train_ext_test0, "pre_process_sysu": pre_process_sysu}[name].main)


def join(process, seconds=300):
    process.join(seconds)
    assert not process.is_alive()


def finish(script, arguments, **options):
    """Run a script to its end -> its exit status."""
    process = start(script, arguments, **options)
    join(process)
    return process.exitcode


def kill_after(seconds, script, arguments):
    process = start(script, arguments)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def wait_until(ready, seconds=120):
    """Ask until it is so, but not for ever."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_same_runs(folders):
    """Two runs ended alike, bit for bit: checkpoints, optimiser, JSON lines but for the times."""
    names, logs = [], []
    for folder in folders:
        files = sorted((folder / "models").glob("*.t"))
        names.append([file.name for file in files])
        (log,) = (folder / "log" / "sysu_log").glob("*.jsonl")
        logs.append(log_entries(log))
        for entry in logs[-1]:
            del entry["seconds"], entry["images_per_second"]
    assert names[0] == names[1]
    assert logs[0] == logs[1]
    for name in names[0]:
        one, other = (torch.load(folder / "models" / name) for folder in folders)
        for state in (one, other):
            for flag in ("model_path", "log_path", "resume", "save_minutes", "workers"):
                del state["args"][flag]
        assert_equal(one, other)


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


MORE = ["--epochs", "3", "--eval_every", "2", "--save_epoch", "1"]


@pytest.fixture(scope="module")
def unbroken(tiny_tree, tmp_path_factory):
    """Folder of a run of three epochs that nothing disturbs."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("unbroken")
    train_ext_test0.main(tiny_flags(tiny_tree, out, *MORE))
    return out


@pytest.mark.slow
def test_killed_trainings_lose_nothing(unbroken, tiny_tree, tmp_path):
    """Killed at random moments, many of them within or around a save, and begun again by the same command."""
    rng = random.Random(0)
    command = tiny_flags(tiny_tree, tmp_path, *MORE, "--resume", "auto", "--save_minutes", "0.001")
    came_to, begun_again = (0, 0), 0

    def saves():
        return [file.stat().st_mtime_ns for file in tmp_path.glob("models/*_last.t")]

    for _ in range(40):
        before, process = saves(), start(train_ext_test0, command)
        wait_until(lambda before=before, process=process: not process.is_alive() or saves() != before)
        process.join(rng.uniform(0, 1))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        for file in (tmp_path / "models").glob("*.t"):
            checkpoint = load_checkpoint(file)  # whole
            if file.name.endswith("_last.t"):
                steps = checkpoint["sums"]["step"] if "within" in checkpoint else 0
                assert (checkpoint["epoch"] + 1, steps) >= came_to
                came_to = (checkpoint["epoch"] + 1, steps)
                begun_again += steps > 0
        if begun_again >= 4:
            break
    assert begun_again
    assert finish(train_ext_test0, command) == 0
    assert_same_runs([unbroken, tmp_path])


@pytest.mark.slow
def test_killed_preparing_leaves_whole_arrays(tiny_tree, tmp_path):
    """Arrays of another size are there; those that a kill leaves are all of one set or of the other."""
    rng = random.Random(0)
    tree = shutil.copytree(tiny_tree, tmp_path / "sysu")
    old = {file.name: file.read_bytes() for file in sysu_train_files(tree)}
    command = ["--data_path", tree, "--img_h", SIZE[0], "--img_w", SIZE[1]]
    begin = time.monotonic()
    assert finish(pre_process_sysu, command) == 0
    whole = time.monotonic() - begin
    new = {file.name: file.read_bytes() for file in sysu_train_files(tree)}
    for _ in range(5):
        for name, content in old.items():
            (tree / name).write_bytes(content)
        kill_after(rng.uniform(whole / 4, whole), pre_process_sysu, command)
        found = {file.name: file.read_bytes() for file in sysu_train_files(tree) if file.exists()}
        assert any(all(array == one[name] for name, array in found.items()) for one in (old, new))
    assert finish(pre_process_sysu, command) == 0
    assert [file.name for file in tree.glob(".*")] == []
    assert {file.name: file.read_bytes() for file in sysu_train_files(tree)} == new


def signal_at(step, number, monkeypatch):
    """Have this process get a signal within its training step of that number, counted from the start of the run."""
    augment, steps = TrainAugmentation.__call__, itertools.count(1)

    def augment_and_signal(self, *batch):
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return augment(self, *batch)

    monkeypatch.setattr(TrainAugmentation, "__call__", augment_and_signal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "where", "more"),
    [
        (3, "epoch 0, after step 3 of 8", ["--optim", "sgd", "--workers", "2"]),
        (16, "epoch 1, after step 8 of 8", ["--optim", "sgd", "--lr", "0.001"]),
    ],
)
def test_stopped_training_goes_on_where_it_was(tiny_tree, tmp_path, monkeypatch, step, where, more):
    torch.set_num_threads(1)
    common = [*MORE, "--epochs", "2", *more]
    train_ext_test0.main(tiny_flags(tiny_tree, tmp_path / "whole", *common))
    command = tiny_flags(tiny_tree, tmp_path / "stopped", *common, "--resume", "auto")
    with monkeypatch.context() as patch:
        signal_at(step, signal.SIGTERM, patch)
        with pytest.raises(utils.Stopped, match=f"in {where}; .*_last.t is saved: continue with --resume auto"):
            train_ext_test0.main(command)
    (last,) = tmp_path.glob("stopped/models/*_last.t")
    assert torch.load(last)["sums"]["step"] == int(where.split()[4])
    train_ext_test0.main(command)
    assert_same_runs([tmp_path / "whole", tmp_path / "stopped"])


@pytest.mark.slow
def test_a_signal_is_one_line_and_its_status(tiny_tree, tmp_path):
    command = tiny_flags(tiny_tree, tmp_path, *MORE, "--epochs", "9999", "--resume", "auto")
    errors = tmp_path / "stderr.txt"
    process = start(train_ext_test0, command, errors)
    wait_until(lambda: any(file.read_text() for file in tmp_path.glob("log/*/*.jsonl")))
    os.kill(process.pid, signal.SIGTERM)
    join(process)
    assert process.exitcode == 143
    assert re.fullmatch(
        r"train_ext_test0.py: stopped by SIGTERM in epoch \d+, after step \d of 8; .*_last.t is saved: "
        "continue with --resume auto",
        errors.read_text().strip(),
    )


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_last_checkpoint(unbroken, tiny_tree, tmp_path, monkeypatch):
    """Also when it is asked to save and stop after the step that is not finite."""
    command = tiny_flags(tiny_tree, tmp_path, *MORE, "--resume", "auto")
    augment, steps = TrainAugmentation.__call__, itertools.count(1)

    def spoil_a_step(self, *batch):
        visible, infrared, labels = augment(self, *batch)
        if next(steps) == 10:
            visible[0] = np.inf
            os.kill(os.getpid(), signal.SIGTERM)
        return visible, infrared, labels

    with monkeypatch.context() as patch:
        patch.setattr(TrainAugmentation, "__call__", spoil_a_step)
        words = r"^epoch 1/2: .* from step 2 on; .*start a new run \(.*_last\.t holds the state before it\)"
        with pytest.raises(utils.InputError, match=words):
            train_ext_test0.main(command)
    (last,) = tmp_path.glob("models/*_last.t")
    assert torch.load(last)["epoch"] == 0
    train_ext_test0.main(command)
    assert_same_runs([unbroken, tmp_path])


@pytest.mark.slow
def test_training_stopped_while_it_tests_repeats_no_step(unbroken, tiny_tree, tmp_path, monkeypatch):
    command = tiny_flags(tiny_tree, tmp_path, *MORE, "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(train_ext_test0.engine, "run_search", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(utils.Stopped, match="in epoch 0, after step (.*) of .*continue with --resume auto"):
            train_ext_test0.main(command)
    augment, steps = TrainAugmentation.__call__, []
    monkeypatch.setattr(TrainAugmentation, "__call__", lambda self, *batch: steps.append(1) or augment(self, *batch))
    train_ext_test0.main(command)
    assert len(steps) == 2 * 8  # those of epochs 1 and 2
    assert [entry["epoch"] for entry in log_entries(next(tmp_path.glob("log/sysu_log/*.jsonl")))] == [0, 1, 2]
    assert_same_runs([unbroken, tmp_path])


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_behind(tiny_tree, tmp_path):
    command = tiny_flags(tiny_tree, tmp_path, "--epochs", "9999", "--eval_every", "9999", "--workers", "2")
    process = subprocess.Popen(
        [sys.executable, REPO / "train_ext_test0.py", *command],
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: process.poll() is not None or list(tmp_path.glob("models/*_last.t")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    assert process.wait(120) == 130
    assert process.stderr.read().decode().strip().count("\n") == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(unbroken, tiny_tree, tmp_path):
    shutil.copytree(unbroken / "models", tmp_path / "models")
    shutil.copytree(unbroken / "log", tmp_path / "log")
    (last,) = tmp_path.glob("models/*_last.t")
    before = last.read_bytes()
    more = [*MORE, "--epochs", "5", "--resume", "auto"]
    errors = tmp_path / "stderr.txt"
    status = finish(train_ext_test0, tiny_flags(tiny_tree, tmp_path, *more), errors=errors, file_size=len(before) // 2)
    assert status == 2
    (line,) = errors.read_text().splitlines()
    assert "_last.t: cannot be written (File too large); free some space and run again" in line
    assert last.read_bytes() == before
    assert not list((tmp_path / "models").glob(".*.t.*"))
    assert finish(train_ext_test0, tiny_flags(tiny_tree, tmp_path, *more)) == 0


@pytest.mark.slow
def test_full_disk_while_preparing(tiny_tree, tmp_path):
    tree = shutil.copytree(tiny_tree, tmp_path / "sysu")
    before = [file.read_bytes() for file in sysu_train_files(tree)]
    errors = tmp_path / "stderr.txt"
    command = ["--data_path", tree, "--img_h", "288", "--img_w", "144"]
    assert finish(pre_process_sysu, command, errors=errors, file_size=2**20) == 2
    (line,) = errors.read_text().splitlines()
    assert "train_rgb_resized_img.npy: cannot be written (File too large); free some space and run again" in line
    assert [file.read_bytes() for file in sysu_train_files(tree)] == before
    assert not list(tree.glob(".*"))


@pytest.mark.slow
def test_two_runs_of_one_name(tiny_tree, tmp_path):
    command = tiny_flags(tiny_tree, tmp_path, "--epochs", "9999", "--resume", "auto")
    first = start(train_ext_test0, command)
    wait_until(lambda: list(tmp_path.glob("models/*_last.t")))
    errors = tmp_path / "stderr.txt"
    assert finish(train_ext_test0, command, errors=errors) == 2
    assert re.search(
        rf"9_adam: another run of this name is writing now \(process {first.pid} on .*\); wait", errors.read_text()
    )
    first.kill()
    first.join()
    (last,) = tmp_path.glob("models/*_last.t")
    before = last.stat().st_mtime_ns
    second = start(train_ext_test0, command)  # the lock of a run that is gone is no lock
    wait_until(lambda: not second.is_alive() or last.stat().st_mtime_ns > before)
    second.terminate()
    join(second)
    assert second.exitcode == 143
    assert not list(tmp_path.glob("models/.*.t.*"))
