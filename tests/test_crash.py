"""Runs that are killed, stopped, started twice, or find the disk full: the next start works, and nothing is lost."""

import itertools
import json
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
import testa
import train_ext_test0
import utils
from ChannelAug import TrainAugmentation
from conftest import SIZE, flags
from core import features as feature_store
from core.checkpoint import load_checkpoint
from core.run import Pauses
from data_loader import IdentitySampler, sysu_train, sysu_train_files

REPO = Path(utils.__file__).parent
PROCESSES = multiprocessing.get_context("forkserver")  # forked from a process that has imported everything
PROCESSES.set_forkserver_preload(["train_ext_test0", "pre_process_sysu", "testa", "torch.utils.tensorboard"])


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
    utils.cli({"train_ext_test0": train_ext_test0, "pre_process_sysu": pre_process_sysu, "testa": testa}[name].main)


def finish(script, arguments, **options):
    """Run a script to its end -> its exit status."""
    process = start(script, arguments, **options)
    process.join()
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


def logged_epochs(folder):
    return sum(len(file.read_text().splitlines()) for file in folder.glob("log/*/*.jsonl"))


def assert_same_runs(folders):
    """Two runs ended alike, bit for bit: checkpoints, optimiser, JSON lines but for the times."""
    names, logs = [], []
    for folder in folders:
        files = sorted((folder / "models").glob("*.t"))
        names.append([file.name for file in files])
        (log,) = (folder / "log" / "sysu_log").glob("*.jsonl")
        logs.append([json.loads(line) for line in log.read_text().splitlines()])
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
def unbroken(sysu_tree, tmp_path_factory):
    """Folder of a run of three epochs that nothing disturbs."""
    out = tmp_path_factory.mktemp("unbroken")
    assert finish(train_ext_test0, flags(sysu_tree, out, *MORE)) == 0
    return out


@pytest.mark.slow
def test_killed_trainings_lose_nothing(unbroken, sysu_tree, tmp_path):
    """Killed at random moments, many of them within or around a save, and begun again by the same command."""
    rng = random.Random(0)
    command = flags(sysu_tree, tmp_path, *MORE, "--resume", "auto", "--save_minutes", "0.005")
    came_to, begun_again = (0, 0), 0
    for kills in range(60):
        if kills >= 14 and begun_again >= 5:
            break
        if kill_after(rng.uniform(0.3, 3 + kills / 5), train_ext_test0, command) == 0:  # longer on a slow machine
            shutil.rmtree(tmp_path / "models")  # it had come to its end: from the start once more
            shutil.rmtree(tmp_path / "log")
            came_to = (0, 0)
            continue
        for file in (tmp_path / "models").glob("*.t"):
            checkpoint = load_checkpoint(file)  # whole
            if file.name.endswith("_last.t"):
                steps = checkpoint["sums"]["step"] if "within" in checkpoint else 0
                assert (checkpoint["epoch"] + 1, steps) >= came_to
                came_to = (checkpoint["epoch"] + 1, steps)
                begun_again += steps > 0
    assert begun_again >= 5
    assert finish(train_ext_test0, command) == 0
    assert_same_runs([unbroken, tmp_path])


@pytest.mark.slow
def test_killed_preparing_leaves_whole_arrays(sysu_tree, tmp_path):
    """Arrays of another size are there; those that a kill leaves are all of one set or of the other."""
    rng = random.Random(0)
    tree = tmp_path / "sysu"
    shutil.copytree(sysu_tree, tree)
    new = {file.name: np.load(file) for file in sysu_train_files(tree)}
    other = ["--data_path", tree, "--img_h", "72", "--img_w", "40"]
    assert finish(pre_process_sysu, other) == 0
    shutil.copytree(tree, tmp_path / "old")
    old = {file.name: np.load(file) for file in sysu_train_files(tree)}
    command = ["--data_path", tree, "--img_h", SIZE[0], "--img_w", SIZE[1]]
    begin = time.monotonic()
    assert finish(pre_process_sysu, command) == 0
    whole = time.monotonic() - begin
    for _ in range(10):
        for file in sysu_train_files(tmp_path / "old"):
            shutil.copy(file, tree)
        kill_after(rng.uniform(0, whole), pre_process_sysu, command)
        there = {file.name: np.load(file) for file in sysu_train_files(tree) if file.exists()}
        assert any(all(np.array_equal(array, one[name]) for name, array in there.items()) for one in (old, new))
    assert finish(pre_process_sysu, command) == 0
    assert [file.name for file in tree.glob(".*")] == []
    for file in sysu_train_files(tree):
        assert np.array_equal(np.load(file), new[file.name])


