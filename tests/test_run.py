"""A training run on disk: its lock, its log, when it saves and stops, and what may be resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import core.run
import train_ext_test0
from conftest import log_entries, parse, tiny_flags
from core.files import atomic
from core.log import RunLog
from core.run import SaveTimer, run_lock
from model import GFMNet
from utils import InputError

# ---- lock


def run_code(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_lock_leaves_runs_alone_whose_names_begin_alike(tmp_path):
    """What another live run writes, and its lock, stay; and it still keeps others out."""
    name = "run_seed_0_9"
    with run_lock(tmp_path / f"{name}_adam"), atomic(tmp_path / f"{name}_adam_last.t") as temporary:
        with run_lock(tmp_path / name), atomic(tmp_path / f"{name}_last.t"):
            assert temporary.exists()
        code = f"from core.run import run_lock\nwith run_lock({str(tmp_path / name)!r} + '_adam'): pass"
        other = run_code(code)
        assert "InputError" in other.stderr
        assert f"is writing now (process {os.getpid()}" in other.stderr
    assert {file.name for file in tmp_path.glob("*.t")} == {f"{name}_last.t", f"{name}_adam_last.t"}


@pytest.mark.slow
def test_without_locks_there_is_a_warning(tmp_path):
    """As on Windows, whose Python has no fcntl: everything can be imported, and runs."""
    code = "import sys\nsys.modules['fcntl'] = None\nimport train_ext_test0\n"
    code += "from core import run\nfrom tools import search\n"
    result = run_code(f"{code}with run.run_lock({str(tmp_path / 'run')!r}): print('runs')")
    warning, runs = result.stdout.splitlines()
    assert "run.lock: cannot be locked (No locks available); do not start a second run of this name" in warning
    assert runs == "runs"


# ---- when it saves and stops


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ended, before, now = [], signal.getsignal(signal.SIGINT), [100.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with SaveTimer(1, torch.device("cpu")) as timer:
        timer.hold = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert timer.due()
        assert (timer.stop, ended) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGTERM)  # the same, sent twice
        assert ended == []
        now[0] += 1.1
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_time_is_up_every_so_many_minutes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    timer = SaveTimer(2, torch.device("cpu"))
    due = []
    for now[0] in (219, 221, 222, 340, 342):
        due.append(timer.due())
    assert due == [False, True, False, False, True]
    assert timer.stop == 0


# ---- log


def test_resumed_log_holds_each_epoch_once(tmp_path):
    log = RunLog(tmp_path, "run")
    for epoch in range(4):
        log.epoch({"epoch": epoch, "loss": 1.0 / (epoch + 1)})
    log.close()
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')  # the process died while writing
    log = RunLog(tmp_path, "run", resumed_epoch=1)
    log.epoch({"epoch": 2, "loss": 5.0})
    log.close()
    assert [(entry["epoch"], entry["loss"]) for entry in log_entries(tmp_path / "run.jsonl")] == [
        (0, 1.0),
        (1, 0.5),
        (2, 5.0),
    ]
    log = RunLog(tmp_path, "run")
    log.close()
    assert (tmp_path / "run.jsonl").read_text() == ""


def test_a_text_log_goes_on_within_the_first_epoch(tmp_path):
    for resumed, line in ((None, "a new run"), (-1, "resumed within its first epoch")):
        log = RunLog(tmp_path, "run", resumed)
        log.text(line)
        log.close()
    assert (tmp_path / "run.txt").read_text().splitlines() == ["a new run", "resumed within its first epoch"]


def test_log_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, "run")
    log.epoch({"epoch": 0, "loss": 1.0})
    log.image("curves", tmp_path / "none.png", 0)
    log.close()
    assert capsys.readouterr().out.startswith("TensorBoard is not installed")
    assert log_entries(tmp_path / "run.jsonl") == [{"epoch": 0, "loss": 1.0}]


# ---- resuming


@pytest.fixture(scope="module")
def one_epoch(tiny_tree, tmp_path_factory):
    """A run of an epoch, never tested -> main's result."""
    return train_ext_test0.main(tiny_flags(tiny_tree, tmp_path_factory.mktemp("run"), "--epochs", "1"))


