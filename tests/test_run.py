"""A training run on disk: its lock, its log, when it saves and stops, and what may be resumed."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_ext_test0
import training.log
import training.run
from conftest import log_entries, parse, tiny_flags, train_data
from core.files import atomic
from methods import Losses
from model import GFMNet
from training.log import RunLog, read_json_lines
from training.run import SaveTimer, run_lock
from utils import InputError, Stopped, seed_everything

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
        code = f"from training.run import run_lock\nwith run_lock({str(tmp_path / name)!r} + '_adam'): pass"
        other = run_code(code)
        assert "InputError" in other.stderr
        assert f"is writing now (process {os.getpid()}" in other.stderr
    assert {file.name for file in tmp_path.glob("*.t")} == {f"{name}_last.t", f"{name}_adam_last.t"}


@pytest.mark.slow
def test_without_locks_there_is_a_warning(tmp_path):
    """As on Windows, whose Python has no fcntl: everything can be imported, and runs."""
    code = "import sys\nsys.modules['fcntl'] = None\nimport train_ext_test0\n"
    code += "from training import run\nimport tools.search.__main__\n"
    result = run_code(f"{code}with run.run_lock({str(tmp_path / 'run')!r}): print('runs')")
    warning, runs = result.stdout.splitlines()
    assert "run.lock: cannot be locked (No locks available); do not start a second run of this name" in warning
    assert runs == "runs"


def test_a_run_s_names_are_locked_for_other_processes(tmp_path, monkeypatch):
    def other(path):
        """What another process is told that locks the same."""
        read, write = os.pipe()
        if not os.fork():
            try:
                with run_lock(path):
                    os._exit(0)
            except InputError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(1)
        os.close(write)
        os.wait()
        with open(read) as pipe:
            return pipe.read()

    run = training.run.Run("run", parse("--model_path", f"{tmp_path}/a", "--log_path", f"{tmp_path}/b"), {})
    names = tmp_path / "a" / "run", tmp_path / "b" / "sysu_log" / "run"
    with run:
        who = rf"\(process {os.getpid()} on {socket.gethostname()}\)"
        for name in names:
            assert re.match(f"{name}: another run of this name is writing now {who}; wait for it, or", other(name))
    assert [other(name) for name in names] == ["", ""]
    monkeypatch.setattr(training.run, "process_index", lambda: 1)  # the second process of a run leaves it to the first
    with run_lock(tmp_path / "c" / "run"):
        assert not list(tmp_path.glob("c/.*"))


def test_a_pipe_in_place_of_a_log_or_a_lock_waits_for_nobody(tmp_path):
    os.mkfifo(tmp_path / "run.txt")
    for resumed in (None, 0):
        with pytest.raises(InputError, match=r"run\.txt: is no regular file; name another"):
            RunLog(tmp_path, "run", resumed)
    os.mkfifo(tmp_path / ".run.lock")
    words = r"\.run\.lock: cannot be opened \(is no regular file\); delete it"
    with pytest.raises(InputError, match=words), run_lock(tmp_path / "run"):
        pass


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


def test_resumed_log_holds_each_epoch_once(tmp_path, capsys):
    log = RunLog(tmp_path, "run")
    for epoch in range(4):
        log.epoch({"epoch": epoch, "select": "test", "loss": 1.0 / (epoch + 1)})
    log.close()
    before = (tmp_path / "run.jsonl").read_text().splitlines()
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')  # the process died while writing
    assert len(read_json_lines(tmp_path / "run.jsonl")) == 4
    assert not capsys.readouterr().out
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('w"}\n{"epoch": 1, "loss": "low"}\n{"loss": 2.0}\n')  # none is an entry of a log
    log = RunLog(tmp_path, "run", resumed_epoch=1)
    line = "run.jsonl: line 5 is no epoch of a log and left out (3 such lines)\n"
    assert capsys.readouterr().out == f"warning: {tmp_path}/{line}"
    log.epoch({"epoch": 2, "loss": 5.0})
    log.close()
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert lines == [*before[:2], '{"epoch": 2, "loss": 5.0}']
    log = RunLog(tmp_path, "run")
    log.close()
    assert (tmp_path / "run.jsonl").read_text() == ""


def test_tensorboard_has_each_epoch_once(tmp_path):
    """While the run goes on, too; a resumed run drops what is past its checkpoint, a new one all."""
    folder = tmp_path / "run"

    def shown():
        board = EventAccumulator(str(folder))
        board.Reload()
        images = [event.step for tag in board.Tags()["images"] for event in board.Images(tag)]
        tags = board.Tags()["scalars"]
        return images, {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}

    Image.new("RGBA", (4, 3)).save(tmp_path / "a.png")
    for resumed, losses, expected in (
        (None, [3.0, 2.0, 1.0], [(0, 3.0), (1, 2.0), (2, 1.0)]),
        (0, [5.0], [(0, 3.0), (1, 5.0)]),
        (None, [4.0], [(0, 4.0)]),
    ):
        log = RunLog(tmp_path, "run", resumed)
        first = 0 if resumed is None else resumed + 1
        for epoch, loss in enumerate(losses, first):
            log.epoch({"epoch": epoch, "select": "test", "loss": loss})
        assert shown()[1] == {"loss": expected}
        log.image("ranking", tmp_path / "a.png", epoch)
        log.close()
        assert shown()[0][-1] == epoch


def test_a_text_log_goes_on_within_the_first_epoch(tmp_path):
    for resumed, line in ((None, "an old run"), (None, "a new run"), (-1, "resumed within its first epoch")):
        log = RunLog(tmp_path, "run", resumed)
        log.text(line)
        log.close()
    assert (tmp_path / "run.txt").read_text().splitlines() == ["a new run", "resumed within its first epoch"]


def test_a_full_disk_is_named_before_tensorboard_s_thread_meets_it(tmp_path, monkeypatch):
    log = RunLog(tmp_path, "run")
    full = SimpleNamespace(free=2**16)
    monkeypatch.setattr(training.log.shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"/run: cannot be written \(No space left on device\); free some space"):
        log.epoch({"epoch": 0})
    log.close()
    with pytest.raises(InputError, match="/other: cannot be written"):
        RunLog(tmp_path, "other")


def test_names_in_a_log_write_nothing_else(tmp_path, capsys):
    log = RunLog(tmp_path, "run")
    log.text("a\udcffb\n\x1b[2J")
    log.close()
    assert (tmp_path / "run.txt").read_text() == capsys.readouterr().out == "a?b\n?[2J\n"


def test_log_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, "run")
    log.epoch({"epoch": 0, "loss": 1.0})
    log.image("curves", tmp_path / "none.png", 0)
    log.close()
    assert capsys.readouterr().out.startswith("TensorBoard is not installed")
    assert log_entries(tmp_path / "run.jsonl") == [{"epoch": 0, "loss": 1.0}]


# ---- resuming


@pytest.fixture(scope="session")
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


def test_a_checkpoint_that_does_not_know_its_images_goes_on(one_epoch, tiny_tree, tmp_path):
    """As older ones do not; what it then saves knows them."""
    content = torch.load(one_epoch["last"])
    digest, counts = content.pop("data_digest"), content.pop("num_images")
    torch.save(content, tmp_path / "old.t")
    saved = torch.load(resume(tiny_tree, tmp_path, tmp_path / "old.t")["last"])
    assert (saved["data_digest"], saved["num_images"], saved["epoch"]) == (digest, counts, 1)


def test_every_flag_that_decides_what_is_computed_is_compared():
    """A new flag belongs to one of the two lists: this one, or MAY_CHANGE."""
    recipe = "afam alpha amp arch augc batch_size dataset erase_area gamma img_h img_w local lr margin"
    recipe += " method milestones mode num_pos optim padding rande seed select share_net square stages"
    recipe += " schedule sync_bn trial warmup weighting weights"
    flags = vars(parse())
    assert {*recipe.split()} == flags.keys() - train_ext_test0.MAY_CHANGE


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
        with pytest.raises(InputError, match=rf"_{kind}\.t: already exists, of another run; choose another"):
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


def test_a_file_that_was_kept_is_not_written_again(one_epoch, tiny_tree, tmp_path):
    content = torch.load(one_epoch["last"])
    content["epoch"] += 1
    last = tmp_path / Path(one_epoch["last"]).name
    torch.save(content, last)
    kept = tmp_path / "models" / last.name.replace("_last.t", "_epoch_1.t")
    kept.parent.mkdir()
    kept.write_bytes(b"kept")
    resume(tiny_tree, tmp_path, last, "--epochs", "3", "--save_epoch", "1")
    assert kept.read_bytes() == b"kept"
    assert torch.load(kept.with_name(kept.name.replace("_epoch_1.t", "_epoch_2.t")))["epoch"] == 2


@pytest.mark.parametrize("beside", ["its own", "nothing", "another run's"])
def test_the_best_checkpoint_comes_along_or_is_chosen_anew(beside, one_epoch, tiny_tree, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for kind in ("best", "last"):
        content = torch.load(one_epoch[kind])
        content["best"]["Rank-1"] = 101.0  # no later epoch is better
        content["epoch"] += kind == "last"
        if kind == "best" and beside == "another run's":
            content["best"]["mAP"] -= 1
        if kind == "last" or beside != "nothing":
            torch.save(content, old / Path(one_epoch[kind]).name)
    result = resume(tiny_tree, tmp_path, old / Path(one_epoch["last"]).name, "--epochs", "3")
    gone = beside != "its own"
    assert torch.load(result["best"])["epoch"] == result["metrics"]["epoch"] == 2 * gone
    text = Path(result["log"]).with_suffix(".txt").read_text()
    assert ("_best.t, of epoch 0, is gone; the best epoch is chosen from epoch 2 on" in text) == gone


class Story:
    """A run of scripted tests: each epoch has a Rank-1, and leaves a weight of its own in the network. It can be killed
    before or after any write takes its name."""

    class Net(torch.nn.Linear):
        options = {}

    class Killed(BaseException):
        pass

    def __init__(self, folder):
        self.folder, self.trained, self.writes = folder, {}, 0  # trained: {weight: (epoch, Rank-1)}

    def tell(self, ranks, kill=None, resume="auto", models=None, seed=0):
        """Train the epochs that are left -> what the run reports. kill: (number of a write, whether after it)."""
        where = ["--model_path", str(models or self.folder / "models"), "--log_path", f"{self.folder}/log"]
        more = ["--resume", str(resume)] if resume else []
        args = parse("--save_epoch", "1", "--seed", str(seed), *where, *more)
        net = self.Net(1, 1, bias=False)
        replace, first = os.replace, self.writes

        def write(source, target):
            self.writes += 1
            if kill == (self.writes - first, False):
                raise self.Killed
            replace(source, target)
            if kill == (self.writes - first, True):
                raise self.Killed

        with (
            pytest.MonkeyPatch.context() as patch,
            training.run.Run("run", args, {"weights": "none", "seed": 0}) as run,
        ):
            patch.setattr(os, "replace", write)
            run.start(net, torch.optim.SGD(net.parameters()), torch.device("cpu"), train_data(1, 1), 1)
            for epoch in range(run.first_epoch, len(ranks)):
                run.begin_epoch(epoch)
                weight = len(self.trained) + 1.0
                self.trained[weight] = epoch, ranks[epoch]
                torch.nn.init.constant_(net.weight, weight)
                run.end_epoch({"epoch": epoch, "FC/Rank-1": ranks[epoch], "FC/mAP": 1.0})
            return run.finish()

    def kept(self, name):
        """(epoch, Rank-1) of the network in a checkpoint."""
        content = torch.load(name)
        told = self.trained[content["net"]["weight"].item()]
        assert content["epoch"] == told[0]
        return told


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("again", [-12.0, 3.0])
def test_whatever_write_a_kill_comes_in_the_report_is_that_of_the_files(tmp_path, monkeypatch, after, again):
    """Also where the epoch that is repeated comes out worse or better, and where the kill comes twice."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    ranks = [30.0, 40.0, 39.0]
    whole = Story(tmp_path / "whole")
    whole.tell(ranks, resume=None)
    for number in range(1, whole.writes + 1):
        for second in (None, 1, 2):
            story = Story(tmp_path / f"{number} {second}")
            with pytest.raises(Story.Killed):
                story.tell(ranks, (number, after))
            ranks_again = [rank + again for rank in ranks]
            if second:
                with contextlib.suppress(Story.Killed):
                    story.tell(ranks_again, (second, after))
            result = story.tell(ranks_again)
            log = {entry["epoch"]: entry["FC/Rank-1"] for entry in log_entries(result["log"])}
            assert [entry["epoch"] for entry in log_entries(result["log"])] == [0, 1, 2]
            best = max(log, key=lambda epoch: (log[epoch], -epoch))
            assert (result["metrics"]["epoch"], result["metrics"]["Rank-1"]) == (best, log[best])
            assert story.kept(result["best"]) == (best, log[best])
            assert story.kept(result["last"]) == (2, log[2])
            for epoch in (1, 2):
                assert story.kept(result["last"].replace("last", f"epoch_{epoch}")) == (epoch, log[epoch])