@pytest.mark.slow
def test_killed_tests_leave_whole_files(unbroken, sysu_tree, tmp_path):
    rng = random.Random(0)
    (best,) = (unbroken / "models").glob("*_best.t")
    table, features = tmp_path / "table.json", tmp_path / "features.npz"
    command = ["--data_path", sysu_tree, "--resume", best, "--gpu", "cpu", "--workers", "0", "--json", table]
    command += ["--features", features]
    begin = time.monotonic()
    assert finish(testa, command) == 0
    whole = time.monotonic() - begin
    expected = json.loads(table.read_text())
    for _ in range(8):
        kill_after(rng.uniform(0, whole), testa, command)
        assert json.loads(table.read_text()) == expected
        feature_store.load_features(features)
    assert finish(testa, command) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features.npz", "table.json"]


def signal_at(step, number, monkeypatch):
    """Have this process get a signal within its training step of that number, counted from the start of the run."""
    augment, steps = TrainAugmentation.__call__, itertools.count(1)

    def augment_and_signal(self, *batch):
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return augment(self, *batch)

    monkeypatch.setattr(TrainAugmentation, "__call__", augment_and_signal)


@pytest.mark.parametrize(
    ("step", "where", "more"),
    [
        (1, "epoch 0, after step 1 of 8", []),
        (11, "epoch 1, after step 3 of 8", ["--optim", "sgd", "--workers", "2"]),
        (16, "epoch 1, after step 8 of 8", ["--optim", "sgd", "--lr", "0.001"]),
    ],
)
def test_stopped_training_goes_on_where_it_was(sysu_tree, tmp_path, monkeypatch, step, where, more):
    torch.set_num_threads(1)
    common = [*MORE, "--epochs", "2", *more]
    train_ext_test0.main(flags(sysu_tree, tmp_path / "whole", *common))
    command = flags(sysu_tree, tmp_path / "stopped", *common, "--resume", "auto")
    with monkeypatch.context() as patch:
        signal_at(step, signal.SIGTERM, patch)
        with pytest.raises(utils.Stopped, match=f"in {where}; .*_last.t is saved: go on with --resume auto"):
            train_ext_test0.main(command)
    (last,) = tmp_path.glob("stopped/models/*_last.t")
    assert torch.load(last)["sums"]["step"] == int(where.split()[4])
    train_ext_test0.main(command)
    assert_same_runs([tmp_path / "whole", tmp_path / "stopped"])


@pytest.fixture
def shorter_epochs():
    """Epochs have a step less, as in earlier versions, until the test undoes it."""

    def init(self, *arguments):
        before(self, *arguments)
        self.steps -= 1

    before = IdentitySampler.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IdentitySampler, "__init__", init)
        yield patch


@pytest.mark.parametrize("step", [3, 7])
def test_epoch_begun_when_epochs_had_a_step_less_goes_on(sysu_tree, tmp_path, monkeypatch, shorter_epochs, step):
    """Also after what was its last step: it takes the one more, and is the same epoch as one in one go."""
    torch.set_num_threads(1)
    command = flags(sysu_tree, tmp_path / "stopped", *MORE, "--epochs", "1", "--resume", "auto")
    with monkeypatch.context() as patch:
        signal_at(step, signal.SIGTERM, patch)
        with pytest.raises(utils.Stopped, match=f"in epoch 0, after step {step} of 7"):
            train_ext_test0.main(command)
    shorter_epochs.undo()
    train_ext_test0.main(command)
    train_ext_test0.main(flags(sysu_tree, tmp_path / "whole", *MORE, "--epochs", "1"))
    assert_same_runs([tmp_path / "whole", tmp_path / "stopped"])