def resume(tree, out, last, *more):
    return train_ext_test0.main(tiny_flags(tree, out, "--resume", str(last), "--epochs", "2", *more))


@pytest.mark.parametrize(
    ("flag", "value"), [("share_net", "3"), ("alpha", "3"), ("optim", "sgd"), ("seed", "1"), ("milestones", "7")]
)
def test_resume_refuses_other_flags(one_epoch, tiny_tree, tmp_path, flag, value):
    with pytest.raises(
        InputError, match=rf"_last\.t: was saved with --{flag} .*, but this run uses --{flag} \[?{value}"
    ):
        resume(tiny_tree, tmp_path, one_epoch["last"], f"--{flag}", value)


def test_every_flag_that_decides_what_is_computed_is_compared():
    """A new flag belongs to one of the two lists: this one, or MAY_CHANGE."""
    recipe = "afam alpha amp arch augc batch_size dataset erase_area gamma img_h img_w local lr margin"
    recipe += " method milestones mode num_pos optim padding rande seed select share_net square stages"
    recipe += " schedule sync_bn trial warmup weighting weights"
    flags = vars(parse())
    assert {*recipe.split()} == flags.keys() - train_ext_test0.MAY_CHANGE


FIRST_FLAGS = "dataset data_path trial mode img_h img_w workers method arch weights share_net margin alpha gamma square"
FIRST_FLAGS += " weighting optim lr batch_size num_pos augc rande epochs amp seed gpu eval_every test_batch model_path"
FIRST_FLAGS += " save_epoch log_path resume"


def test_a_checkpoint_of_the_first_layout_is_resumed(one_epoch, tiny_tree, tmp_path):
    """As the first commit of training wrote it: neither version nor later fields, of flags and options only the first.

    What came later had its default.
    """
    content = torch.load(one_epoch["last"])
    first = {name: content[name] for name in ("net", "options", "image_size", "args", "epoch", "best", "optimizer")}
    first["args"] = {flag: content["args"][flag] for flag in FIRST_FLAGS.split()}
    for option in ("expansion", "shift", "stages"):
        del first["options"][option]
    torch.save(first, tmp_path / "first.t")
    with pytest.raises(InputError, match="was saved with --padding 10, but this run uses --padding 5"):
        resume(tiny_tree, tmp_path, tmp_path / "first.t", "--padding", "5")
    result = resume(tiny_tree, tmp_path, tmp_path / "first.t", "--weights", "absent.pth")
    content = torch.load(result["last"])
    assert (content["version"], content["epoch"]) == (2, 1)
    assert content["args"]["weights"] == "none"  # what the run began with; a resumed one reads none


def test_a_run_from_when_exact_was_the_default_is_not_begun_anew(one_epoch, tiny_tree, tmp_path):
    content = torch.load(one_epoch["last"])
    content["args"]["weighting"] = "exact"
    (tmp_path / "models").mkdir()
    torch.save(content, tmp_path / "models" / Path(one_epoch["last"]).name)
    with pytest.raises(InputError, match="under its old name; pass --resume"):
        resume(tiny_tree, tmp_path, "auto", "--weighting", "exact")


def test_a_run_is_not_overwritten(one_epoch, tiny_tree, tmp_path):
    last, log = Path(one_epoch["last"]), Path(one_epoch["log"])
    before = last.read_bytes(), log.read_bytes()
    models, logs = ("--model_path", str(last.parent)), ("--log_path", str(log.parent.parent))
    for more in (["--alpha", "2"], ["--epochs", "1"]):
        with pytest.raises(InputError, match=r"_last\.t: already exists; continue that run with --resume auto"):
            train_ext_test0.main(tiny_flags(tiny_tree, tmp_path, *models, *more))
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(InputError, match=r"\.jsonl: already contains another run's log; delete"):
            train_ext_test0.main(tiny_flags(tiny_tree, tmp_path, *logs, *more))
    assert before == (last.read_bytes(), log.read_bytes())