@pytest.mark.parametrize("kind", ["best", "epoch_2", "published"])
@pytest.mark.parametrize("best", [1, 0])
def test_a_resumed_run_neither_reports_nor_overwrites_what_another_kept(kind, best, tmp_path, monkeypatch):
    """Whether or not its last epoch is its best, which it would write anew."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    ranks = [10.0, 11.0 if best else 9.0]
    story, other = Story(tmp_path / "b"), Story(tmp_path / "a")
    last, models = story.tell(ranks, resume=None)["last"], tmp_path / "a" / "models"
    other.tell([50.0, 40.0, 30.0], resume=None)
    for file in models.glob("*.t"):
        if kind not in file.name:
            file.unlink()
    if kind == "published":
        torch.save({"net": {}, "epoch": best}, models / "run_best.t")
    (kept,) = models.glob("*.t")
    before = kept.read_bytes()
    with pytest.raises(InputError, match=rf"{kept.name}: already exists, of another run; choose another --model_path"):
        story.tell([*ranks, 5.0], resume=last, models=models)
    assert kept.read_bytes() == before
    assert [*models.glob("*.t")] == [kept]
    shutil.rmtree(tmp_path / "b" / "log")
    assert story.kept(story.tell([*ranks, 5.0], resume=last, models=tmp_path / "c")["best"]) == (best, max(ranks))


@pytest.mark.parametrize("stop", [(0, 1), (0, 4), (1, 3), (0, "before"), (1, "test")])
def test_a_run_that_a_signal_stops_goes_on_at_its_step(stop, tmp_path, monkeypatch, capsys):
    """With the draws and the sums of an unbroken one."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)

    def tell(folder, drawn, stop=None):
        where = ["--model_path", str(folder / "models"), "--log_path", str(folder / "log"), "--epochs", "2"]
        net, means = Story.Net(1, 1, bias=False), []
        with training.run.Run("run", parse(*where, "--resume", "auto"), {"weights": "none"}) as run:
            run.start(net, torch.optim.SGD(net.parameters()), torch.device("cpu"), train_data(1, 1), 4)
            assert run.last_path.exists()  # before the first entry of the log
            for epoch in range(run.first_epoch, 2):
                meter = run.begin_epoch(epoch)
                while meter.step < 4:
                    drawn.append(torch.rand(()))
                    meter.add(Losses(*[drawn[-1]] * len(Losses._fields)), [torch.ones(1)])
                    if stop == (epoch, meter.step):
                        os.kill(os.getpid(), signal.SIGTERM)
                    if run.due():
                        run.save(meter)
                if stop == (epoch, "before"):
                    os.kill(os.getpid(), signal.SIGTERM)
                with run.testing(meter):
                    if stop == (epoch, "test"):
                        os.kill(os.getpid(), signal.SIGTERM)
                means.append(meter.means()["total"])
                run.end_epoch({"epoch": epoch})
            files = {"best": None, "last": str(run.last_path), "log": str(run.log_path)}
            assert run.finish() == files | {"metrics": {"Rank-1": -1.0}}
        assert f"no epoch was tested successfully, or its file is gone; test the last: --resume {files['last']}" in (
            capsys.readouterr().out
        )
        return means

    whole, drawn = [], []
    means = tell(tmp_path / "whole", whole)
    epoch, step = stop[0], stop[1] if isinstance(stop[1], int) else 4
    words = f" in epoch {epoch}, after step {step} of 4; .*run_last.t is saved: continue with --resume auto"
    with pytest.raises(Stopped, match=words) as stopped:
        tell(tmp_path / "broken", drawn, stop)
    assert stopped.value.number == signal.SIGTERM
    assert len(drawn) == 4 * epoch + step
    assert tell(tmp_path / "broken", drawn) == means[epoch:]
    assert drawn == whole
    log = (tmp_path / "broken" / "log" / "sysu_log" / "run.txt").read_text()
    assert f"run_last.t: epoch {epoch}, after step {step} of 4\n" in log