def test_run_whose_epochs_had_a_step_less_goes_on(sysu_tree, tmp_path, capsys, shorter_epochs):
    command = flags(sysu_tree, tmp_path, *MORE, "--resume", "auto")
    train_ext_test0.main([*command, "--epochs", "1"])
    shorter_epochs.undo()
    capsys.readouterr()
    result = train_ext_test0.main([*command, "--epochs", "2"])
    printed = capsys.readouterr().out
    assert "8 steps an epoch" in printed
    assert "_last.t: epoch 1" in printed
    assert [json.loads(line)["epoch"] for line in Path(result["log"]).read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_one_line_and_its_status(unbroken, sysu_tree, tmp_path, number, status):
    command = flags(sysu_tree, tmp_path, *MORE, "--resume", "auto")
    errors = tmp_path / "stderr.txt"
    process = start(train_ext_test0, command, errors)
    wait_until(lambda: logged_epochs(tmp_path))
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status
    line = errors.read_text().strip()
    assert re.fullmatch(
        rf"train_ext_test0.py: stopped by {number.name} in epoch \d, after step \d of 8; .*_last.t is saved: "
        "go on with --resume auto",
        line,
    )
    assert finish(train_ext_test0, command) == 0
    assert_same_runs([unbroken, tmp_path])


def test_a_run_that_diverges_keeps_its_last_checkpoint(unbroken, sysu_tree, tmp_path, monkeypatch):
    """Also when it is asked to save and stop after the step that is not finite."""
    command = flags(sysu_tree, tmp_path, *MORE, "--resume", "auto")
    augment, steps = TrainAugmentation.__call__, itertools.count(1)

    def spoil_a_step(self, *batch):
        views = augment(self, *batch)
        if next(steps) == 10:
            views[0][0] = np.inf
            os.kill(os.getpid(), signal.SIGTERM)
        return views

    with monkeypatch.context() as patch:
        patch.setattr(TrainAugmentation, "__call__", spoil_a_step)
        with pytest.raises(
            utils.InputError, match="^epoch 1/2: .* from step 3 on; lower --lr.*_last.t is intact: --res"
        ):
            train_ext_test0.main(command)
    (last,) = tmp_path.glob("models/*_last.t")
    assert torch.load(last)["epoch"] == 0
    train_ext_test0.main(command)
    assert_same_runs([unbroken, tmp_path])


def test_runs_from_when_steps_were_skipped_are_resumed(unbroken, sysu_tree, tmp_path, monkeypatch):
    """After an epoch and within one: their checkpoints count such steps."""
    command = flags(sysu_tree, tmp_path, *MORE, "--resume", "auto")
    readings, skipped, in_a_row, failed_at = torch.zeros(4).unbind()
    train_ext_test0.main([*command, "--epochs", "1"])
    (last,) = tmp_path.glob("models/*_last.t")
    torch.save(torch.load(last) | {"sums": {"in_a_row": in_a_row}}, last)
    with monkeypatch.context() as patch:
        signal_at(3, signal.SIGTERM, patch)
        with pytest.raises(utils.Stopped, match="in epoch 1, after step 3"):
            train_ext_test0.main(command)
    checkpoint = torch.load(last)
    readings += checkpoint["sums"]["readings"]
    del checkpoint["sums"]["first_bad"]
    checkpoint["sums"] |= {"readings": readings, "skipped": skipped, "in_a_row": in_a_row, "failed_at": failed_at}
    torch.save(checkpoint, last)
    train_ext_test0.main(command)
    (whole,) = unbroken.glob("models/*_last.t")
    for part in ("net", "optimizer"):
        assert_equal(torch.load(last)[part], torch.load(whole)[part])


def test_training_stopped_while_it_tests_repeats_no_step(unbroken, sysu_tree, tmp_path, monkeypatch):
    command = flags(sysu_tree, tmp_path, *MORE, "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(train_ext_test0.engine, "run_search", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(utils.Stopped, match="in epoch 0, after step (.*) of .*go on with --resume auto"):
            train_ext_test0.main(command)
    augment, steps = TrainAugmentation.__call__, []
    monkeypatch.setattr(TrainAugmentation, "__call__", lambda self, *batch: steps.append(1) or augment(self, *batch))
    train_ext_test0.main(command)
    sampler = IdentitySampler(sysu_train(sysu_tree, SIZE), 4, 2, 0)
    assert len(steps) == 2 * len(sampler)  # those of epochs 1 and 2
    lines = [json.loads(line) for line in next(tmp_path.glob("log/sysu_log/*.jsonl")).read_text().splitlines()]
    assert [entry["epoch"] for entry in lines] == [0, 1, 2]
    assert_same_runs([unbroken, tmp_path])


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ended, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "_exit", ended.append)
    with Pauses(1, torch.device("cpu")) as pauses:
        pauses.hold = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert pauses.due()
        assert (pauses.stop, ended) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGTERM)  # the same, sent twice
        assert ended == []
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1.1)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_time_is_up_every_so_many_minutes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pauses = Pauses(2, torch.device("cpu"))
    due = []
    for now[0] in (219, 221, 222, 340, 342):
        due.append(pauses.due())
    assert due == [False, True, False, False, True]
    assert pauses.stop == 0