@pytest.mark.parametrize("kind", ["best", "epoch_20"])
def test_a_checkpoint_that_was_kept_is_not_overwritten(kind, one_epoch, tiny_tree, tmp_path):
    (tmp_path / "models").mkdir()
    kept = tmp_path / "models" / Path(one_epoch["best"]).name.replace("best", kind)
    kept.write_bytes(b"precious")
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(InputError, match=rf"_{kind}\.t: already exists, of an earlier run; choose another"):
            train_ext_test0.main(tiny_flags(tiny_tree, tmp_path, *more))
    assert kept.read_bytes() == b"precious"


@pytest.mark.parametrize("change", [{"epoch": 2}, {"FC/Rank-1": 1.5}])
def test_the_log_of_another_run_is_not_continued(change, one_epoch, tiny_tree, tmp_path):
    (entry,) = log_entries(one_epoch["log"])
    log = tmp_path / "log" / "sysu_log" / Path(one_epoch["log"]).name
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps(entry | change) + "\n")
    with pytest.raises(InputError, match=r"\.jsonl: goes beyond .*_last\.t, or is of another run; choose"):
        resume(tiny_tree, tmp_path, one_epoch["last"])
    assert log_entries(log) == [entry | change]


@pytest.mark.parametrize("gone", [False, True])
def test_the_best_checkpoint_comes_along_or_is_chosen_anew(gone, one_epoch, tiny_tree, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    content = torch.load(one_epoch["last"])
    content["best"]["Rank-1"] = 101.0  # no later epoch is better
    torch.save(content, old / Path(one_epoch["last"]).name)
    if not gone:
        shutil.copy(one_epoch["best"], old)
    result = resume(tiny_tree, tmp_path, old / Path(one_epoch["last"]).name)
    assert torch.load(result["best"])["epoch"] == result["metrics"]["epoch"] == int(gone)
    text = Path(result["log"]).with_suffix(".txt").read_text()
    assert ("_best.t, of epoch 0, is gone; the best epoch is chosen from epoch 1 on" in text) == gone


@pytest.mark.slow
def test_a_run_killed_between_its_entry_and_the_save_begins_the_epoch_again(tiny_tree, tmp_path, monkeypatch):
    command = tiny_flags(tiny_tree, tmp_path, "--epochs", "1", "--resume", "auto")

    def die(content, path):
        if content["epoch"] == 0:
            raise KeyboardInterrupt
        save(content, path)

    save = core.run.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(core.run, "save_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            train_ext_test0.main(command)
    (log,) = tmp_path.glob("log/sysu_log/*.jsonl")
    assert len(log_entries(log)) == 1
    train_ext_test0.main(command)
    assert [entry["epoch"] for entry in log_entries(log)] == [0]


# ---- tests within the training


@pytest.mark.slow
def test_features_that_are_not_finite_leave_an_epoch_without_a_result(tiny_tree, tmp_path, monkeypatch, capsys):
    command = tiny_flags(tiny_tree, tmp_path, "--eval_every", "1", "--resume", "auto", "--epochs")
    with monkeypatch.context() as patch:
        patch.setattr(GFMNet, "embed", lambda net, images, modality: 2 * [torch.full((len(images), 4), torch.inf)])
        result = train_ext_test0.main([*command, "1"])
    assert (result["best"], result["metrics"]) == (None, {"Rank-1": -1.0})
    printed = capsys.readouterr().out
    assert "warning: no test result for epoch 0: the features are not finite in evaluation; training goes on" in printed
    assert "warning: no epoch was tested successfully, so there is no best one; test the last: --resume" in printed
    result = train_ext_test0.main([*command, "2"])
    assert ["FC/Rank-1" in entry for entry in log_entries(result["log"])] == [False, True]
    assert result["metrics"]["epoch"] == torch.load(result["best"])["epoch"] == 1