def test_the_first_of_equal_epochs_is_the_best(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    story = Story(tmp_path)
    result = story.tell([20.0, 30.0, 30.0, 30.0], resume=None)
    assert (result["metrics"]["epoch"], story.kept(result["best"])) == (1, (1, 30.0))
    assert (
        f"best: epoch 1, Rank-1 30.0 % (queries whose person is first), mAP 1.0 %: {result['best']}\n"
        in capsys.readouterr().out
    )


def test_every_epoch_and_every_process_draws_anew(tmp_path, monkeypatch):
    run, drawn = training.run.Run("run", parse("--seed", "3", "--model_path", str(tmp_path)), {}), []
    run.device = torch.device("cpu")
    for epoch in range(3):
        for index in range(3):
            monkeypatch.setattr(training.run, "process_index", lambda index=index: index)
            for _ in range(2):
                run.begin_epoch(epoch)
                drawn.append(torch.rand(4).tolist())
    assert drawn[::2] == drawn[1::2]
    seed_everything(3)  # the network's
    assert len({tuple(draws) for draws in [*drawn, torch.rand(4).tolist()]}) == 10


def test_a_resume_names_all_flags_that_differ(one_epoch, tiny_tree, tmp_path):
    words = (
        r"was saved with --alpha 1 --seed 0, but this run uses --alpha 3\.0 --seed 1; pass the same values to resume"
    )
    with pytest.raises(InputError, match=words):
        resume(tiny_tree, tmp_path, one_epoch["last"], "--seed", "1", "--alpha", "3")


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
    assert "warning: there is no best checkpoint: no epoch was tested successfully, or its file is gone;" in printed
    result = train_ext_test0.main([*command, "2"])
    assert ["FC/Rank-1" in entry for entry in log_entries(result["log"])] == [False, True]
    assert result["metrics"]["epoch"] == torch.load(result["best"])["epoch"] == 1


def test_a_full_disk_is_named_by_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training.run.os, "write", full)
    words = r"run\.lock: cannot be written \(No space left on device\); free some space"
    with pytest.raises(InputError, match=words), run_lock(tmp_path / "run", "another"):
        pass