def test_ctrl_c_leaves_no_process_behind(sysu_tree, tmp_path):
    command = flags(sysu_tree, tmp_path, "--epochs", "50", "--eval_every", "99", "--workers", "2")
    process = subprocess.Popen(
        [sys.executable, REPO / "train_ext_test0.py", *command],
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: process.poll() is not None or list(tmp_path.glob("models/*_last.t")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    assert process.wait(60) == 130
    assert process.stderr.read().decode().strip().count("\n") == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_full_disk_keeps_the_last_checkpoint(unbroken, sysu_tree, tmp_path):
    shutil.copytree(unbroken / "models", tmp_path / "models")
    shutil.copytree(unbroken / "log", tmp_path / "log")
    (last,) = tmp_path.glob("models/*_last.t")
    before = last.read_bytes()
    more = [*MORE, "--epochs", "5", "--resume", "auto"]
    errors = tmp_path / "stderr.txt"
    status = finish(train_ext_test0, flags(sysu_tree, tmp_path, *more), errors=errors, file_size=len(before) // 2)
    assert status == 2
    (line,) = errors.read_text().splitlines()
    assert "_last.t: cannot be written (File too large); make room" in line
    assert last.read_bytes() == before
    assert not list((tmp_path / "models").glob(".*.t.*"))
    assert finish(train_ext_test0, flags(sysu_tree, tmp_path, *more)) == 0


def test_full_disk_while_preparing(sysu_tree, tmp_path):
    tree = tmp_path / "sysu"
    shutil.copytree(sysu_tree, tree)
    before = [file.read_bytes() for file in sysu_train_files(tree)]
    errors = tmp_path / "stderr.txt"
    command = ["--data_path", tree, "--img_h", "288", "--img_w", "144"]
    assert finish(pre_process_sysu, command, errors=errors, file_size=2**20) == 2
    (line,) = errors.read_text().splitlines()
    assert "train_rgb_resized_img.npy: cannot be written (File too large); make room" in line
    assert [file.read_bytes() for file in sysu_train_files(tree)] == before
    assert not list(tree.glob(".*"))


@pytest.mark.parametrize("epochs", [1, 3])
def test_auto_does_not_take_another_run_s_log(unbroken, sysu_tree, tmp_path, epochs):
    shutil.copytree(unbroken / "log", tmp_path / "log")
    (log,) = (tmp_path / "log" / "sysu_log").glob("*.jsonl")
    before = "".join(log.read_text().splitlines(keepends=True)[:epochs])
    log.write_text(before)
    with pytest.raises(utils.InputError, match="already contains another run's log"):
        train_ext_test0.main(flags(sysu_tree, tmp_path, *MORE, "--resume", "auto"))
    assert log.read_text() == before


def test_a_run_killed_between_its_first_entry_and_the_save_begins_again(unbroken, sysu_tree, tmp_path, monkeypatch):
    command = flags(sysu_tree, tmp_path, *MORE, "--resume", "auto")
    save = train_ext_test0.save_checkpoint

    def die_after_the_first_epoch(checkpoint, path):
        if checkpoint["epoch"] == 0:
            raise KeyboardInterrupt
        save(checkpoint, path)

    with monkeypatch.context() as patch:
        patch.setattr(train_ext_test0, "save_checkpoint", die_after_the_first_epoch)
        with pytest.raises(KeyboardInterrupt):
            train_ext_test0.main(command)
    assert len(next(tmp_path.glob("log/sysu_log/*.jsonl")).read_text().splitlines()) == 1
    train_ext_test0.main(command)
    assert_same_runs([unbroken, tmp_path])


def test_two_runs_of_one_name(sysu_tree, tmp_path):
    command = flags(sysu_tree, tmp_path, "--epochs", "50", "--resume", "auto")
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
    second.join()
    assert second.exitcode == 143
    assert not list(tmp_path.glob("models/.*.t.*"))
